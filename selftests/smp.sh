#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# Two processors: guests on both, modes and the module itself changing under them.
. "$(dirname "$0")/lib.sh"

rounds=${MATRYOSHKA_STRESS_ROUNDS:-1}

modes() {
	_n=0
	while [ "$_n" -lt "$1" ]; do
		for _mode in on check off; do
			set_mode $_mode || return 1
			sleep 0.05
			cat $SYS/paths/*/* $SYS/vcpus >/dev/null || return 1
		done
		_n=$((_n + 1))
	done
}

reload() {
	_n=0
	while [ "$_n" -lt "$1" ]; do
		unload && load paths=1 || return 1
		sleep 0.1
		_n=$((_n + 1))
	done
}

begin
[ "$(nproc)" -ge 2 ] || skip_all "this host has one processor (in the lab: emu run --cpus 2)"
need_guest
plan 5
load paths=1
keep_busy a
keep_busy b
sleep 0.5
check "modes change under guests on two processors" modes "$rounds"
check "the path works for them" at_least taken 1 "$(counter taken)"
check "without a mismatch" equal mismatches 0 "$(mismatches)"
check "the module comes and goes under them" reload "$rounds"
stop_busy
say "$(guests_run a) and $(guests_run b) guests ran"
check "no guest was lost" no_guest_lost
finish
