"""The vocabulary, the wire and the transports; knows nothing of what is above it."""
