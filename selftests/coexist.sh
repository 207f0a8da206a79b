#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# The function tracer and kprobes on the functions that the module hooks: everybody sees every call. Listeners to KVM's
# tracepoints in what it answers: they hear of everything.
. "$(dirname "$0")/lib.sh"

# Hooked ones, each of which a switch calls, whichever way it goes.
FUNCTIONS='sync_vmcs02_to_vmcs12 load_vmcs12_host_state nested_sync_vmcs12_to_shadow vmx_vcpu_run vmx_handle_exit'
INSTANCE=$TRACING/instances/matryoshka_test
PROBE=load_vmcs12_host_state

at_end() {
	echo 0 2>/dev/null >$INSTANCE/events/matryoshka_test/enable
	echo '-:matryoshka_test/host_state' 2>/dev/null >>$TRACING/kprobe_events
	rmdir $INSTANCE 2>/dev/null
}

trace_on() {
	mkdir $INSTANCE || return 1
	echo 8192 >$INSTANCE/buffer_size_kb
	# shellcheck disable=SC2086 # words
	echo $FUNCTIONS >$INSTANCE/set_ftrace_filter && echo function >$INSTANCE/current_tracer
}

trace_off() { echo nop >$INSTANCE/current_tracer && echo >$INSTANCE/set_ftrace_filter; }
clear_trace() { echo >$INSTANCE/trace; }
seen() { grep -cw "$1" $INSTANCE/trace; }

probe_on() {
	echo "p:matryoshka_test/host_state $PROBE" >>$TRACING/kprobe_events &&
		echo 1 >$INSTANCE/events/matryoshka_test/host_state/enable
}

probe_off() {
	echo 0 >$INSTANCE/events/matryoshka_test/host_state/enable
	echo '-:matryoshka_test/host_state' >>$TRACING/kprobe_events
}

hits() { awk '$1 == "host_state" { n = $2 } END { print n + 0 }' $TRACING/kprobe_profile; }

# works CALLS: a guest runs, the module answers, and the tracer (if it is there) sees at least CALLS calls.
works() {
	_taken=$(counter taken)
	clear_trace
	guest 1 ops=hypercall:100 || return 1
	at_least taken $((_taken + 100)) "$(counter taken)" && at_least 'traced calls' "$1" "$(seen $PROBE)"
}

# listen ON EVENT: to a tracepoint of KVM, or not any more.
listen() { echo "$1" >"$INSTANCE/events/$2/enable"; }

reflected() { cat "$SYS/paths/prefault/reflected"; }

# heard EVENT CALLS OPS: so many events at least while a guest does this.
heard() {
	clear_trace
	guest 1 "ops=$3" || return 1
	at_least "$1" "$2" "$(seen "$1:")"
}

# The child's first touch of pages, each of which goes to its parent.
FAULTS=touch_reflected/sequential:256x1

begin
need_guest
[ -f $TRACING/available_filter_functions ] || skip_all "no function tracer (CONFIG_FUNCTION_TRACER, tracefs mounted)"
[ -f $TRACING/kprobe_events ] || skip_all "no kprobe events (CONFIG_KPROBE_EVENTS)"
plan 25

check "the function tracer goes on stock functions" trace_on
check "the module attaches beside it" load paths=1
check "all its hooks" at_least functions 6 "$(traced)"
check "both see every call" works 100
check "a kprobe joins them" probe_on
before=$(hits)
check "all three see every call" works 100
check "the kprobe, too" at_least hits $((before + 100)) "$(hits)"
check "the module leaves under both" unload
check "stock KVM goes on being traced" sh -c "matryoshka nest --depth 1 --plain --args ops=hypercall:20 && grep -qw $PROBE $INSTANCE/trace"
probe_off
trace_off
clear_trace
check "the module attaches first" load paths=1
check "and the tracer comes later" sh -c "echo '$FUNCTIONS' >$INSTANCE/set_ftrace_filter && echo function >$INSTANCE/current_tracer"
check "both see every call again" works 100
trace_off
clear_trace
check "the module works on without the tracer" works 0
check "a listener to nested entries" listen 1 kvm/kvm_nested_vmenter
check "hears of each" heard kvm_nested_vmenter 100 hypercall:100
listen 0 kvm/kvm_nested_vmenter
before=$(reflected)
for event in kvm_mmu_pagetable_walk kvm_mmu_paging_element kvm_mmu_walker_error; do
	check "a listener to $event" listen 1 "kvmmmu/$event"
	check "hears of each fault" heard "$event" 256 $FAULTS
	check "none of which went another way" equal reflected "$before" "$(reflected)"
	listen 0 "kvmmmu/$event"
done
guest 1 ops=$FAULTS >/dev/null
if is_before 7 3; then
	skip "as they do when nobody listens" "kernels before 7.3 walk EPT12 at each fault, as stock does"
else
	check "as they do when nobody listens" at_least reflected $((before + 200)) "$(reflected)"
fi
finish
