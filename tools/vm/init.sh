#!/bin/sh
# /init of the virtual machine: Linux joins the cluster, mounts the volume on /dev/vda, reads all of it,
# works in it (work.sh) and leaves, or loses power.
#
# /job holds the variables that say what to do (tools/vm/judge.py writes it). What happens is told on the second
# serial port (tools/vm/report.py reads it): lines "@ STEP RESULT", and lines "@ data NAME BYTES" with so many
# bytes behind them. Kernel messages go to the first.
PATH=/bin
export PATH
LC_ALL=C
export LC_ALL

mount -t devtmpfs none /dev
mount -t proc none /proc
mount -t sysfs none /sys
stty -F /dev/ttyS1 raw
exec 3>/dev/ttyS1
. /job

tell() { echo "@ $*" >&3; }

# The last close of a terminal waits until all is sent.
power_off() {
    exec 3>&-
    poweroff -f
    sleep 60
}

# Off at once: nothing that is still in memory reaches the disk.
power_cut() {
    exec 3>&-
    echo o >/proc/sysrq-trigger
    sleep 60
}

# outcome STEP COMMAND... - run it and tell how it ended, with the first line of what it said.
outcome() {
    step=$1
    shift
    tell "$step" started
    if said=$("$@" 2>&1); then
        tell "$step" ok
    else
        tell "$step" "failed: $(echo "$said" | head -n 1)"
        return 1
    fi
}

# await SECONDS COMMAND... - until the command is true.
await() {
    left=$(($1 * 5))
    shift
    until "$@"; do
        left=$((left - 1))
        [ "$left" -gt 0 ] || return 1
        sleep 0.2
    done
}

send() {
    echo "@ data $1 $(stat -c %s "$2")" >&3
    cat "$2" >&3
}

# What never ends must end here; the machine still works and can say so.
(
    sleep "$LIMIT_SECONDS"
    tell hung "after $LIMIT_SECONDS s"
    echo w >/proc/sysrq-trigger
    power_cut
) &
# On a clock that jumps over idle time the kernel's own limit of 120 s is no sign of anything.
echo 0 >/proc/sys/kernel/hung_task_timeout_secs

for module in /modules/*; do
    # A module that can't be loaded here will be missed by a later step, which says so.
    insmod "$module" 2>/dev/null
done
await 10 test -b /dev/vda || { tell disk "failed: no /dev/vda"; power_off; }
tell ready ok

# The cluster: one folder in configfs, one for each node, one for the heartbeat area.
join_cluster() {
    ip link set lo up
    mount -t configfs none /sys/kernel/config || return
    cluster=/sys/kernel/config/cluster/$CLUSTER
    mkdir "$cluster" || return
    # The sectors of nodes that are not configured are never looked at.
    for number in $NODES; do
        folder=$cluster/node/node$number
        mkdir "$folder" || return
        echo 7777 >"$folder/ipv4_port"
        echo "127.0.$number.1" >"$folder/ipv4_address"
        echo "$number" >"$folder/num"
        if [ "$number" = "$NODE" ]; then echo 1 >"$folder/local"; fi
    done
    # No other node lives, so nobody is to be declared dead; and this one may be late without harm.
    echo 100000 >"$cluster/heartbeat/dead_threshold"
    region=$cluster/heartbeat/$UUID
    mkdir "$region" || return
    echo 512 >"$region/block_bytes"
    echo "$HEARTBEAT_SECTOR" >"$region/start_block"
    echo 255 >"$region/blocks"
    exec 9<>/dev/vda
    # Comes back when the heartbeat is steady.
    echo 9 >"$region/dev"
}

if ! join_cluster 2>/tmp/why; then
    tell heartbeat "failed: $(head -n 1 /tmp/why)"
    power_off
fi
tell heartbeat ok

outcome mount mount -t ocfs2 -o noatime,heartbeat=local /dev/vda /mnt || power_off

# The slots of dead nodes are replayed by a thread that the mount starts.
if [ "$REPLAYS" -gt 0 ]; then
    replayed() { [ "$(dmesg | grep -c 'End replay journal')" -ge "$REPLAYS" ]; }
    tell replay started
    if await 60 replayed; then tell replay ok; else tell replay "failed: not within 60 s"; fi
fi

# list NAME - all entries: names and link targets end with NUL, the other lists are in the order of the names.
# (Not with xargs -0: busybox 1.35's mixes up names when they are many.)
list() {
    tell "list-$1" started
    cd /mnt || return
    {
        find . -xdev -print0 >/tmp/names
        find . -xdev -type f -print0 >/tmp/files
        find . -xdev -type l -print0 >/tmp/links
        find . -xdev -exec stat -c '%f %u %g %h %s %Y %n' {} + >/tmp/stats
        find . -xdev -type f -exec sha256sum {} + >/tmp/sums
        # shellcheck disable=SC2016
        find . -xdev -type l -exec sh -c 'for link; do readlink -n "$link"; printf "\0"; done' sh {} + >/tmp/targets
    } 2>/tmp/complaints
    cd /
    for part in complaints names files links stats sums targets; do send "$1-$part" /tmp/$part; done
    rm -f /tmp/names /tmp/files /tmp/links /tmp/stats /tmp/sums /tmp/targets
    tell "list-$1" ok
}

list before

if [ -n "$WORK" ]; then
    outcome work sh /work.sh
    list after
fi
if [ -n "$WORK" ] && [ -n "$CRASH" ]; then
    # What a dead node leaves besides its journal: an orphan that was open, clusters in the truncate log.
    exec 8>/mnt/nameless
    dd if=/dev/urandom bs=64k count=10 2>/dev/null >&8
    rm /mnt/nameless /mnt/by-linux/large /mnt/by-linux/piece-1
fi
if [ -n "$MARKER" ]; then
    # The sync of this file takes along all that was done before it.
    leave_marker() { echo "node $NODE, Linux $(uname -r)" | dd of="/mnt/$MARKER" conv=fsync; }
    outcome marker leave_marker
fi
if [ -n "$CRASH" ]; then
    tell crash ok
    power_cut
fi
outcome unmount umount /mnt
# Ends the heartbeat, which clears this node's sector.
rmdir "$region"
exec 9>&-
power_off
