"""The speed of the cluster beside its peers: `python -m tools.bench [--quick] [--json]`."""
