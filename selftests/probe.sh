#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# The guest cannot tell: the payload's correctness probe prints, byte for byte, the same with the module absent, on and
# in mode check, at every depth; check finds no mismatch, and EPT02, walked after each group and one fault in 64, never has
# what EPT12 and the memory slots do not give. MATRYOSHKA_PROBE_DEPTHS says which depths. Mode check, calls sent to the
# stock code at random and the groups in which depth makes no difference are for the first depth, unless MATRYOSHKA_THOROUGH is set.
. "$(dirname "$0")/lib.sh"

# Not those about the checks of entry, about events one by one, and about each combination of rights and flags in EPT12.
DEEP=instructions,operands,fields,exits,memory,turns,launches,shadowing,links,copies,pages,ept_around,ept_roots,ept_resume,ept_walks,ept_pages,ept_beside

depths=${MATRYOSHKA_PROBE_DEPTHS:-1 2}

# all_at DEPTH: whether everything is done there.
all_at() { [ "$1" = "${depths%% *}" ] || thorough; }

# probe DEPTH: runs it with each config; a log for each in $TMP/DEPTH.
probe() {
	if all_at "$1"; then set -- "$1" all stock,l0,check; else set -- "$1" $DEEP stock,l0; fi
	mkdir -p "$TMP/$1"
	bench_test --depth "$1" --tests "$2" --config "$3" --set prefault/walk=64 --log "$TMP/$1"
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
cases=0
for depth; do
	cases=$((cases + 6))
	! all_at "$depth" || cases=$((cases + 9))
done
plan $((cases + 6))
for depth; do
	check "depth $depth: the probe runs and finds what the SDM says" probe "$depth"
	say "depth $depth: $(wc -l <"$TMP/$depth/stock.log" 2>/dev/null || echo 0) lines of answers"
	check "depth $depth: there are answers" test -s "$TMP/$depth/stock.log"
	check "depth $depth: the same with the paths on" same_log "$TMP/$depth/stock.log" "$TMP/$depth/l0.log"
	# The last config leaves the module as it was for it.
	say "depth $depth: $(walked all_walks) walks of EPT02, $(walked all_entries) entries"
	if [ -e "$DEBUGFS/ept02" ]; then
		check "depth $depth: EPT02 was walked" at_least all_walks 20 "$(walked all_walks)"
		check "depth $depth: and nothing in it was wrong" equal all_violations 0 "$(walked all_violations)"
	else
		skip "depth $depth: EPT02 was walked" "debugfs is not mounted or locked down"
		skip "depth $depth: and nothing in it was wrong" "debugfs is not mounted or locked down"
	fi
	if all_at "$depth"; then
		check "depth $depth: the same in mode check" same_log "$TMP/$depth/stock.log" "$TMP/$depth/check.log"
		check "depth $depth: check compared something" at_least checked 1 "$(counter checked)"
	fi
	if [ "$depth" = "$1" ]; then
		for path in fields vmptrld l2fields prefault direct nested_switch; do
			check "depth $depth: so did the path $path" at_least checked 1 "$(cat "$SYS/paths/$path/checked")"
		done
	fi
	if all_at "$depth"; then
		check "depth $depth: and found no mismatch" equal mismatches 0 "$(mismatches)"
		check "depth $depth: it runs with detours" detoured "$depth"
		check "depth $depth: the same with detours" same_log "$TMP/$depth/stock.log" "$TMP/$depth/detour/l0.log"
		check "depth $depth: there were detours" at_least detours 1 "$(detours)"
		check "depth $depth: exits were answered in KVM's inner loop" at_least reentered 100 "$(cat "$SYS/paths/vmptrld/reentered")"
		if is_before 7 3; then
			skip "depth $depth: and switches made there" "before 7.3 they are made by the handlers of the exits"
		else
			check "depth $depth: and switches made there" at_least reentered 100 "$(cat "$SYS/paths/nested_switch/reentered")"
		fi
		if is_before 7 3; then
			skip "depth $depth: faults went to the parent without a walk" "kernels before 7.3 walk EPT12 at each fault, as stock does"
		else
			check "depth $depth: faults went to the parent without a walk" at_least reflected 100 "$(cat "$SYS/paths/prefault/reflected")"
		fi
	fi
	check "depth $depth: no mismatch in the end" equal mismatches 0 "$(mismatches)"
	! loaded || unload
done
finish
