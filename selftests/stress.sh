#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# The module comes and goes while an L2 makes hypercalls and page faults flat out: no guest is lost, no warning, no
# leak. MATRYOSHKA_STRESS_ROUNDS says how often (settings: stress_rounds).
. "$(dirname "$0")/lib.sh"

rounds=${MATRYOSHKA_STRESS_ROUNDS:-$(setting stress_rounds)}

# come_and_go N: one life of the module. Each hook that comes or goes has ftrace walk all functions of the kernel, and those
# that go cost grace periods, which a busy guest makes long. So in a long run most lives have one path on, each in its turn;
# in every eighth all are on and modes change.
come_and_go() {
	if [ "$rounds" -le 8 ] || [ $(($1 % 8)) -eq 7 ]; then
		load paths=$(($1 % 3)) && whole_life "$1"
	else
		load && short_life "$1"
	fi || return 1
	# The counters are read while they are written.
	cat $SYS/paths/*/* $SYS/vcpus >/dev/null
	differing=$((differing + $(mismatches)))
	taken=$((taken + $(cat $SYS/paths/*/taken | awk '{ sum += $1 } END { print sum + 0 }')))
	unload
}

whole_life() {
	# Some calls go to the stock code, others do not, at random.
	echo "2 $((${MATRYOSHKA_SEED:-1} + $1))" >$SYS/detour || return 1
	sleep 0.05
	_modes='on check'
	[ $(($1 % 4)) -ne 3 ] || _modes='on off check'
	for _mode in $_modes; do
		set_mode "$_mode" || return 1
		sleep 0.05
	done
}

# short_life N: vmptrld does nothing without fields.
short_life() {
	set -- "$1" $SYS/paths/*
	shift $((1 + $1 % ($# - 1)))
	grep -q ^unavailable "$1/state" || echo on >"$1/mode" || return 1
	[ "${1##*/}" != vmptrld ] || echo on >$SYS/paths/fields/mode || return 1
	sleep 0.1
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

check "no slab cache grew with the rounds" not_grown "$((rounds > 16 ? rounds : 16))"
vmalloc_after=$(vmalloc_bytes)
check "nor did vmalloc" at_least 'bytes of room' 0 $((vmalloc_before + 524288 - vmalloc_after))
finish
