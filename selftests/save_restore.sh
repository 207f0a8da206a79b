#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# Migration cannot tell: L1 is saved and restored into a new VM, nested state and all, hundreds of times in the middle
# of its tests of VMCSs, while it has changes that memory has not and while its own guest runs. What it prints is, byte
# for byte, what it prints undisturbed on the stock code.
. "$(dirname "$0")/lib.sh"

tests=turns,launches,shadowing,links,copies,pages

# saved WHICH: how often so, in the last run.
saved() { sed -n "s/^saved and restored.*[^0-9]\([0-9]*\) $1.*/\1/p" "$TMP/said"; }

# disturbed SEED: runs the tests with each config, saving and restoring.
disturbed() {
	mkdir -p "$TMP/$1"
	matryoshka bench --test --depth 1 --tests $tests --shuffle "$1" --config stock,l0,check --log "$TMP/$1" \
		--timeout 900 >"$TMP/said" 2>&1 || { cat "$TMP/said"; return 1; }
}

begin
need_guest
plan 8
mkdir -p "$TMP/still"
check "the tests run undisturbed" matryoshka bench --test --depth 1 --tests $tests --config stock --log "$TMP/still"
check "and saved and restored, with the module absent, on and in mode check" disturbed 1
sed -n '/^saved/s/^/# /p' "$TMP/said"
check "while L1 had a VMCS that memory did not have" at_least times 50 "$(saved with)"
check "and while L2 ran" at_least times 20 "$(saved in)"
check "stock: the same as undisturbed" same_log "$TMP/still/stock.log" "$TMP/1/stock.log"
check "the paths on: the same" same_log "$TMP/still/stock.log" "$TMP/1/l0.log"
check "mode check: the same" same_log "$TMP/still/stock.log" "$TMP/1/check.log"
check "and no mismatch" equal mismatches 0 "$(mismatches)"
finish
