#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# /sys/kernel/matryoshka: who may do what, and what is taken.
. "$(dirname "$0")/lib.sh"

# permissions MODE FILE...
permissions() {
	_mode=$1
	shift
	for _file; do
		equal "$_file" "$_mode" "$(stat -c %a "$_file")" || return 1
	done
}

# refused TEXT: the mode stays, the writer gets an error.
refused() {
	_before=$(mode)
	# cat, because a shell's own printf may keep an error of the write to itself.
	if printf '%b' "$1" | cat 2>"$TMP/error" >"$CHECKS/mode"; then
		echo "was taken: '$1'"
		return 1
	fi
	grep -q 'nvalid argument' "$TMP/error" || { cat "$TMP/error"; return 1; }
	equal mode "$_before" "$(mode)"
}

all_refused() {
	for _text in '\n' ' ' On OFF 1 2 onn 'o n' 'on off' 'off\0' '\377\376' "$(printf '%4000s' on)x"; do
		refused "$_text" || return 1
	done
}

# taken TEXT MODE
taken() {
	printf '%b' "$1" >"$CHECKS/mode" && equal "mode after '$1'" "$2" "$(mode)"
}

all_taken() { taken on on && taken 'check\n' check && taken '  on \n' on && taken 'off' off; }

# unprivileged COMMAND: runs it without any right.
unprivileged() {
	if command -v setpriv >/dev/null 2>&1 && setpriv --reuid 65534 --clear-groups true 2>/dev/null; then
		setpriv --reuid 65534 --regid 65534 --clear-groups sh -c "$1"
	else
		# The lab's host has busybox and no user but root.
		grep -q ^nobody: /etc/passwd || [ ! -d /etc/emu ] || echo 'nobody:x:65534:65534::/:/bin/sh' >>/etc/passwd
		su -s /bin/sh nobody -c "$1"
	fi
}

numbers() {
	for _file in taken checked mismatches saved_exits; do
		grep -qE '^[0-9]+$' "$CHECKS/$_file" || { echo "$_file: $(cat "$CHECKS/$_file")"; return 1; }
	done
	if grep -vE '^[a-z_]+ [0-9]+$' "$CHECKS/fallbacks"; then return 1; fi
}

# --- the knobs of the path `fields` ---

FIELDS=$SYS/paths/fields

# knob NAME VALUE READS: what is written is taken and reads so.
knob() { printf '%b' "$2" >"$FIELDS/$1" && equal "$1" "$3" "$(cat "$FIELDS/$1")"; }

# no_knob NAME VALUE...: none of them is taken, and nothing changes.
no_knob() {
	_knob=$1
	shift
	_was=$(cat "$FIELDS/$_knob")
	for _value; do
		if printf '%b' "$_value" | cat 2>/dev/null >"$FIELDS/$_knob"; then
			echo "was taken: '$_value'"
			return 1
		fi
	done
	equal "$_knob" "$_was" "$(cat "$FIELDS/$_knob")"
}

knobs_taken() {
	knob budget 0 0 && knob budget '0x10\n' 16 && knob budget 96 96 &&
		knob window 4 4 && knob window 1024 1024 && knob window 32 32 &&
		knob pinned 'GUEST_RIP,0x6c14 guest_dr7\n' 'guest_dr7 guest_rip host_rsp' &&
		knob forbidden 0x2011 tsc_offset &&
		knob pinned '\n' '' && knob forbidden none ''
}

knobs_refused() {
	no_knob budget 97 -1 x '1 2' '\n' && no_knob window 0 3 1025 32.0 &&
		no_knob pinned guest_nothing 0xffff 'guest_rip, nothing' vm_instruction_error && no_knob forbidden '\377'
}

# learned WORD: whether the learned set of a vCPU that runs has that field.
learned() { grep -E "^[0-9]+ fields " $DEBUGFS/learned | grep -qw "$1"; }

# follows: the learned set of a vCPU that runs has what is pinned and lacks what is forbidden, when that is written.
follows() {
	_tries=0
	until learned guest_dr7 && ! learned host_rsp; do
		_tries=$((_tries + 1))
		[ "$_tries" -lt 600 ] || { cat $DEBUGFS/learned; return 1; }
		sleep 0.02
	done
}

begin
plan 23
load
check "files that only show are readable by all" permissions 444 $SYS/version $SYS/kernel_match $SYS/vcpus \
	$CHECKS/state $CHECKS/taken $CHECKS/checked $CHECKS/mismatches $CHECKS/saved_exits $CHECKS/fallbacks
check "a mode is writable by root" permissions 644 $CHECKS/mode
check "addresses are root's alone" permissions 400 $SYS/hooks
check "nobody else can set a mode" fails unprivileged "echo on >$CHECKS/mode"
check "anybody can read one" unprivileged "cat $CHECKS/mode"
check "what is no mode is refused" all_refused
check "what is a mode is taken" all_taken
check "what only shows cannot be written" fails sh -c "echo 0 >$CHECKS/taken"
check "counters are numbers" numbers
set_mode on
check "a path that is on is active" state_is active
check "and attached" at_least hooks 6 "$(attached)"
set_mode check
check "on and check share their hooks" at_least hooks 6 "$(attached)"
set_mode off
check "off detaches" equal hooks 0 "$(attached)"
check "knobs are writable by root" permissions 644 $FIELDS/budget $FIELDS/window $FIELDS/pinned $FIELDS/forbidden
check "and by nobody else" fails unprivileged "echo 1 >$FIELDS/budget"
check "they take what makes sense" knobs_taken
check "and nothing else" knobs_refused
if [ ! -e $DEBUGFS/learned ] || [ ! -f /lib/matryoshka/payload ]; then
	for about in "rules hold for a vCPU that runs" "no guest was lost" "a vCPU that is gone is not shown" \
		"an L1 with a KVM runs" "what it saved is counted"; do
		skip "$about" "needs debugfs and the payload"
	done
else
	set_mode on
	knob pinned guest_dr7 guest_dr7
	knob forbidden host_rsp host_rsp
	keep_busy a 1 ops=hypercall:2000
	check "rules hold for a vCPU that runs" follows
	stop_busy
	check "no guest was lost" no_guest_lost
	check "a vCPU that is gone is not shown" equal lines 0 "$(wc -l <$DEBUGFS/learned)"
	knob pinned '\n' ''
	knob forbidden '\n' ''
	if [ -d /lib/matryoshka/guest ]; then
		# The KVM of that L1 writes other values to learned fields on every switch; the payload does not.
		check "an L1 with a KVM runs" guest 2 ops=hypercall:40
		check "what it saved is counted" at_least saved_exits 1 "$(cat $FIELDS/saved_exits)"
	else
		skip "an L1 with a KVM runs" "needs the guests' kernel"
		skip "what it saved is counted" "needs the guests' kernel"
	fi
	set_mode off
fi
check "the version is the one that the log has of the module" equal version \
	"$(dmesg | sed -n 's/.*matryoshka: \([0-9.]*\) loaded$/\1/p' | tail -n 1)" "$(cat $SYS/version)"
finish
