# What every script here shares: where things are kept, how a step is shown, what a run needs.
# Sourced, never run. It sets `set -euo pipefail` for the script that sources it.
set -euo pipefail

REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
DARTER_CACHE=${DARTER_CACHE:-/var/cache/darter}
export DARTER_CACHE
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$DARTER_CACHE/target}
export DARTER_BIN=${DARTER_BIN:-$CARGO_TARGET_DIR/release}
# Pinned: what the tests say about a client, they say about this version of it.
CONTAINERD_VERSION=2.4.2
CONTAINERD17_VERSION=1.7.35
CONTAINERD20_VERSION=2.0.14
NERDCTL_VERSION=2.3.5
CRICTL_VERSION=1.36.0
CRITEST_VERSION=1.36.0
SCHEMATHESIS_VERSION=4.32.5
export DARTER_CONTAINERD2=$DARTER_CACHE/tools/containerd-$CONTAINERD_VERSION
export DARTER_CONTAINERD17=$DARTER_CACHE/tools/containerd-$CONTAINERD17_VERSION
export DARTER_CONTAINERD20=$DARTER_CACHE/tools/containerd-$CONTAINERD20_VERSION
export DARTER_NERDCTL=$DARTER_CACHE/tools/nerdctl-$NERDCTL_VERSION/nerdctl
export DARTER_PROMTOOL=$DARTER_CACHE/tools/promtool/promtool
export DARTER_CRICTL=$DARTER_CACHE/tools/crictl-$CRICTL_VERSION/crictl
export DARTER_CRITEST=$DARTER_CACHE/tools/critest-$CRITEST_VERSION
export DARTER_SCHEMATHESIS=$DARTER_CACHE/tools/schemathesis-$SCHEMATHESIS_VERSION/bin/schemathesis
SUITE=suite-$CONTAINERD_VERSION-$(cat "$REPOSITORY"/integration/go/testsuite/* | sha256sum | cut -c 1-12)
LOG=${LOG:-/dev/null}

die() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 1
}

# start_log NAME: everything that steps print goes to a file whose name is shown.
start_log() {
    local folder=${DARTER_LOGS:-/var/log/darter}
    mkdir -p "$folder"
    LOG=$folder/$1-$(date +%Y%m%d-%H%M%S).log
    export LOG
    : >"$LOG"
    printf 'details: %s\n' "$LOG"
}

# step "what it does" command...: one line with a mark and a time; the command's words go to the log.
step() {
    local words=$1 started=$SECONDS
    shift
    [ -t 1 ] && printf '  … %s' "$words"
    printf '\n=== %s\n' "$words" >>"$LOG"
    if "$@" >>"$LOG" 2>&1 </dev/null; then
        [ -t 1 ] && printf '\r\033[K'
        printf '  ✓ %-58s %5ds\n' "$words" $((SECONDS - started))
        return
    fi
    [ -t 1 ] && printf '\r\033[K'
    printf '  ✗ %-58s %5ds\n' "$words" $((SECONDS - started))
    tail -n 25 "$LOG" | sed 's/^/    /' >&2
    printf '  the whole log: %s\n' "$LOG" >&2
    return 1
}

need_root() {
    [ "$(id -u)" = 0 ] || die "run it as root: it mounts, and makes network namespaces"
}

# The pinned toolchain is found by cargo itself; only its folder may be missing from the path.
find_cargo() {
    if ! command -v cargo >/dev/null && [ -x "${CARGO_HOME:-$HOME/.cargo}/bin/cargo" ]; then
        PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH
        export PATH
    fi
    command -v cargo >/dev/null
}
