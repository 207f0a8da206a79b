#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# kvm_intel goes and comes under the loaded module, which waits for it and keeps what was asked for.
. "$(dirname "$0")/lib.sh"

at_end() {
	kvm_intel_loaded || load_kvm_intel
}

begin
need_guest
if ! unload_kvm_intel 2>/dev/null; then skip_all "kvm_intel is in use: end the guests that run"; fi
load_kvm_intel

rounds=${MATRYOSHKA_RELOAD_ROUNDS:-3}
plan $((10 + rounds * 4))
load
set_mode on
check "a guest runs" guest
check "and the path works for it" at_least taken 1 "$(counter taken)"
n=0
while [ "$n" -lt "$rounds" ]; do
	check "kvm_intel unloads under the module" unload_kvm_intel
	check "the path waits for it, and is still wanted" sh -c "grep -q ^waiting $CHECKS/state && grep -qx on $CHECKS/mode"
	check "kvm_intel loads again" load_kvm_intel
	check "the path is active again" state_is active
	n=$((n + 1))
done
before=$(counter taken)
check "a guest runs afterwards" guest
check "and the path works for it as before" at_least taken $((before + 1)) "$(counter taken)"
set_mode check
check "in mode check as well" guest
check "without a mismatch" equal mismatches 0 "$(mismatches)"
unload

unload_kvm_intel
check "the module loads before kvm_intel" load paths=1
check "and knows that it cannot tell yet" grep -q '^unknown' $SYS/kernel_match
load_kvm_intel
check "it is attached once kvm_intel is there" state_is active
check "a guest runs under that, too" guest
finish
