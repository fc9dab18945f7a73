#!/bin/sh
# What Linux does in a volume: every kind of change that the file system must be able to read, or to recover, afterwards.
# It runs in the virtual machine with the volume on /mnt; any failure is the outcome.
# It tells how far it is: the power may be cut at any of these steps.
set -eu
step=0
progress() {
    step=$((step + 1))
    echo "@ progress $step" >&3
}
mkdir /mnt/by-linux
cd /mnt/by-linux

# A directory of several blocks, and an inode group that fills.
mkdir many
number=0
while [ $number -lt 150 ]; do
    echo "file $number of Linux" >"many/a-file-with-a-rather-long-name-for-its-size-$number"
    number=$((number + 1))
    [ $((number % 10)) -ne 0 ] || progress
done
sync
progress
# Holes in the directory and in the allocators; the clusters go through the truncate log.
rm many/*5 many/*7
progress

# Deep folders, names as long as they can be, links short and long.
mkdir -p deep/b/c/d/e/f/g/h
echo bottom >deep/b/c/d/e/f/g/h/file
name=$(printf '%0255d' 0)
echo "$name" >"deep/$name"
ln -s deep/b short-link
ln -s "$(printf '%04000d' 0)" long-link
ln deep/b/c/d/e/f/g/h/file hard-link
progress

# Large, written at once; and two that grow in turns, which breaks them into pieces.
dd if=/dev/urandom of=large bs=64k count=40 2>/dev/null
progress
round=0
while [ $round -lt 30 ]; do
    dd if=/dev/urandom bs=5000 count=1 2>/dev/null >>piece-0
    dd if=/dev/urandom bs=3000 count=1 2>/dev/null >>piece-1
    [ $((round % 10)) -ne 0 ] || sync
    round=$((round + 1))
    progress
done
# Far behind the end: without sparse files Linux fills the space between.
echo end | dd of=far bs=1 seek=1000000 2>/dev/null
progress

# Changes to what was there before: append, cut, overwrite, move, remove.
if [ -d /mnt/for-linux ]; then
    cd /mnt/for-linux
    echo "appended by Linux" >>append
    progress
    truncate -s 5000 cut
    progress
    dd if=/dev/urandom of=overwrite bs=4096 seek=2 count=3 conv=notrunc 2>/dev/null
    progress
    mv move ../by-linux/moved
    progress
    mv folder ../by-linux/moved-folder
    progress
    rm remove
    progress
    rm -r remove-folder
    progress
fi
sync
progress
