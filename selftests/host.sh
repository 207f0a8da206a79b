#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# What may happen to a host under its guests: memory runs short and pages are swapped out or merged, processors go and
# come, the host is suspended, the VMM is stopped, hit by signals and killed. What guests print is what they print on
# the stock code, left in peace, and of a VMM that was killed nothing stays.
. "$(dirname "$0")/lib.sh"

# About pages that the host takes away, and about what is kept of VMCSs between exits.
MEMORY=pages,links,ept_pages,ept_resume
SWITCHES=turns,launches
KSM=/sys/kernel/mm/ksm
CGROUP=/nonexistent
# How many VMMs are killed, and what their guests are at; it takes much longer than they are given.
KILLS=8
LONG=tests=all

# groups NAME OPTION...: runs them; logs in $TMP/NAME.
groups() {
	_name=$1
	shift
	mkdir -p "$TMP/$_name"
	bench_test --depth 1 --log "$TMP/$_name" --timeout 900 "$@" >"$TMP/said" 2>&1 || { cat "$TMP/said"; return 1; }
}

# meanwhile NAME ACTIONS OPTION...: groups, with each action again and again beside it; how often is in $TMP/ACTION-times.
meanwhile() {
	_name=$1 _actions=$2
	shift 2
	rm -f "$TMP/calm"
	for _action in $_actions; do
		(
			_n=0
			while [ ! -e "$TMP/calm" ]; do
				if "$_action" >>"$TMP/$_action-said" 2>&1; then _n=$((_n + 1)); fi
				echo "$_n" >"$TMP/$_action-times"
			done
		) &
		BUSY_JOBS="${BUSY_JOBS:-} $!"
	done
	groups "$_name" "$@"
	_status=$?
	: >"$TMP/calm"
	for _job in $BUSY_JOBS; do wait "$_job"; done
	BUSY_JOBS=
	return $_status
}

how_often() { cat "$TMP/$1-times" 2>/dev/null || echo 0; }

# survives NAME PEACE CONFIGS ACTIONS OPTION...: four cases, or three without mode check. PEACE names the run that its logs
# must be the same as.
survives() {
	_run=$1 _peace=$2 _configs=$3 _all=$4
	shift 4
	check "$_run ($_all)" meanwhile "$_run" "$_all" --config "$_configs" "$@"
	for _action in $_all; do say "$_action: $(how_often "$_action") times"; done
	check "$_run: on, the same as in peace" same_log "$TMP/$_peace/stock.log" "$TMP/$_run/l0.log"
	case $_configs in
	*check*) check "$_run: mode check, the same" same_log "$TMP/$_peace/stock.log" "$TMP/$_run/check.log" ;;
	esac
	check "$_run: no mismatch" equal mismatches 0 "$(mismatches)"
}

# happened ACTION LEAST: one case.
happened() {
	case " $happens " in
	*" $1 "*) check "$1 did happen" at_least times "$2" "$(how_often "$1")" ;;
	*) skip "$1 did happen" "not possible on this host" ;;
	esac
}

vmstat() { sed -n "s/^$1 //p" /proc/vmstat; }

# --- what happens ---

reclaim() {
	sleep 0.01
	echo "16M swappiness=200" >"$CGROUP/vmm/memory.reclaim" || [ "$(vmstat pswpout)" -gt 0 ]
}

# KSM works by itself, if it is given the time for two looks at everything; this counts how often it has merged pages, or had and
# somebody has written to them since.
merge() {
	for _ in 1 2 3 4 5; do
		sleep 0.02
		[ "$(cat $KSM/pages_sharing)" -eq 0 ] || return 0
	done
	[ "$(vmstat cow_ksm)" -gt 0 ]
}

