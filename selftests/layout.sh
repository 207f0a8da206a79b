#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# A kernel whose structures differ is refused, and the message says which one. The module parameter layout_fault
# makes it expect one of its structures to be larger than it is.
. "$(dirname "$0")/lib.sh"

# refuse N: loading with that fault fails with EINVAL and names a structure, which goes to $TMP/names.
refuse() {
	mark_log
	if insmod "$MODULE" layout_fault="$1" 2>"$TMP/error"; then
		echo "was loaded"
		return 1
	fi
	grep -qi 'invalid parameters\|invalid argument' "$TMP/error" || { cat "$TMP/error"; return 1; }
	_line=$(log_has 'struct [a-z0-9_]+ has [0-9]+ bytes in this kernel and [0-9]+ where') || { log_since; return 1; }
	_name=${_line#*struct }
	_name=${_name%% *}
	if grep -qx "$_name" "$TMP/names"; then echo "named twice: $_name"; return 1; fi
	echo "$_name" >>"$TMP/names"
	! loaded || { echo "stayed loaded"; return 1; }
	log_is_quiet
}

begin
: >"$TMP/names"
# Faults beyond the last structure are none, so that it loads; halving finds out how many there are.
count=0
beyond=128
while [ $((beyond - count)) -gt 1 ]; do
	n=$(((count + beyond) / 2))
	if insmod "$MODULE" layout_fault="$n" 2>/dev/null; then
		unload
		beyond=$n
	else
		count=$n
	fi
done
plan $((count + 4))
check "the module checks structures" at_least structures 8 "$count"
n=1
while [ "$n" -le "$count" ]; do
	check "a difference in structure $n is refused" refuse "$n"
	n=$((n + 1))
done
say "named: $(tr '\n' ' ' <"$TMP/names")"
check "vcpu_vmx, nested_vmx, vmcs12 and kvm_vcpu are among them" \
	sh -c "for s in vcpu_vmx nested_vmx vmcs12 kvm_vcpu; do grep -qx \$s '$TMP/names' || { echo \$s; exit 1; }; done"
check "nothing is attached after a refusal" equal functions 0 "$(traced)"
mark_log
check "and the right module still loads" load
finish
