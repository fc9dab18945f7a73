"""Importing this encloses a process and all that it will fork: no signal of theirs gets out.

For a fork server.  A node must be able to kill another one, and where both have their user's id
that would be any process of that user.  With a wall around them all (Landlock, Linux 6.12) it is a
process of the same fork server, and nobody else's: walls inside of it that let signals out let them
out as far as this one.

A kernel without that leaves it to what user ids allow.
"""

from __future__ import annotations

from ipc.jail import landlock, limits

limits.no_new_privileges()
landlock.hold_signals()
