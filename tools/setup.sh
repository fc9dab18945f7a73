#!/bin/sh
# Make the virtual environment .venv, and install what the tests want from Debian where that is possible.
#
#   tools/setup.sh demo    what `make demo` needs
#   tools/setup.sh dev     everything but the next
#   tools/setup.sh vm      what `make vm-check` needs (Linux in a virtual machine)
#
# Needs a POSIX shell and a Python of at least 3.11 (the newest found, or what PYTHON names). Does nothing, and says nothing, when all is in place:
# stamp files in .venv hold a hash of what it was made from. Python packages come from the hash-locked
# requirements files only; the index is whatever this machine's pip is set up to use.
set -eu
cd -- "$(dirname -- "$0")/.."

kind=${1:-}
without='tests that want these skip'
case $kind in
    demo) requirements=requirements.txt debian='e2fsprogs' ;;
    dev) requirements=requirements-dev.txt
         # e2fsprogs and ocfs2-tools judge our file systems; gcc and the multilib parts build the C client for 64 and 32 bits;
         # the two servers are what `make bench` compares with. kmod is there for mkfs.ocfs2: it runs modprobe, and where
         # there is none its child goes on as a second mkfs, and the whole fails. file and util-linux (mkswap, blkid) judge
         # swap areas.
         debian='e2fsprogs ocfs2-tools kmod gcc libc6-dev gcc-multilib redis-server memcached file util-linux' ;;
    vm) requirements=requirements.txt
        debian='qemu-system-x86 seabios busybox-static kmod ocfs2-tools'
        without='make vm-check can not run without these' ;;
    *) echo "usage: tools/setup.sh demo|dev|vm" >&2; exit 64 ;;
esac

venv=.venv
log=.cache/setup.log
mkdir -p .cache
say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 69; }

# Run a command quietly; when it fails, show what it said.
quietly() {
    "$@" </dev/null >"$log" 2>&1 && return 0
    cat "$log" >&2
    return 1
}

# ---- Debian packages ----

is_installed() {
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

missing_of() {
    missing=
    for package in "$@"; do
        is_installed "$package" || missing="$missing $package"
    done
    printf '%s' "${missing# }"
}

# Services that come with packages must not be started by our installing them: policy-rc.d is Debian's way to say so.
apt_install() {
    policy=/usr/sbin/policy-rc.d
    own_policy=
    if [ ! -e "$policy" ]; then
        own_policy=yes
        trap 'rm -f "$policy"' EXIT
        trap 'exit 130' INT TERM
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod 755 "$policy"
    fi
    outcome=0
    export DEBIAN_FRONTEND=noninteractive
    # The lists of this machine may be missing or stale, so they are fetched, but only when something is to install.
    { quietly apt-get -qq update &&
        quietly apt-get -qq install -y --no-install-recommends "$@"; } || outcome=$?
    if [ -n "$own_policy" ]; then rm -f "$policy"; trap - EXIT INT TERM; fi
    if [ "$outcome" = 0 ] && [ -d /run/systemd/system ]; then
        for service in redis-server memcached; do
            case " $* " in *" $service "*) systemctl --quiet disable "$service" || true ;; esac
        done
    fi
    return "$outcome"
}

install_debian_packages() {
    if ! command -v dpkg-query >/dev/null 2>&1; then
        [ -e "$venv/.stamp-$kind" ] || say "not a Debian machine: $debian are looked for and not installed; $without"
        return 0
    fi
    # shellcheck disable=SC2086
    wanted=$(missing_of $debian)
    [ -n "$wanted" ] || return 0
    if [ "$(id -u)" != 0 ]; then
        say "not installed (needs root: apt-get install $wanted); $without"
        return 0
    fi
    say "installing Debian packages: $wanted"
    # shellcheck disable=SC2086
    apt_install $wanted || say "apt-get could not install $wanted; $without"
}

# ---- Python ----

# Print "3.11.7 PATH" if PATH is a Python that will do, with a note when it can't make virtual environments.
probe_python() {
    "$1" -c 'if True:
        import importlib.util as u, sys
        if sys.version_info < (3, 11) or sys.implementation.name != "cpython" or hasattr(sys, "abiflags") and "t" in sys.abiflags:
            raise SystemExit(1)
        able = int(all(u.find_spec(m) for m in ("venv", "ensurepip")))
        print(able, "%d.%03d.%03d" % sys.version_info[:3], sys.executable)' 2>/dev/null
}

# The newest that can make a virtual environment, else the newest.
choose_python() {
    # The locked packages have been tried with these; a still newer one is taken when python3 is it.
    for name in ${PYTHON:-python3.13 python3.12 python3.11 python3 /usr/bin/python3}; do
        found=$(command -v "$name") || continue
        probe_python "$found" || true
    done | sort -r | head -n 1
}

make_venv() {
    chosen=$(choose_python)
    [ -n "$chosen" ] || die "${PYTHON:-this machine}: no CPython 3.11 or newer; install one (Debian 12: apt-get install python3 python3-venv)"
    able=${chosen%% *}
    python=${chosen#* * }
    if [ "$able" = 0 ]; then
        if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
            say "installing Debian packages: python3-venv"
            apt_install python3-venv || die "apt-get could not install python3-venv, which $python needs to make $venv"
        else
            die "$python can't make a virtual environment; install it as root: apt-get install python3-venv"
        fi
    fi
    say "making $venv with $("$python" --version) ($python)"
    rm -rf "$venv"
    quietly "$python" -m venv "$venv" || die "$python -m venv $venv failed"
}

install_python_packages() {
    want=$(cat "$requirements" pyproject.toml tools/setup.sh | sha256sum | cut -d ' ' -f 1)
    # What dev installs holds all that demo needs.
    want_dev=$(cat requirements-dev.txt pyproject.toml tools/setup.sh | sha256sum | cut -d ' ' -f 1)
    if "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        if [ "$(cat "$venv/.stamp-$kind" 2>/dev/null)" = "$want" ]; then return 0; fi
        if [ "$(cat "$venv/.stamp-dev" 2>/dev/null)" = "$want_dev" ]; then return 0; fi
    else
        make_venv
    fi
    say "installing Python packages of $requirements"
    export PIP_DISABLE_PIP_VERSION_CHECK=1
    quietly "$venv/bin/python" -m pip install -q --require-hashes -r "$requirements" ||
        die "pip could not install $requirements (above: why)"
    quietly "$venv/bin/python" -m pip install -q --no-deps --no-build-isolation -e . ||
        die "pip could not install the project itself (above: why)"
    printf '%s\n' "$want" >"$venv/.stamp-$kind"
}

# Two at a time would break each other's environment.
if command -v flock >/dev/null 2>&1; then
    exec 9>.cache/setup.lock
    flock 9
fi
install_debian_packages
install_python_packages
