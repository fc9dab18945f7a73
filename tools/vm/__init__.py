"""Real Linux as the judge of our OCFS2 volumes: the slower tier `make vm-check`.

A volume that our file system wrote goes into a virtual machine that runs Debian's own kernel.
Linux joins as a node of the cluster, mounts it, replays dead nodes' journals, reads every file,
works in it, and leaves or loses power. Then ours looks at what Linux left.

    python -m tools.vm              the campaign: every check, see `tools.vm.campaign`
    python -m tools.vm IMAGE        let Linux judge one image

    programs.py    Debian's programs that all this needs
    kernel.py      Debian's kernel package, fetched and unpacked below .cache, never installed
    modules.py     which kernel modules, in which order
    cpio.py        the archive format of an initramfs
    initramfs.py   busybox, modules and `init.sh`: all that the machine boots
    machine.py     QEMU with software emulation: no KVM, no root, no network
    report.py      what the machine told on its serial ports
    tree.py        every entry of a mounted volume: Linux's listing and ours, compared
    volume.py      what ocfs2-tools say about an image on this side
    judge.py       one volume, one machine, one verdict
    node.py        a node of ours as a process that can be killed
    guests.py      a whole cluster of ours that loses its power
    contents.py    the files that our nodes write
    story.py       one image on which ours and Linux take turns
    campaign.py    the checks: stories

Exit codes: 0 good, 1 not good (a kernel that hangs or panics on the image is), 2 the check could
not run. Nothing is skipped without a word: what can't run makes it 2.
"""
