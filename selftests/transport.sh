#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# `matryoshka save` and `restore`: a stack in the middle of its tests goes into a file and on from there, from a host with the
# module to one without and back. What it prints is, byte for byte, what it prints undisturbed; what
# cannot be saved or restored says so and loses nothing.
. "$(dirname "$0")/lib.sh"

tests=turns,shadowing,links
all_moves=${MATRYOSHKA_MOVES:-3}

# saved FILE: the running stack goes into it.
saved() { matryoshka save "$1" >>"$TMP/said" 2>&1; }

# wait_lines FILE N: until FILE has N lines, or the stack has ended.
wait_lines() {
	while [ "$(wc -l <"$1")" -lt "$2" ] && kill -0 "$STACK" 2>/dev/null; do sleep 0.05; done
}

# other_host N: the module goes or comes, as on another host.
other_host() {
	if loaded; then
		differing=$((differing + $(mismatches)))
		unload
	else
		load && set_mode "$([ $(($1 % 4)) -lt 2 ] && echo on || echo check)"
	fi
}

# travel DEPTH TIMES: the tests, from host to host; the log is in $TMP/log.
travel() {
	moves=$2
	: >"$TMP/log"
	: >"$TMP/said"
	matryoshka nest --depth "$1" --plain --timeout 900 --args tests=$tests >>"$TMP/log" 2>>"$TMP/said" &
	STACK=$!
	_n=0
	_all=$(wc -l <"$TMP/still-$1")
	while [ "$_n" -lt "$moves" ]; do
		wait_lines "$TMP/log" $(((_n + 1) * _all / (2 * moves)))
		rm -f "$TMP/stack"
		saved "$TMP/stack" || { cat "$TMP/said"; return 1; }
		wait "$STACK" || { echo "the stack did not end well"; cat "$TMP/said"; return 1; }
		other_host "$_n" || return 1
		matryoshka restore --timeout 900 "$TMP/stack" >>"$TMP/log" 2>>"$TMP/said" &
		STACK=$!
		_n=$((_n + 1))
		# It is there once it can be asked.
		while ! grep -q "@matryoshka-$STACK\$" /proc/net/unix && kill -0 "$STACK" 2>/dev/null; do sleep 0.05; done
	done
	wait "$STACK" || { echo "the last one did not end well"; cat "$TMP/said"; return 1; }
}

undisturbed() { matryoshka nest --depth "$1" --plain --timeout 900 --args tests=$tests >"$TMP/still-$1"; }

# says PATTERN COMMAND...: it fails, and its message has PATTERN.
says() {
	_pattern=$1
	shift
	if "$@" >"$TMP/said" 2>&1; then echo "succeeded: $*"; return 1; fi
	grep -q "$_pattern" "$TMP/said" || { cat "$TMP/said"; return 1; }
}

# goes_on: a stack that could not be saved has not noticed.
goes_on() {
	matryoshka nest --depth 1 --plain --timeout 900 --args "tests=$tests" >"$TMP/log" &
	STACK=$!
	wait_lines "$TMP/log" 2
	says exists matryoshka save "$TMP/stack" || return 1
	says 'No such file' matryoshka save "$TMP/nowhere/stack" || return 1
	mkdir "$TMP/small" && mount -t tmpfs -o size=64k none "$TMP/small" || return 1
	says 'No space' matryoshka save "$TMP/small/stack"
	_status=$?
	_left=$(ls "$TMP/small")
	umount "$TMP/small"
	wait "$STACK" || return 1
	[ "$_status" -eq 0 ] && equal 'left of the file' '' "$_left" && same_log "$TMP/still-1" "$TMP/log"
}

begin
need_guest
[ -r /proc/net/unix ] || skip_all "the kernel has no sockets of the family unix"
plan 12
differing=0
check "depth 1: the tests run undisturbed" undisturbed 1
check "they go from host to host $all_moves times" travel 1 "$all_moves"
check "and print the same" same_log "$TMP/still-1" "$TMP/log"
check "depth 2: the tests run undisturbed" undisturbed 2
check "a Linux with its guests goes from host to host $all_moves times" travel 2 "$all_moves"
check "and they print the same" same_log "$TMP/still-2" "$TMP/log"
check "and no path differed from the stock code" equal mismatches 0 "$differing"
check "what is not a saved stack is refused" says 'is no saved stack' matryoshka restore "$TMP/log"
head -c 3000000 "$TMP/stack" >"$TMP/cut"
check "so is half of one" says 'cut off' matryoshka restore "$TMP/cut"
check "and a stack where nobody runs one" says 'no stack runs here' matryoshka save "$TMP/none"
check "a stack that cannot be saved goes on and leaves nothing" goes_on
check "a saved stack can be restored again" matryoshka restore --timeout 900 "$TMP/stack"
finish
