#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# Two vCPUs of one guest: VMCSs go from one to the other by VMCLEAR and VMPTRLD, children with them, both work at a
# time, and one changes the bitmaps that the other's child goes by; all that while the vCPUs are moved across the
# host's processors. What they print is what they print on the stock code, staying where they are.
. "$(dirname "$0")/lib.sh"

# pair NAME OPTION...: runs the tests on two vCPUs; logs in $TMP/NAME.
pair() {
	_name=$1
	shift
	mkdir -p "$TMP/$_name"
	bench_test --depth 1 --pair --tests pair --log "$TMP/$_name" --timeout 900 "$@" \
		>"$TMP/said" 2>&1 || { cat "$TMP/said"; return 1; }
}

begin
[ "$(nproc)" -ge 2 ] || skip_all "this host has one processor (in the lab: emu run --cpus 2)"
need_guest
if thorough; then plan 7; else plan 6; fi
check "two vCPUs pass VMCSs to each other" pair still --config stock
check "and moving, with the module on and in mode check" pair moved --roam --config "$(! thorough || echo stock,)l0,check"
say "moved $(sed -n 's/^moved \([0-9]*\) .*/\1/p' "$TMP/said") times"
check "they did move" at_least times 50 "$(sed -n 's/^moved \([0-9]*\) .*/\1/p' "$TMP/said")"
! thorough || check "stock: the same as at rest" same_log "$TMP/still/stock.log" "$TMP/moved/stock.log"
check "the paths on: the same" same_log "$TMP/still/stock.log" "$TMP/moved/l0.log"
check "mode check: the same" same_log "$TMP/still/stock.log" "$TMP/moved/check.log"
check "and no mismatch" equal mismatches 0 "$(mismatches)"
finish
