# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=sh
#
# What every selftest uses: KTAP output, the module, a guest to run under it, and an ear on the kernel's log.
# POSIX shell and busybox only: the lab's host has nothing else.

SELFTESTS=$(cd -- "$(dirname -- "$0")" && pwd)
SYS=/sys/kernel/matryoshka
CHECKS=$SYS/paths/checks
DEBUGFS=/sys/kernel/debug/matryoshka
TRACING=/sys/kernel/tracing

KSFT_FAIL=1
KSFT_SKIP=4

TMP=
CASES=0 PLANNED=0 PASSED=0 FAILED=0 SKIPPED=0

# --- KTAP ---

# plan N: N cases follow, and those that every test has: the kernel's log and, where the kernel looks for them, leaks.
plan() {
	PLANNED=$(($1 + 1))
	! looks_for_leaks || PLANNED=$((PLANNED + 1))
	echo "1..$PLANNED"
}

case_line() {
	CASES=$((CASES + 1))
	echo "$1 $CASES $2"
}

pass() { PASSED=$((PASSED + 1)); case_line ok "$1"; }
fail() { FAILED=$((FAILED + 1)); case_line 'not ok' "$1"; }
skip() { SKIPPED=$((SKIPPED + 1)); case_line ok "$1 # SKIP $2"; }

# say TEXT: a diagnostic line.
say() { echo "# $*"; }

# check DESCRIPTION COMMAND...: one case; what COMMAND prints is shown if it fails.
check() {
	_about=$1
	shift
	if "$@" >"$TMP/check" 2>&1; then
		pass "$_about"
	else
		_status=$?
		say "$* : status $_status"
		sed 's/^/#   /' "$TMP/check"
		fail "$_about"
	fi
}

# equal WHAT EXPECTED FOUND
equal() {
	[ "$2" = "$3" ] || { echo "$1: expected '$2', found '$3'"; return 1; }
}

# at_least WHAT LEAST FOUND
at_least() {
	[ "${3:-0}" -ge "$2" ] || { echo "$1: expected at least $2, found '$3'"; return 1; }
}

# fails COMMAND...: COMMAND must not succeed.
fails() {
	if "$@"; then echo "succeeded: $*"; return 1; fi
}

# same_log EXPECTED FOUND: says where two logs part.
same_log() {
	[ -s "$1" ] || { echo "nothing in $1"; return 1; }
	cmp -s "$1" "$2" && return
	diff -U 0 "$1" "$2" | sed -n '3,42p'
	return 1
}

# thorough: also what is left out every day, because it takes long and other cases show nearly the same
# (MATRYOSHKA_THOROUGH): stock against stock under the same disturbance, mode check where another test has it.
thorough() { [ -n "${MATRYOSHKA_THOROUGH:-}" ]; }

skip_all() {
	echo "1..0 # SKIP $*"
	exit $KSFT_SKIP
}

# --- the kernel's log ---

# What a Linux kernel prints when something is wrong in it, for grep -E and Python. scripts/emu and scripts/xen read this line, too.
COMPLAINTS='WARNING:|BUG:|BUG [^ ]+ \(|kernel BUG at|Oops|Kernel panic - |general protection|unchecked MSR access|Call Trace:|refcount_t:|blocked for more than|rcu: INFO|UBSAN|KASAN:|non-static key|nable to handle|scheduling while atomic|cut here|ftrace failed'

mark_log() {
	MARK="matryoshka selftest $$ $(cut -d' ' -f1 /proc/uptime)"
	echo "$MARK" >/dev/kmsg
}

# log_since: the log from the last mark on; all of it if the mark has been pushed out.
log_since() {
	dmesg >"$TMP/dmesg"
	if grep -qF "$MARK" "$TMP/dmesg"; then
		sed -n "/$MARK/,\$p" "$TMP/dmesg" | tail -n +2
	else
		cat "$TMP/dmesg"
	fi
}

log_has() { log_since | grep -E -- "$1"; }

# What a test knows that the kernel says by itself, as a command of sed.
FORGIVEN=

