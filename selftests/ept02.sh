#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# The walk of EPT02, which other tests rely on, finds what EPT12 does not give: rights that are taken out of EPT12 behind
# KVM's back.
. "$(dirname "$0")/lib.sh"

planted() {
	bench_test --depth 1 --tests ept_planted --config l0 --log "$TMP" --timeout 300
}

# lines WHAT NUMBER: so many lines of the log have WHAT.
lines() { equal "lines with '$1'" "$2" "$(grep -c "$1" "$TMP/l0.log")"; }

begin
need_guest
plan 5
check "rights are taken out of EPT12 behind KVM's back" planted
check "at each of three levels" lines 'planted at level' 3
check "and found each time" lines 'planted: [1-9][0-9]* wrong, walked' 3
check "and only then" lines ': 0 wrong, walked' 4
check "and counted" at_least all_violations 3 "$(walked all_violations)"
finish
