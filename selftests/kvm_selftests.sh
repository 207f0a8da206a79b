#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# The kernel's own KVM selftests that have to do with nested guests, with the module absent, on and in mode check, on
# this host and in an L1 of it, whose KVM has to do with L2 and L3 then.
# They are looked for in MATRYOSHKA_KVM_SELFTESTS (scripts/build-kvm-selftests makes them).
. "$(dirname "$0")/lib.sh"

where=${MATRYOSHKA_KVM_SELFTESTS:-/kvm}
config=stock
# What an L1 runs as its kernel, and the modules for it.
GUEST=/lib/matryoshka/guest

# run TEST: its status; kselftest's 4 is a skip.
run() { timeout 300 "$where/$1"; }

# verdict WHAT STATUS: a case, of a program whose output is in $TMP/output.
verdict() {
	case $2 in
	0) pass "$1" ;;
	4) skip "$1" "$(grep -i skip "$TMP/output" | head -n 1)" ;;
	*)
		tail -n 15 "$TMP/output" | sed 's/^/#   /'
		fail "$1" ;;
	esac
}

# in_l1: all of them, each with its output behind a line with its name and before one with its status.
in_l1() {
	set --
	for program in $programs; do set -- "$@" --file "$where/$program=/kvm/$program"; done
	for module in "$GUEST"/*.ko; do set -- "$@" --file "$module=/guest/${module##*/}"; done
	# shellcheck disable=SC2016 # for L1's shell
	matryoshka nest --depth 1 --linux --plain --memory 512 --timeout 900 "$@" -- sh -c '
		for module in irqbypass kvm kvm-intel; do
			[ ! -f /guest/$module.ko ] || insmod /guest/$module.ko $([ $module = kvm ] || echo nested=1)
		done
		cd /kvm && for program in $(find . -type f | sed "s|^\./||" | sort); do
			echo "@begin $program"
			timeout 300 ./$program 2>&1
			echo "@end $program $?"
		done'
}

run_all() {
	for program in $programs; do
		run "$program" >"$TMP/output" 2>&1
		verdict "$config: $program" $?
	done
	in_l1 >"$TMP/l1" 2>&1 </dev/null
	say "$config: the stack ended with status $?"
	for program in $programs; do
		sed -n "\\|^@begin $program\$|,\\|^@end $program |p" "$TMP/l1" >"$TMP/output"
		_status=$(sed -n "s|^@end $program ||p" "$TMP/output")
		[ -n "$_status" ] || cp "$TMP/l1" "$TMP/output"
		verdict "$config, in L1: $program" "${_status:-none}"
	done
}

begin
need_guest
programs=$(cd "$where" 2>/dev/null && find . -type f -perm -100 ! -name '*.o' | sed 's|^\./||' | sort) || true
[ -n "$programs" ] || skip_all "no KVM selftests in $where"
# shellcheck disable=SC2086 # words
set -- $programs
plan $(($# * 6 + 2))
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