# log_is_quiet: nothing that needs a look since the mark. Lockdep looks away for good once it has complained, even before.
# Data races are for scripts/sanitize, which knows those that stock has.
log_is_quiet() {
	if log_since | sed "$FORGIVEN" | grep -E -- "$COMPLAINTS" | grep -v 'BUG: KCSAN: data-race'; then return 1; fi
	if grep -qs 'debug_locks: *0' /proc/lockdep_stats; then echo "lockdep has switched itself off"; return 1; fi
}

# is_instrumented: the compiler has put KASAN's checks into the kernel, so that numbers of instructions say nothing.
is_instrumented() { grep -q ' [tT] __asan_load8$' /proc/kallsyms; }

# --- leaks, on a kernel with kmemleak (CONFIG_DEBUG_KMEMLEAK) ---

KMEMLEAK=/sys/kernel/debug/kmemleak

looks_for_leaks() { [ -w $KMEMLEAK ]; }

# leaked_by MODULES: of a report of kmemleak on standard input, the objects with a function of one of MODULES (alternatives of
# a pattern) in their stack, and those with a function that has no name, as all functions of a module that is gone. Status 1 if
# there is none.
leaked_by() {
	awk -v named="[[]($1)[]]$" '
		function flush() { if (ours) { printf "%s", object; found = 1 } object = ""; ours = stack = 0 }
		/^unreferenced object/ { flush() }
		{ object = object $0 "\n" }
		/^  backtrace/ { stack = 1; next }
		stack && ($0 ~ named || /^ *0x[0-9a-f]+$/) { ours = 1 }
		END { flush(); exit !found }'
}

# forget_leaks: what leaked until now, as far as kmemleak has noticed, is somebody else's.
forget_leaks() { echo clear >$KMEMLEAK; }

# find_leaks: has kmemleak look for them. An object counts once it is five seconds old, has nobody who points to it, and was
# the same when it was last looked at.
find_leaks() {
	sleep 6
	echo scan >$KMEMLEAK && echo scan >$KMEMLEAK
}

# nothing_leaked: with the module out, so that nothing in it points to what it should have freed.
nothing_leaked() {
	if loaded; then unload || return 1; fi
	find_leaks || return 1
	cat $KMEMLEAK >"$TMP/leaks"
	_objects=$(grep -c '^unreferenced' "$TMP/leaks")
	[ "$_objects" -eq 0 ] || say "kmemleak has $_objects objects, whoever's they are" >&3
	fails leaked_by 'matryoshka|kvm|kvm_intel' <"$TMP/leaks"
}

# --- the module ---

loaded() { [ -d /sys/module/matryoshka ]; }

# load [PARAMETER...]
load() { insmod "$MODULE" "$@"; }

unload() { rmmod matryoshka; }

# The path `checks` is on every kernel that the module fits, so it stands for any path where one is enough.
mode() { cat "$CHECKS/mode"; }
counter() { cat "$CHECKS/$1"; }

# set_mode MODE: of every path that can work here.
set_mode() {
	for _path in "$SYS"/paths/*; do
		grep -q ^unavailable "$_path/state" || echo "$1" >"$_path/mode" || return 1
	done
}

# mismatches: of all paths together; anything but 0 is a bug.
mismatches() {
	if loaded; then
		cat "$SYS"/paths/*/mismatches | awk '{ sum += $1 } END { print sum + 0 }'
	else
		echo "not loaded"
	fi
}

state_is() { grep -q "^$1" "$CHECKS/state" || { cat "$CHECKS/state"; return 1; }; }

