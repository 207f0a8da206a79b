# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
#
# Messages, places and small tools that every part of the lab uses.

# Inside the root file system the cache is always at the same place, so that paths recorded by compilers in
# build trees stay true whoever calls.
CACHE=${MATRYOSHKA_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/matryoshka}
JOBS=${JOBS:-$(nproc 2>/dev/null || echo 2)}
LOGS=$CACHE/log

# Several checkouts may share a cache; what is built from a checkout's own sources is kept apart for each.
CHECKOUT=${MATRYOSHKA_CHECKOUT:-$(printf '%s' "$PROJECT" | sha256sum | cut -c1-6)}
export MATRYOSHKA_CHECKOUT=$CHECKOUT

say()  { printf '%s\n' "$*"; }
note() { printf 'lab: %s\n' "$*" >&2; }
warn() { printf 'lab: warning: %s\n' "$*" >&2; }

# die CAUSE [NEXT STEP]...: end with the cause and, on lines of their own, what to do about it.
die() {
	printf 'lab: error: %s\n' "$1" >&2
	shift
	[ $# -eq 0 ] || printf '     %s\n' "$@" >&2
	exit 1
}

usage_error() {
	printf 'lab: %s\nTry: scripts/lab --help\n' "$1" >&2
	exit 2
}

# In the root file system already, put there by `lab exec`?
inside() { [ -n "${MATRYOSHKA_INSIDE:-}" ]; }

# key FILE|STRING...: ten hex digits that change when a file's content or a string does.
key() {
	local item
	for item; do
		if [ -f "$item" ]; then cat -- "$item"; else printf '%s\n' "$item"; fi
	done | sha256sum | cut -c1-10
}

# write_file FILE: standard input becomes FILE, whole or not at all.
write_file() {
	cat >"$1.part.$$" && mv -f -- "$1.part.$$" "$1"
}

# A finished piece carries this mark; its absence means "begun or not there".
ready()      { [ -e "$1/.ready" ]; }
mark_ready() { date -u +%FT%TZ | write_file "$1/.ready"; }

need_x86_64() {
	[ "$(uname -m)" = x86_64 ] ||
		die "this machine is $(uname -m), and the lab needs x86-64" \
		    "Matryoshka accelerates VMX, which only x86-64 has. Use an x86-64 machine (VMX itself is not needed)."
}

# need_space GIB: refuse to begin what cannot be finished.
need_space() {
	local dir=$CACHE free
	while [ ! -d "$dir" ]; do dir=$(dirname -- "$dir"); done
	free=$(($(df -Pk -- "$dir" | awk 'NR == 2 { print $4 }') / 1048576))
	[ "$free" -ge "$1" ] ||
		die "$free GiB free in $dir, and this needs $1 GiB" \
		    "Free some space, or put the lab elsewhere: MATRYOSHKA_CACHE=/some/where scripts/lab setup"
}

# take_lock NAME: one process at a time does NAME (the set-up, one kind of build). File descriptor 9 holds the lock as
# long as any process of ours lives, so a dead one never leaves it behind.
take_lock() {
	mkdir -p -- "$CACHE" 2>/dev/null || die "cannot create $CACHE" "Choose a place with MATRYOSHKA_CACHE=."
	[ -w "$CACHE" ] || die "cannot write to $CACHE" "Choose a place with MATRYOSHKA_CACHE=, or mend its owner."
	mkdir -p -- "$CACHE/lock"
	exec 9>>"$CACHE/lock/$1"
	if ! flock -n 9; then
		note "another process is at it ($1); waiting for its end (Ctrl-C gives up)"
		flock 9
	fi
}
