"""The checker of OCFS2 volumes: `fs.ocfs2.fsck.checker.check(device)` lists what is wrong."""
