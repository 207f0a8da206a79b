#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# The module comes and goes while an L2 makes hypercalls and page faults flat out: no guest is lost, no warning, no
# leak. MATRYOSHKA_STRESS_ROUNDS says how often (settings: stress_rounds).
. "$(dirname "$0")/lib.sh"

rounds=${MATRYOSHKA_STRESS_ROUNDS:-$(setting stress_rounds)}

# come_and_go N: one life of the module. Each time that hooks go costs grace periods, which a busy guest makes long, so in a
# long run modes are changed only now and then, and hooks go a second time in some of those lives.
come_and_go() {
	load paths=$((1 + $1 % 2)) || return 1
	# Some calls go to the stock code, others do not, at random.
	echo "2 $((${MATRYOSHKA_SEED:-0} + $1))" >$SYS/detour || return 1
	sleep 0.1
	_modes='on check'
	[ $(($1 % 4)) -ne 3 ] || _modes='on off check'
	[ "$rounds" -le 8 ] || [ $(($1 % 8)) -eq 7 ] || [ $(($1 % 16)) -eq 0 ] || _modes=
	for _mode in $_modes; do
		set_mode "$_mode" || return 1
		sleep 0.05
	done
	# The counters are read while they are written.
	cat $SYS/paths/*/* $SYS/vcpus >/dev/null
	differing=$((differing + $(mismatches)))
	taken=$((taken + $(counter taken)))
	unload
}

many() {
	_n=0
	while [ "$_n" -lt "$1" ]; do
		come_and_go "$_n" || { echo "in round $_n"; return 1; }
		_n=$((_n + 1))
		# Descriptor 3 is the test's own output: whoever waits wants to see that it goes on.
		[ $((_n % 2)) -ne 0 ] || say "round $_n of $1, $(guests_run a) guests so far" >&3
	done
}

exec 3>&1
begin
need_guest
plan 7
differing=0 taken=0

# Everything that is allocated once is allocated by now.
guest 1 "$BUSY" >/dev/null 2>&1
many 2 >/dev/null
slab_objects >"$TMP/slab-before"
vmalloc_before=$(vmalloc_bytes)

mark_log
keep_busy a
sleep 0.5
check "the module is loaded and unloaded $rounds times under load" many "$rounds"
stop_busy
say "$(guests_run a) guests ran meanwhile; the path answered $taken calls"
check "no guest was lost" no_guest_lost
check "guests did run" at_least guests 1 "$(guests_run a)"
check "the path did answer" at_least taken 1 "$taken"
check "without a mismatch" equal mismatches 0 "$differing"

slab_objects >"$TMP/slab-after"
vmalloc_after=$(vmalloc_bytes)
check "no slab cache grew with the rounds" grown "$TMP/slab-before" "$TMP/slab-after" "$((rounds > 16 ? rounds : 16))"
check "nor did vmalloc" at_least 'bytes of room' 0 $((vmalloc_before + 524288 - vmalloc_after))
finish
