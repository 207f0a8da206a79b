#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# The guest cannot tell: the payload's correctness probe prints, byte for byte, the same with the module absent, on and
# in mode check, at every depth; and check finds no mismatch. MATRYOSHKA_PROBE_DEPTHS says which depths, MATRYOSHKA_PROBE_CHECK at
# which of them mode check is run: it takes longest there where there is least that other tests do not check as well.
. "$(dirname "$0")/lib.sh"

depths=${MATRYOSHKA_PROBE_DEPTHS:-1 2}
checked=${MATRYOSHKA_PROBE_CHECK:-1}

is_checked() { case " $checked " in *" $1 "*) return 0 ;; *) return 1 ;; esac; }

# probe DEPTH: runs it with each config; a log for each in $TMP/DEPTH.
probe() {
	_configs=stock,l0
	! is_checked "$1" || _configs=$_configs,check
	mkdir -p "$TMP/$1"
	bench_test --depth "$1" --config "$_configs" --log "$TMP/$1"
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
cases=6
for depth; do
	cases=$((cases + 7))
	! is_checked "$depth" || cases=$((cases + 3))
done
is_checked "$1" || cases=$((cases - 6))
plan $cases
for depth; do
	check "depth $depth: the probe runs and finds what the SDM says" probe "$depth"
	say "depth $depth: $(wc -l <"$TMP/$depth/stock.log" 2>/dev/null || echo 0) lines of answers"
	check "depth $depth: there are answers" test -s "$TMP/$depth/stock.log"
	check "depth $depth: the same with the paths on" same_log "$TMP/$depth/stock.log" "$TMP/$depth/l0.log"
	if is_checked "$depth"; then
		check "depth $depth: the same in mode check" same_log "$TMP/$depth/stock.log" "$TMP/$depth/check.log"
		# The last config leaves the module as it was for it.
		check "depth $depth: check compared something" at_least checked 1 "$(counter checked)"
		check "depth $depth: and found no mismatch" equal mismatches 0 "$(mismatches)"
	fi
	if [ "$depth" = "$1" ] && is_checked "$depth"; then
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