# As far as the processors and back: the last step before the firmware would take over. A VM that is just being destroyed waits for
# a worker of KVM's (kvm_arch_pre_destroy_vm() of 7.3), which may be frozen already: then the kernel gives up after a while, and says
# so with a trace. That trace alone is forgiven, not one of a task that refuses to freeze anywhere else.
FORGIVEN='/Freezing user space processes failed.*(1 tasks refusing/{
:more
$!{
/OOM killer enabled/!{
N
b more
}
}
/kvm_arch_pre_destroy_vm/d
}'
FREEZE=/sys/power/pm_freeze_timeout
suspend() {
	sleep 0.05
	echo mem >/sys/power/state
}

unplug() {
	echo 0 >"$CPU1/online" && sleep 0.03 && echo 1 >"$CPU1/online" && sleep 0.03
}

hit() {
	sleep 0.003
	# shellcheck disable=SC2046 # one for each process
	kill -STOP $(pidof matryoshka) && kill -CONT $(pidof matryoshka)
}

# killed ROUNDS: VMMs that end in the middle of whatever they are at.
killed() {
	_n=0
	while [ "$_n" -lt "$1" ]; do
		guest 1 "$LONG" >/dev/null 2>&1 &
		_guest=$!
		# From before the first entry of L1 on.
		sleep "0.$(printf %03d $((20 + _n * 37 % 160)))"
		# shellcheck disable=SC2046 # one for each process
		kill -9 $(pidof matryoshka) 2>/dev/null
		wait "$_guest"
		echo $? >>"$TMP/killed"
		_n=$((_n + 1))
	done
}

# nobody_left: no vCPU, and no memory of one. KVM frees a VM a moment after its last descriptor.
nobody_left() {
	for _ in 1 2 3 4 5 6 7 8 9 10; do
		! grep -q '^0 ' "$SYS/vcpus" || return 0
		sleep 0.1
	done
	echo "vCPUs, bytes, most: $(cat "$SYS/vcpus")"
	return 1
}

# --- preparations, and what is put back ---

PM_DELAY=/sys/module/suspend/parameters/pm_test_delay

at_end() {
	: >"$TMP/calm"
	[ -z "${SWAP:-}" ] || swapoff "$SWAP"
	[ -z "${ZRAM:-}" ] || echo 1 >/sys/block/zram0/reset
	if [ -d "$CGROUP/vmm" ]; then
		echo $$ >"$CGROUP$OWN_CGROUP/cgroup.procs" || echo $$ >"$CGROUP/cgroup.procs"
		rmdir "$CGROUP/vmm"
	fi
	[ -z "${MEMORY_ADDED:-}" ] || echo -memory >"$CGROUP/cgroup.subtree_control"
	[ -z "${MOUNTED:-}" ] || umount "$CGROUP"
	if [ -n "${KSM_RUN:-}" ]; then
		echo "$KSM_PAGES" >$KSM/pages_to_scan
		echo "$KSM_SLEEP" >$KSM/sleep_millisecs
		echo "$KSM_RUN" >$KSM/run
	fi
	[ -z "${PM_TEST:-}" ] || echo "$PM_TEST" >/sys/power/pm_test
	[ -z "${PM_TEST_DELAY:-}" ] || echo "$PM_TEST_DELAY" >$PM_DELAY
	[ -z "${FREEZE_TIMEOUT:-}" ] || echo "$FREEZE_TIMEOUT" >$FREEZE
	[ -z "${CPU1:-}" ] || echo "$CPU1_ONLINE" >"$CPU1/online"
}

