#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# The function tracer and kprobes on the functions that the module hooks: everybody sees every call.
. "$(dirname "$0")/lib.sh"

FUNCTIONS='nested_vmx_check_controls nested_vmx_check_host_state nested_vmx_check_guest_state __vmx_guest_state_valid vmx_handle_exit'
INSTANCE=$TRACING/instances/matryoshka_test
PROBE=nested_vmx_check_host_state

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

# works CALLS: a guest runs, the path answers, and the tracer (if it is there) sees at least CALLS calls.
works() {
	_taken=$(counter taken)
	clear_trace
	guest 1 ops=hypercall:100 || return 1
	at_least taken $((_taken + 100)) "$(counter taken)" && at_least 'traced calls' "$1" "$(seen nested_vmx_check_controls)"
}

begin
need_guest
[ -f $TRACING/available_filter_functions ] || skip_all "no function tracer (CONFIG_FUNCTION_TRACER, tracefs mounted)"
[ -f $TRACING/kprobe_events ] || skip_all "no kprobe events (CONFIG_KPROBE_EVENTS)"
plan 13

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
finish
