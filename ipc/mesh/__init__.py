"""Sockets between the nodes of one cluster: authenticated, versioned, reconnecting.

    addresses   where a node listens: a Unix path or a TCP address; listening and connecting
    frames      MESH WIRE, part 1: frames, and their seals once both ends have proved the key
    handshake   MESH WIRE, part 2: who are you, do you know the key, do we agree
    link        one connection: its bytes in and out, its bounds, what it was last heard of
    peer        what is known of one other node, and when to try again
    watch       epoll, and what is logged of refusals
    mesh        all links of one node: listener, reconnection, timers, callbacks
    faults      what a nemesis does to messages: loss, delay, doubles, overtaking

The counterpart in Linux is o2net (fs/ocfs2/cluster/tcp.c).  As there, a pair of nodes has one
connection, the higher number connects and the lower one listens, and both must have the same
timing.  Unlike there, a peer must prove that it knows the cluster's key, every frame carries a
seal, and there are no replies: whoever wants one sends a message back.  o2net trusts every host
that has the right source address.
"""