# has_swap: there is some, or zram can give it; and this shell's children are in a cgroup of their own.
has_swap() {
	if ! grep -q '^/' /proc/swaps; then
		[ -b /dev/zram0 ] || modprobe zram 2>/dev/null
		# This fails if somebody uses it.
		echo 256M >/sys/block/zram0/disksize || return 1
		ZRAM=1
		mkswap /dev/zram0 && swapon /dev/zram0 || return 1
		SWAP=/dev/zram0
	fi
	OWN_CGROUP=$(sed -n 's/^0:://p' /proc/self/cgroup)
	CGROUP=/sys/fs/cgroup
	if [ ! -f $CGROUP/cgroup.controllers ]; then
		CGROUP=$TMP/cgroup
		mkdir "$CGROUP" && mount -t cgroup2 none "$CGROUP" || return 1
		MOUNTED=1
	fi
	if ! grep -qw memory "$CGROUP/cgroup.subtree_control"; then
		echo +memory >"$CGROUP/cgroup.subtree_control" || return 1
		MEMORY_ADDED=1
	fi
	mkdir "$CGROUP/vmm" && echo $$ >"$CGROUP/vmm/cgroup.procs" &&
		[ -f "$CGROUP/vmm/memory.reclaim" ]
}

begin
need_guest
! pidof matryoshka >/dev/null || skip_all "stacks run on this host, which this test would kill: end them first"
if thorough; then plan 19; else plan 18; fi
check "left in peace, stock" groups memory --tests $MEMORY --config stock
check "the same of other tests" groups switches --tests $SWITCHES --config stock

happens=
if has_swap >"$TMP/swap" 2>&1; then
	happens=reclaim
else
	sed 's/^/# /' "$TMP/swap"
	say "no swap, no zram, or no cgroup that can be told to give memory back"
fi
if [ -w $KSM/run ]; then
	KSM_RUN=$(cat $KSM/run) KSM_PAGES=$(cat $KSM/pages_to_scan) KSM_SLEEP=$(cat $KSM/sleep_millisecs)
	echo 8000 >$KSM/pages_to_scan && echo 1 >$KSM/sleep_millisecs && echo 1 >$KSM/run
	happens="$happens merge"
fi
survives scarcity memory "l0$(! thorough || echo ,check)" "$happens" --tests $MEMORY
say "pages swapped out: $(vmstat pswpout), in: $(vmstat pswpin); merged: $(cat $KSM/pages_sharing 2>/dev/null), and written to: $(vmstat cow_ksm); KSM went over everything $(cat $KSM/full_scans 2>/dev/null) times"
happened reclaim 10
if [ -n "${KSM_RUN:-}" ] && [ "$(how_often merge)" -eq 0 ]; then
	skip "merge did happen" "KSM found nothing to merge as long as it took"
else
	happened merge 1
fi
[ -z "${KSM_RUN:-}" ] || echo 2 >$KSM/run

happens=hit
if grep -q core /sys/power/pm_test 2>/dev/null && grep -qw mem /sys/power/state; then
	PM_TEST=$(sed -n 's/.*\[\(.*\)\].*/\1/p' /sys/power/pm_test) PM_TEST_DELAY=$(cat $PM_DELAY)
	# As far as the last processor and KVM's own hook, or, where there is no suspend to memory, as far as idling goes.
	case $(cat /sys/power/mem_sleep 2>/dev/null) in
	*'[s2idle]'*) echo platform >/sys/power/pm_test ;;
	*) echo core >/sys/power/pm_test ;;
	esac
	echo 0 >$PM_DELAY
	FREEZE_TIMEOUT=$(cat $FREEZE)
	echo 1000 >$FREEZE
	happens="$happens suspend"
fi
CPU1=/sys/devices/system/cpu/cpu1
if [ -w $CPU1/online ]; then
	CPU1_ONLINE=$(cat $CPU1/online)
	happens="$happens unplug"
else
	CPU1=
fi
survives unrest switches l0,check "$happens" --tests $SWITCHES --roam
happened hit 5
happened suspend 2
happened unplug 2

set_mode on
check "$KILLS VMMs are killed at whatever they are at" killed "$KILLS"
check "none had come to its end" equal VMMs "$KILLS" "$(grep -c 137 "$TMP/killed")"
check "nothing is left of them" nobody_left
check "and the next guest runs" guest 1 "$BUSY"
finish
