"""The lock manager of a cluster: who may hold what in which mode.

Sans IO: messages go out through a `LockTransport`, come in through `deliver`, and time is told
with `tick`. Knows nothing of file systems, sockets or membership.
"""
