"""Experiments: questions about policies, answered by running the real parts in one process."""
