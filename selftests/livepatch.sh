#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# A livepatch takes functions of KVM over, some of which the module hooks: every call reaches the patch, as it does without the module, the
# guest sees no difference, and the module answers again when the patch is gone. Either may come first, and the patch may come
# and go while guests run.
. "$(dirname "$0")/lib.sh"

PATCH=$SELFTESTS/test_modules/mtk_livepatch.ko
KLP=/sys/kernel/livepatch/mtk_livepatch
CALLS=/sys/module/mtk_livepatch/parameters

at_end() { ! patched || unpatch; }

patched() { [ -d /sys/module/mtk_livepatch ]; }

# until_true COMMAND...: waits for tasks to go over to the patch or back, a minute at most.
until_true() {
	for _tenth in $(seq 600); do
		! "$@" || return 0
		sleep 0.1
	done
	echo "still not after a minute: $*"
	return 1
}

in_force() { [ "$(cat $KLP/transition)" = 0 ] && [ "$(cat $KLP/enabled)" = 1 ]; }
out_of_force() { [ ! -d $KLP ]; }

patch() { insmod "$PATCH" && until_true in_force; }
unpatch() { echo 0 >$KLP/enabled && until_true out_of_force && rmmod mtk_livepatch; }

# calls OPS: runs a guest; what the patch counted meanwhile, a line for each function, in $TMP/calls.
calls() {
	for _file in "$CALLS"/calls_*; do echo 0 >"$_file"; done
	guest 1 "$1" || return 1
	(cd "$CALLS" && grep -H . calls_*) >"$TMP/calls"
}

# same_calls: the guest runs, and every function is called as often as without the module.
same_calls() {
	calls ops=hypercall:400 || return 1
	same_log "$TMP/calls-stock" "$TMP/calls"
}

answers() {
	_taken=$(counter taken)
	guest 1 ops=hypercall:400 || return 1
	at_least taken $((_taken + 400)) "$(counter taken)"
}

waits() {
	state_is 'waiting: livepatch mtk_livepatch changes KVM' && equal attached 0 "$(attached)"
}

# come_and_go N: the patch, N times.
come_and_go() {
	for _round in $(seq "$1"); do
		patch && unpatch || { echo "in round $_round"; return 1; }
		say "round $_round of $1, $(guests_run a) guests so far" >&3
	done
}

programs() { bench_test --tests fuzz --depth 1 --seed 1 --programs 20 --config stock,l0,check --log "$TMP/programs" --timeout 600; }

begin
need_guest
[ -d /sys/kernel/livepatch ] || skip_all "no livepatches on this kernel (CONFIG_LIVEPATCH)"
[ -f "$PATCH" ] || skip_all "$PATCH is not built: make -C selftests/test_modules"
plan 30

check "the patch comes without the module" patch
check "and counts calls" calls ops=hypercall:400
cp "$TMP/calls" "$TMP/calls-stock"
sed 's/^/# stock: /' "$TMP/calls-stock"
check "of every function" equal functions "$(grep -c . "$TMP/calls-stock")" "$(grep -c ':[1-9]' "$TMP/calls-stock")"
check "the module comes second, all paths on" load paths=1
check "it stands back, and says why" waits
check "every call reaches the patch" same_calls
check "a mode is taken down" set_mode check
check "and waits" waits
check "every call reaches the patch" same_calls
set_mode on
check "the patch goes" unpatch
check "the paths are on again" state_is active
check "and answer" answers

check "the patch comes second" patch
check "the module stands back" waits
check "every call reaches the patch" same_calls
check "the module goes first" unload
check "which changes nothing" same_calls
check "the patch goes" unpatch

check "the module comes again" load paths=1
check "guests run" guest 1 "$BUSY"
keep_busy a 1 ops=hypercall:400
check "the patch comes and goes while guests run" come_and_go "$(setting livepatch_rounds)"
stop_busy
check "no guest was lost" no_guest_lost
check "without a mismatch" equal mismatches 0 "$(mismatches)"
check "the module answers" answers
check "the module goes" unload
check "the patch comes" patch
check "random programs see the same under it" programs
check "without and with the module" same_log "$TMP/programs/stock.log" "$TMP/programs/l0.log"
check "and in mode check" same_log "$TMP/programs/stock.log" "$TMP/programs/check.log"
check "the patch goes" unpatch
finish
