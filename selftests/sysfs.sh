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

begin
plan 14
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
check "the version is that of the module" equal version "$(cat /sys/module/matryoshka/version 2>/dev/null || cat $SYS/version)" "$(cat $SYS/version)"
finish
