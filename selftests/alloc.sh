#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# Memory that runs out is no harm: each allocation of the module fails in turn, at load by the parameter alloc_fault and
# under a running guest by the debugfs file of that name, and the guest prints what it prints on the stock code.
# MATRYOSHKA_ALLOC_STEP (settings: alloc_step) says at how many of them the test looks: one in so many; 1 takes half an hour of the
# emulated host.
. "$(dirname "$0")/lib.sh"

step=${MATRYOSHKA_ALLOC_STEP:-$(setting alloc_step)}
tests=turns,shadowing
fault=$DEBUGFS/alloc_fault

# failed WHOSE: how many allocations were made to fail.
failed() { sed -n "s/^$1 [0-9]* //p" "$fault"; }

# at_load: loads with all paths on, with each allocation failing. Either loading fails or everything that could not be
# had is off; nothing may be left of either.
at_load() {
	_n=1
	_refused=0
	while [ "$_n" -le 250 ]; do
		if insmod "$MODULE" alloc_fault="$_n" paths=1 2>"$TMP/error"; then
			_fired=$(failed module)
			unload || return 1
			[ "$_fired" != 0 ] || break
		else
			grep -qi 'out of memory\|cannot allocate' "$TMP/error" || { cat "$TMP/error"; return 1; }
			! loaded || { echo "allocation $_n: stayed loaded"; return 1; }
			_refused=$((_refused + 1))
		fi
		[ "$(traced)" = 0 ] || { echo "allocation $_n: left $(traced) functions hooked"; return 1; }
		_n=$((_n + step))
	done
	# A few samples may all be of what loading can do without.
	[ "$_n" -gt 20 ] && [ "$_n" -le 250 ] && { [ "$step" -gt 4 ] || [ "$_refused" -gt 0 ]; } || { echo "$_n allocations, $_refused refused"; return 1; }
	say "loading makes $((_n - 1)) allocations; $_refused of those looked at are needed" >&3
}

# run NAME OPTION...: the tests on one vCPU; logs in $TMP/NAME.
run() {
	_name=$1
	shift
	mkdir -p "$TMP/$_name"
	bench_test --depth 1 --log "$TMP/$_name" --timeout 900 "$@" >"$TMP/said" 2>&1 ||
		{ cat "$TMP/said"; return 1; }
}

# under_guest NAME OPTION...: the same with each allocation for its vCPUs failing.
under_guest() {
	_what=$1
	shift
	_at=1
	while [ "$_at" -le 200 ]; do
		# The tool takes the module out for the stock code, and leaves it in otherwise.
		loaded || load || return 1
		_before=$(failed vcpu)
		echo "$_at" >"$fault" || return 1
		run "$_what/$_at" --config l0 "$@" || return 1
		same_log "$TMP/$_what/stock.log" "$TMP/$_what/$_at/l0.log" || { echo "allocation $_at"; return 1; }
		[ "$(failed vcpu)" != "$_before" ] || break
		_at=$((_at + step))
	done
	echo 0 >"$fault"
	[ "$_at" -gt 1 ] && [ "$_at" -le 200 ] || { echo "$_at allocations"; return 1; }
	say "$_what: $((_at - 1)) allocations" >&3
}

begin
need_guest
[ -n "$(ls -A /sys/kernel/debug 2>/dev/null)" ] || skip_all "debugfs is not mounted"
plan 8
mark_log
check "each allocation at load fails harmlessly" at_load
check "and the log is quiet" log_is_quiet
check "the module loads" load
check "the tests run on the stock code" run one --config stock --tests $tests
check "each allocation for the vCPU fails, and the guest sees nothing" under_guest one --tests $tests
if [ "$(nproc)" -ge 2 ]; then
	check "two vCPUs: on the stock code" run two --config stock --pair --tests pair
	check "each allocation for either fails" under_guest two --pair --roam --tests pair
else
	skip "two vCPUs: on the stock code" "one processor"
	skip "each allocation for either fails" "one processor"
fi
check "and the log is quiet" log_is_quiet
finish
