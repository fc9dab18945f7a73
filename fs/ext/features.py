"""The feature words of a superblock: names, and which of them we know.

Numbers and names are those of the on-disk format as documented with e2fsprogs (`tune2fs`,
`debugfs feature`) and Linux's `Documentation/filesystems/ext4/`. Linux may mount an image with
unknown "compatible" features, and with unknown "read-only compatible" ones for reading; we refuse
both, because what we don't know we haven't tested.
"""

from __future__ import annotations

from typing import Final

COMPAT: Final = {
    0x0001: "dir_prealloc",
    0x0002: "imagic_inodes",
    0x0004: "has_journal",
    0x0008: "ext_attr",
    0x0010: "resize_inode",
    0x0020: "dir_index",
    0x0040: "lazy_bg",
    0x0100: "exclude_bitmap",
    0x0200: "sparse_super2",
    0x0400: "fast_commit",
    0x0800: "stable_inodes",
    0x1000: "orphan_file",
}
INCOMPAT: Final = {
    0x0001: "compression",
    0x0002: "filetype",
    0x0004: "needs_recovery",
    0x0008: "journal_dev",
    0x0010: "meta_bg",
    0x0040: "extents",
    0x0080: "64bit",
    0x0100: "mmp",
    0x0200: "flex_bg",
    0x0400: "ea_inode",
    0x1000: "dirdata",
    0x2000: "metadata_csum_seed",
    0x4000: "large_dir",
    0x8000: "inline_data",
    0x10000: "encrypt",
    0x20000: "casefold",
}
RO_COMPAT: Final = {
    0x0001: "sparse_super",
    0x0002: "large_file",
    0x0008: "huge_file",
    0x0010: "uninit_bg",
    0x0020: "dir_nlink",
    0x0040: "extra_isize",
    0x0080: "snapshot",
    0x0100: "quota",
    0x0200: "bigalloc",
    0x0400: "metadata_csum",
    0x0800: "replica",
    0x1000: "read-only",
    0x2000: "project",
    0x4000: "shared_blocks",
    0x8000: "verity",
    0x10000: "orphan_present",
}

COMPAT_KNOWN: Final = 0x0008 | 0x0010 | 0x0020
INCOMPAT_FILETYPE: Final = 0x0002
INCOMPAT_KNOWN: Final = INCOMPAT_FILETYPE
RO_COMPAT_SPARSE_SUPER: Final = 0x0001
RO_COMPAT_LARGE_FILE: Final = 0x0002
RO_COMPAT_KNOWN: Final = RO_COMPAT_SPARSE_SUPER | RO_COMPAT_LARGE_FILE


def names(compat: int, incompat: int, ro_compat: int) -> list[str]:
    """Names of all features that are set. A bit without a name is given as its word and number."""
    return [
        texts.get(bit, f"{word}:{bit:#x}")
        for word, bits, texts in (
            ("compat", compat, COMPAT),
            ("incompat", incompat, INCOMPAT),
            ("ro_compat", ro_compat, RO_COMPAT),
        )
        for bit in (1 << n for n in range(32))
        if bits & bit
    ]


def unknown(compat: int, incompat: int, ro_compat: int) -> list[str]:
    """Names of the features that we don't know."""
    return names(compat & ~COMPAT_KNOWN, incompat & ~INCOMPAT_KNOWN, ro_compat & ~RO_COMPAT_KNOWN)
