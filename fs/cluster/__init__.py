"""Who is in the cluster, and who may write.

Disk heartbeat, quorum, fencing and agreed membership after OCFS2's o2cb. Sans IO: sectors are read
and written through a small interface, messages go out through a callback and come in through
`deliver`, and time is told with `tick`.
"""
