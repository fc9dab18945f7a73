"""OCFS2, the cluster file system: on-disk format, mounting, making and checking of images."""