# is_before MAJOR MINOR: whether the kernel is older.
is_before() {
	_version=$(uname -r)
	_minor=${_version#*.}
	[ "${_version%%.*}" -lt "$1" ] || { [ "${_version%%.*}" -eq "$1" ] && [ "${_minor%%[!0-9]*}" -lt "$2" ]; }
}

# attached: how many hooks are attached.
attached() { grep -cE ' (attached|livepatched) ' "$SYS/hooks"; }

# traced: how many functions ftrace knows that call one of our trampolines.
traced() { grep -c mtk_tramp "$TRACING/enabled_functions"; }

# find_module: sets MODULE to the matryoshka.ko for this kernel. What was built comes before what was installed some time;
# the lab's host has none but the last.
find_module() {
	for MODULE in "${MATRYOSHKA_KO:-}" "$SELFTESTS/../out/modules-$(uname -r)/matryoshka.ko" "$SELFTESTS/../matryoshka.ko" \
		"/lib/modules/$(uname -r)/updates/matryoshka.ko" "/lib/modules/$(uname -r)/updates/dkms/matryoshka.ko" \
		/lib/matryoshka/matryoshka.ko; do
		[ ! -f "$MODULE" ] || return 0
	done
	return 1
}

# --- KVM ---

kvm_intel_loaded() { [ -d /sys/module/kvm_intel ]; }

# load_kvm_intel: the lab's host keeps its modules flat; any other one has modprobe.
load_kvm_intel() {
	_ko=/lib/modules/$(uname -r)/kvm_intel.ko
	if [ -f "$_ko" ]; then
		insmod "$_ko" nested=1
	else
		modprobe kvm_intel nested=1
	fi
	# devtmpfs makes the node a moment later.
	for _ in 1 2 3 4 5 6 7 8 9 10; do
		[ ! -c /dev/kvm ] || return 0
		sleep 0.1
	done
}

unload_kvm_intel() { rmmod kvm_intel; }

# --- a guest to run under it ---

# Hypercalls of an L2 and its page faults, in every way that the payload knows.
BUSY='ops=hypercall:400,touch_reflected/random:512x1,hypercall_ept:400,touch_warm/sequential:512x1'

# guest [DEPTH [OPS]]: runs the payload as L<DEPTH> with a guest of its own; its status says whether it ended well.
guest() {
	matryoshka nest --depth "${1:-1}" --plain --timeout 900 --args "${2:-ops=hypercall:100}"
}

# bench_test OPTION...: the payload's tests. How far they are goes to the test's own output, wherever the caller sends the
# rest: who watches sees that it moves, and the lab does not take the host for hung.
bench_test() {
	{
		{
			matryoshka bench --test "$@"
			echo $? >"$TMP/bench-status"
		} 2>&1 >&4 | while IFS= read -r _line; do
			case $_line in
			\[*%\]*) echo "# $_line" >&3 ;;
			*) echo "$_line" >&4 ;;
			esac
		done
	} 4>&1
	return "$(cat "$TMP/bench-status")"
}

# walked NAME: a number of the walks of EPT02 since the module was loaded.
walked() { sed -n "s/^$1 //p" "$DEBUGFS/ept02"; }

need_guest() {
	[ -c /dev/kvm ] || skip_all "no /dev/kvm: load kvm_intel"
	grep -q '[Y1]' /sys/module/kvm_intel/parameters/nested || skip_all "kvm_intel is loaded without nested=1"
	command -v matryoshka >/dev/null || skip_all "the tool matryoshka is not installed (make install, or PATH=)"
	[ -f /lib/matryoshka/payload ] || skip_all "the payload is not installed in /lib/matryoshka (make install)"
}

# keep_busy NAME [DEPTH [OPS]]: runs guests one after the other in the background until stop_busy, and notes how they end.
keep_busy() {
	(
		_n=0
		while [ ! -e "$TMP/stop" ]; do
			guest "${2:-1}" "${3:-$BUSY}" >"$TMP/guest-$1.log" 2>&1
			_status=$?
			_n=$((_n + 1))
			echo "$_n" >"$TMP/count-$1"
			if [ "$_status" -ne 0 ]; then
				{
					echo "guest $_n of $1 ended with $_status"
					tail -n 20 "$TMP/guest-$1.log"
				} >>"$TMP/lost"
				break
			fi
		done
	) &
	BUSY_JOBS="${BUSY_JOBS:-} $!"
}

# stop_busy: lets the guests that run come to their end.
stop_busy() {
	: >"$TMP/stop"
	for _job in ${BUSY_JOBS:-}; do wait "$_job"; done
	BUSY_JOBS=
	rm -f "$TMP/stop"
}

