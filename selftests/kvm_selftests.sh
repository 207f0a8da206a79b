#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# The kernel's own KVM selftests that have to do with nested guests, with the module absent, on and in mode check.
# They are looked for in MATRYOSHKA_KVM_SELFTESTS (scripts/build-kvm-selftests makes them).
. "$(dirname "$0")/lib.sh"

where=${MATRYOSHKA_KVM_SELFTESTS:-/kvm}
config=stock

# run TEST: its status; kselftest's 4 is a skip.
run() { timeout 300 "$where/$1"; }

run_all() {
	for program in $programs; do
		case $(run "$program" >"$TMP/output" 2>&1; echo $?) in
		0) pass "$config: $program" ;;
		4) skip "$config: $program" "$(grep -i skip "$TMP/output" | head -n 1)" ;;
		*)
			tail -n 15 "$TMP/output" | sed 's/^/#   /'
			fail "$config: $program" ;;
		esac
	done
}

begin
programs=$(cd "$where" 2>/dev/null && find . -type f -perm -100 ! -name '*.o' | sed 's|^\./||' | sort) || true
[ -n "$programs" ] || skip_all "no KVM selftests in $where"
# shellcheck disable=SC2086 # words
set -- $programs
plan $(($# * 3 + 2))
run_all
load paths=1
config=on
run_all
set_mode check
config=check
run_all
check "check compared something" at_least checked 1 "$(counter checked)"
check "without a mismatch" equal mismatches 0 "$(mismatches)"
finish
