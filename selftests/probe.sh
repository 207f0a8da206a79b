#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# The guest cannot tell: the payload's correctness probe prints, byte for byte, the same with the module absent, on and
# in mode check, at every depth; and check finds no mismatch. MATRYOSHKA_PROBE_DEPTHS says which depths.
. "$(dirname "$0")/lib.sh"

depths=${MATRYOSHKA_PROBE_DEPTHS:-1 2}

# probe DEPTH: runs it with each config; a log for each in $TMP/DEPTH.
probe() {
	mkdir -p "$TMP/$1"
	bench_test --depth "$1" --config stock,l0,check --log "$TMP/$1"
}

# detoured DEPTH: runs it with the paths on, and one call in three of those that nested_switch could answer sent to the
# stock code, chosen at random.
detoured() {
	echo "3 $1" >"$SYS/detour" || return 1
	bench_test --depth "$1" --config l0 --log "$TMP/$1/detour"
	_status=$?
	echo 0 >"$SYS/detour"
	return $_status
}

detours() { sed -n 's/^detour //p' "$SYS/paths/nested_switch/fallbacks"; }

begin
need_guest
# shellcheck disable=SC2086 # words
set -- $depths
plan $(($# * 10 + 6))
for depth; do
	check "depth $depth: the probe runs and finds what the SDM says" probe "$depth"
	say "depth $depth: $(wc -l <"$TMP/$depth/stock.log" 2>/dev/null || echo 0) lines of answers"
	check "depth $depth: there are answers" test -s "$TMP/$depth/stock.log"
	check "depth $depth: the same with the paths on" same_log "$TMP/$depth/stock.log" "$TMP/$depth/l0.log"
	check "depth $depth: the same in mode check" same_log "$TMP/$depth/stock.log" "$TMP/$depth/check.log"
	# The last config leaves the module as it was for it.
	check "depth $depth: check compared something" at_least checked 1 "$(counter checked)"
	check "depth $depth: and found no mismatch" equal mismatches 0 "$(mismatches)"
	if [ "$depth" = "$1" ]; then
		for path in fields vmptrld l2fields prefault direct nested_switch; do
			check "depth $depth: so did the path $path" at_least checked 1 "$(cat "$SYS/paths/$path/checked")"
		done
	fi
	check "depth $depth: it runs with detours" detoured "$depth"
	check "depth $depth: the same with detours" same_log "$TMP/$depth/stock.log" "$TMP/$depth/detour/l0.log"
	check "depth $depth: there were detours" at_least detours 1 "$(detours)"
	check "depth $depth: and no mismatch after them" equal mismatches 0 "$(mismatches)"
	! loaded || unload
done
finish