guests_run() { cat "$TMP/count-$1" 2>/dev/null || echo 0; }

no_guest_lost() {
	if [ -e "$TMP/lost" ]; then cat "$TMP/lost"; return 1; fi
}

# --- what memory is used for ---

# slab_objects: a line for each slab cache, name and objects in use, with nothing parked in per-CPU lists or waiting for
# a grace period: what is freed by RCU comes back to those lists, so they are emptied twice.
slab_objects() {
	for _pass in 1 2; do
		sleep 1
		for _cache in /sys/kernel/slab/*/shrink; do
			echo 1 >"$_cache" 2>/dev/null
		done
	done
	# Those that the module allocates from, itself or through ftrace, sysfs and debugfs. Others (address spaces, open
	# files) follow the guests that come and go meanwhile.
	awk 'NR > 2 && /^(kmalloc-|kernfs_node)/ { print $1, $2 }' /proc/slabinfo | sort
}

# vmalloc_bytes: what is allocated, without areas that are free and only wait to be unmapped in bulk.
vmalloc_bytes() { awk '!/unpurged/ { sum += $2 } END { printf "%d\n", sum }' /proc/vmallocinfo; }

# grown BEFORE AFTER LEAST: caches that hold LEAST more objects than before, which none should.
grown() {
	awk -v least="$3" 'NR == FNR { before[$1] = $2; next }
		$2 - before[$1] >= least { print $1 " grew by " $2 - before[$1]; bad = 1 }
		END { exit bad }' "$1" "$2"
}

# not_grown LEAST: no cache has LEAST more objects than in $TMP/slab-before. What the kernel frees in batches, some
# seconds after the last grace period, is waited for.
not_grown() {
	for _try in 1 2 3 4; do
		slab_objects >"$TMP/slab-after"
		if grown "$TMP/slab-before" "$TMP/slab-after" "$1" >"$TMP/grown"; then return 0; fi
	done
	cat "$TMP/grown"
	return 1
}

# setting NAME: from the settings file.
setting() { sed -n "s/^$1=//p" "$SELFTESTS/settings"; }

# --- the frame of a test ---

# restore: leaves the machine as the test found it.
restore() {
	trap '' EXIT INT TERM
	: >"$TMP/stop"
	for _job in ${BUSY_JOBS:-}; do kill "$_job" 2>/dev/null; done
	if command -v at_end >/dev/null; then at_end; fi
	if loaded; then unload; fi
	rm -rf "$TMP"
}

# begin: what must be true before any test can run.
begin() {
	echo 'TAP version 13'
	[ "$(id -u)" -eq 0 ] || skip_all "must be run as root"
	find_module || skip_all "no matryoshka.ko for kernel $(uname -r): make modules, or MATRYOSHKA_KO=FILE"
	say "module: $MODULE"
	! loaded || skip_all "the module is loaded and may be in use: rmmod matryoshka"
	grep -qw vmx /proc/cpuinfo || skip_all "this processor has no VMX"
	[ -d /sys/module/kvm_intel ] || skip_all "kvm_intel is not loaded"
	TMP=$(mktemp -d)
	exec 3>&1
	trap 'restore' EXIT
	trap 'exit 130' INT
	trap 'exit 143' TERM
	! looks_for_leaks || forget_leaks
	mark_log
}

# finish: the last cases, the totals, the exit status.
finish() {
	! looks_for_leaks || check "nothing leaked" nothing_leaked
	check "the kernel did not complain" log_is_quiet
	if [ "$CASES" -ne "$PLANNED" ]; then
		say "$CASES cases ran and $PLANNED were planned"
		FAILED=$((FAILED + 1))
	fi
	echo "# Totals: pass:$PASSED fail:$FAILED xfail:0 xpass:0 skip:$SKIPPED error:0"
	[ "$FAILED" -eq 0 ] || exit $KSFT_FAIL
	[ "$PASSED" -gt 0 ] || exit $KSFT_SKIP
	exit 0
}
