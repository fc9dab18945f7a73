"""The journal that ext3, ext4 and OCFS2 share: jbd2's format, writer and recovery.

Knows nothing of a file system: it is given the device and the numbers of the journal's blocks.

    area      the journal's blocks on the device
    format    the superblock and what belongs to all blocks
    layout    descriptor, revoke and commit blocks in all their forms
    recovery  what is in the log goes home after a crash
    journal   commit, checkpoint
"""
