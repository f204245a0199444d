# What the scripts of darter-snapshotter's packages ask before they stop or remove anything; scripts/package puts it into them.

# in_use ROOT: where something is mounted that rests on snapshots below ROOT: roots of containers, a line each.
in_use() {
    local id parent device source place options
    while read -r id parent device source place options; do
        case "$place" in "$1"/*) continue ;; esac
        case "$options" in
            *" - fuse.darter "* | *" - overlay "*"=$1/"* | *" - overlay "*":$1/"*) echo "$place" ;;
        esac
    done </proc/self/mountinfo
}

# The folder that the configuration names.
root() {
    local found
    found=$(sed -n 's/^root *= *"\(.*\)".*/\1/p' /etc/darter/snapshotter.toml 2>/dev/null || true)
    echo "${found:-/var/lib/darter}"
}

# refuse_in_use ROOT: says what is in use and how to end that.
refuse_in_use() {
    local used
    used=$(in_use "$1")
    [ -n "$used" ] || return 0
    {
        echo "darter-snapshotter: containers use images that it serves, and would lose their files:"
        echo "$used" | sed 's/^/  /'
        echo "Stop and remove these containers (Kubernetes: docs/operate.md, The way back), run \`darter drain\` (package darter) if their"
        echo "images are to stay, then try again."
    } >&2
    return 1
}

# served ROOT: where Darter's own file systems are mounted below ROOT, a line each. What else is mounted there is not ours.
served() {
    local id parent device source place options
    while read -r id parent device source place options; do
        case "$place" in
            "$1"/*) case "$options" in *" - fuse.darter "*) echo "$place" ;; esac ;;
        esac
    done </proc/self/mountinfo
}

# detach ROOT: unmounts what no daemon serves any longer, without a look at it: nobody would answer.
detach() {
    # It also ends the process that keeps mounts where systemd doesn't.
    if [ -x /usr/bin/darter-snapshotter ]; then
        darter-snapshotter unmount --force || true
    fi
    served "$1" | while read -r place; do
        umount -cl "$place" || true
    done
}

# wipe ROOT: removes it, but nothing that is mounted below, and not at all while a file system of Darter's is: whoever looks
# into one that nobody serves hangs for ever.
wipe() {
    if [ -n "$(served "$1")" ]; then
        echo "darter-snapshotter: $1 is left as it is: $(served "$1" | tr '\n' ' ')can't be unmounted" >&2
        return 1
    fi
    rm -rf --one-file-system "$1" || echo "darter-snapshotter: the rest of $1 is left" >&2
}
