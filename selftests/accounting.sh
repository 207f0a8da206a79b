#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# Exit accounting in debugfs: exits into L0 by level and basic exit reason; off by default.
. "$(dirname "$0")/lib.sh"

# exits REASON LEVEL: how often, 0 if the reason has no line.
exits() { awk -v r="$1" -v l="$2" '$1 == r { n = $(l + 1) } END { print n + 0 }' $DEBUGFS/exits; }

switch_to() { echo "$1" >$DEBUGFS/exits_enable; }

begin
[ -d /sys/kernel/debug/kvm ] || [ -n "$(ls -A /sys/kernel/debug 2>/dev/null)" ] || skip_all "debugfs is not mounted"
need_guest
plan 12
load
check "it is off at first" equal exits_enable 0 "$(cat $DEBUGFS/exits_enable)"
guest >/dev/null 2>&1
check "and counts nothing then" equal lines 0 "$(wc -l <$DEBUGFS/exits)"
check "nor is it hooked" equal hooks 0 "$(attached)"
check "what is neither 0 nor 1 is refused" fails switch_to 2
check "words are refused" fails switch_to yes
check "it can be switched on" switch_to 1
check "then it is hooked" at_least hooks 1 "$(attached)"
check "a guest with a guest of its own runs" guest 1 ops=hypercall:100,cpuid:50
# SDM appendix C: 10 CPUID, 18 VMCALL.
check "CPUID of L1 is counted" at_least 'CPUID from L1' 50 "$(exits 10 1)"
check "VMCALL of L2 is counted" at_least 'VMCALL from L2' 100 "$(exits 18 2)"
sed 's/^/# exit /' $DEBUGFS/exits
switch_to 0
check "switched off, it is not hooked" equal hooks 0 "$(attached)"
before=$(exits 10 1)
guest 1 ops=cpuid:50 >/dev/null 2>&1
check "and counts no further" equal 'CPUID from L1' "$before" "$(exits 10 1)"
finish
