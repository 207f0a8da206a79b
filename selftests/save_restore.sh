#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# Migration cannot tell: L1 is saved and restored into a new VM, nested state and all, hundreds of times in the middle
# of its tests of VMCSs, while it has changes that memory has not and while its own guest runs. What it prints is, byte
# for byte, what it prints undisturbed on the stock code. Nor can a reset: the same with one in between, in the same vCPU.
. "$(dirname "$0")/lib.sh"

seed=${MATRYOSHKA_SEED:-1}
tests=turns,launches,shadowing,links,copies,pages
# Of a guest's guest: the same once more, so the shorter ones.
inner=turns,links

# saved WHICH: how often so, in the last run.
saved() { sed -n "s/^saved and restored.*[^0-9]\([0-9]*\) $1.*/\1/p" "$TMP/said"; }

# disturbed DEPTH TESTS SEED CONFIGS: runs the tests with each config, saving and restoring.
disturbed() {
	mkdir -p "$TMP/$1"
	bench_test --depth "$1" --tests "$2" --shuffle "$3" --config "$4" --log "$TMP/$1" \
		--timeout 900 >"$TMP/said" 2>&1 || { cat "$TMP/said"; return 1; }
}

# rebooted TESTS SEED CONFIGS: the same at depth 1, but into the VM and vCPU that it was in, after a reset.
rebooted() {
	mkdir -p "$TMP/reset"
	bench_test --depth 1 --tests "$1" --shuffle "$2" --reset --config "$3" --log "$TMP/reset" \
		--timeout 900 >"$TMP/said" 2>&1 || { cat "$TMP/said"; return 1; }
}

# undisturbed DEPTH TESTS
undisturbed() {
	mkdir -p "$TMP/still-$1"
	bench_test --depth "$1" --tests "$2" --config stock --log "$TMP/still-$1"
}

begin
need_guest
if thorough; then plan 19; else plan 11; fi
# Stock, disturbed, is the same as stock left in peace: that is about the test, and shown now and then.
thorough && stock=stock, || stock=
echo "# seed $seed: MATRYOSHKA_SEED=$seed gives the same points"
check "the tests run undisturbed" undisturbed 1 $tests
check "and saved and restored, with the module on and in mode check" disturbed 1 $tests "$seed" "${stock}l0,check"
sed -n '/^saved/s/^/# /p' "$TMP/said"
check "while L1 had a VMCS that memory did not have" at_least times 50 "$(saved with)"
check "and while L2 ran" at_least times 20 "$(saved in)"
! thorough || check "stock: the same as undisturbed" same_log "$TMP/still-1/stock.log" "$TMP/1/stock.log"
check "the paths on: the same" same_log "$TMP/still-1/stock.log" "$TMP/1/l0.log"
check "mode check: the same" same_log "$TMP/still-1/stock.log" "$TMP/1/check.log"
check "reset by the VMM and put back, with the module on" rebooted $tests "$seed" "l0$(! thorough || echo ,check)"
sed -n '/^saved/s/^/# /p' "$TMP/said"
check "while L1 had a VMCS that memory did not have" at_least times 40 "$(saved with)"
check "and while L2 ran" at_least times 20 "$(saved in)"
check "the paths on: the same" same_log "$TMP/still-1/stock.log" "$TMP/reset/l0.log"
! thorough || check "mode check: the same" same_log "$TMP/still-1/stock.log" "$TMP/reset/check.log"
# transport has a Linux, too, and every day.
if thorough; then
	check "in a guest of a Linux they run undisturbed" undisturbed 2 $inner
	check "and with that Linux saved and restored, from its boot on" disturbed 2 $inner "$seed" stock,check
	sed -n '/^saved/s/^/# /p' "$TMP/said"
	# Some 54 times in all; how many of them find it so is the seed's.
	check "while it had a VMCS that memory did not have" at_least times 5 "$(saved with)"
	check "and while L2 or L3 ran" at_least times 5 "$(saved in)"
	check "stock: the same as undisturbed" same_log "$TMP/still-2/stock.log" "$TMP/2/stock.log"
	check "mode check: the same" same_log "$TMP/still-2/stock.log" "$TMP/2/check.log"
fi
check "and no mismatch" equal mismatches 0 "$(mismatches)"
finish
