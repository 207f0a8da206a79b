#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# Loading and unloading: nothing happens until it is asked for, and nothing stays.
. "$(dirname "$0")/lib.sh"
begin
# described: every path has a state, and one that cannot work says why.
described() {
	for _path in $SYS/paths/*; do
		grep -qE '^(ready|unavailable: .+)$' "$_path/state" || { echo "$_path: $(cat "$_path/state")"; return 1; }
	done
}

plan 16

check "the module loads" load
check "it says which version it is" log_has 'matryoshka: [0-9.]+ loaded'
check "it fits this kernel" equal kernel_match yes "$(cat $SYS/kernel_match)"
check "paths are off at first" equal mode off "$(mode)"
check "a path is ready" state_is ready
check "every path is, or says why it cannot be" described
check "no hook is attached" equal hooks 0 "$(attached)"
check "no function calls into the module" equal functions 0 "$(traced)"
check "it cannot be loaded twice" fails load
check "it unloads" unload
check "its directories are gone" fails test -e $SYS -o -e $DEBUGFS

check "a parameter that is no mode is refused" fails load paths=3
check "with the parameter paths=1" load paths=1
check "paths are on" equal mode on "$(mode)"
check "and attached" at_least functions 6 "$(traced)"
unload
check "unloading detaches them" equal functions 0 "$(traced)"
finish
