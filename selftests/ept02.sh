#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# EPT02 never has what EPT12 and the memory slots do not give: all of it is compared with them after each group of tests
# about nested EPT and at random within, and that comparison is shown to find what is planted. MATRYOSHKA_PROBE_DEPTHS
# says at which depths.
. "$(dirname "$0")/lib.sh"

GROUPS_EPT=ept_rights,ept_flags,ept_around,ept_edits,ept_roots,ept_resume,ept_walks,ept_pages,ept_logging,ept_slots,memory
# Deeper each exit takes long, and fewer groups show the same.
FEW=ept_around,ept_pages,memory
depths=${MATRYOSHKA_PROBE_DEPTHS:-1 2}

# groups DEPTH CONFIG...: runs them, with a walk after one fault in 64.
groups() {
	_depth=$1
	_config=$2
	_tests=$GROUPS_EPT
	[ "$_depth" -eq 1 ] || _tests=$FEW
	mkdir -p "$TMP/$_depth"
	bench_test --depth "$_depth" --tests "$_tests" --config "$_config" --set 'prefault/walk=64' \
		--log "$TMP/$_depth" --timeout 900
}

# seen NAME: a number of the walks since the module was loaded.
seen() { sed -n "s/^$1 //p" "$DEBUGFS/ept02"; }

planted() {
	bench_test --depth 1 --tests ept_planted --config l0 --log "$TMP/planted" --timeout 300
}

# lines WHAT NUMBER: so many lines of the planted log have WHAT.
lines() { equal "lines with '$1'" "$2" "$(grep -c "$1" "$TMP/planted/l0.log")"; }

begin
need_guest
# shellcheck disable=SC2086 # words
set -- $depths
plan $((5 + $# * 8))
check "rights are taken out of EPT12 behind KVM's back" planted
check "at each of three levels" lines 'planted at level' 3
check "and found each time" lines 'planted: [1-9][0-9]* wrong, walked' 3
check "and only then" lines ': 0 wrong, walked' 4
check "and counted" at_least all_violations 3 "$(seen all_violations)"
unload
for depth; do
	check "depth $depth: the groups about nested EPT, stock" groups "$depth" stock
	for config in l0 check; do
		check "depth $depth: with $config" groups "$depth" $config
		check "depth $depth: $config: the same" same_log "$TMP/$depth/stock.log" "$TMP/$depth/$config.log"
		say "depth $depth: $config: $(seen all_walks) walks, $(seen all_entries) entries"
		if [ $config = l0 ]; then
			check "depth $depth: EPT02 was walked" at_least all_walks 20 "$(seen all_walks)"
			check "depth $depth: nothing was wrong" equal all_violations 0 "$(seen all_violations)"
		else
			check "depth $depth: $config: nothing was wrong" equal all_violations 0 "$(seen all_violations)"
		fi
		unload
	done
done
finish
