"""Everything a person touches: the command line, the cluster supervisor, benchmarks."""
