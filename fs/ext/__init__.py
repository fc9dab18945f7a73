"""The second extended file system (ext2) with 4 KiB blocks, read and write; see `fs/DESIGN.md`."""
