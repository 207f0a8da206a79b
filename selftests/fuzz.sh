#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# Random programs, each of which does to VMX what a hypervisor can do, see the same with the module absent, on, on with one call in
# three sent to the stock code, in mode check, and while modes change at random. MATRYOSHKA_FUZZ_SEED and
# MATRYOSHKA_FUZZ_PROGRAMS say which programs; the seed is printed and gives the same ones again.
. "$(dirname "$0")/lib.sh"

seed=${MATRYOSHKA_FUZZ_SEED:-1}
programs=${MATRYOSHKA_FUZZ_PROGRAMS:-$(setting fuzz_programs)}

fuzz() { bench_test --tests fuzz --depth 1 --seed "$seed" --timeout 600 "$@"; }

# One batch: --log has the lines of the last one.
few() { fuzz --programs 250 --config "$1" --log "$TMP/$2"; }

# toggle: gives one path after the other another mode, all by chance, until $TMP/stop.
toggle() {
	_n=$seed
	while [ ! -e "$TMP/stop" ]; do
		for _path in "$SYS"/paths/*; do
			_n=$(((_n * 1103515245 + 12345) & 0x7fffffff))
			case $((_n >> 16 & 7)) in
			0) _mode=off ;;
			1) _mode=check ;;
			2 | 3 | 4) _mode=on ;;
			*) continue ;;
			esac
			echo "$_mode" 2>/dev/null >"$_path/mode" && echo >>"$TMP/toggles"
		done 2>/dev/null
		sleep 0.01
	done
}

toggled() {
	toggle &
	BUSY_JOBS=$!
	few l0 toggled
	_status=$?
	stop_busy
	return $_status
}

toggles() { wc -l <"$TMP/toggles"; }

begin
need_guest
plan 6
say "seed $seed, $programs programs"
check "the same with the module absent, on, with detours and in mode check" \
	fuzz --programs "$programs" --config stock,l0,check --detour 3
check "the module absent" few stock absent
load
check "they run while modes change" toggled
check "modes changed" at_least changes 10 "$(toggles)"
check "and they saw the same" same_log "$TMP/absent/stock.log" "$TMP/toggled/l0.log"
check "no mismatch" equal mismatches 0 "$(mismatches)"
finish
