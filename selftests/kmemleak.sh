#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# Every test ends with a search for leaks where the kernel offers one; that search finds what leaks, names the module that did
# it, and is not silent when that module is gone. What leaks here is the kernel's own sample (CONFIG_SAMPLE_KMEMLEAK).
. "$(dirname "$0")/lib.sh"

SAMPLE=/lib/modules/$(uname -r)/kmemleak-test.ko

# listed: what kmemleak found in a search.
listed() {
	find_leaks || return 1
	cat $KMEMLEAK >"$TMP/leaks"
}

found() { leaked_by "$1" <"$TMP/leaks" >"$TMP/found"; }
objects() { grep -c '^unreferenced' "$TMP/found"; }

begin
need_guest
looks_for_leaks || skip_all "this kernel does not look for leaks (CONFIG_DEBUG_KMEMLEAK)"
[ -f "$SAMPLE" ] || skip_all "no module kmemleak-test, which leaks (in the lab: emu run --module kmemleak-test)"
# The lab has loaded it to have it there.
! grep -q '^kmemleak_test' /proc/modules || { rmmod kmemleak_test && find_leaks && forget_leaks; }
plan 9

check "a guest runs under the module, and then without" load
check "it ends well" guest 1 "$BUSY"
check "and nothing leaked" nothing_leaked
check "a module that leaks is loaded" insmod "$SAMPLE"
check "what leaked is found" listed
check "and named as the module's" found kmemleak_test
say "$(objects) objects"
check "and not as another's" fails found 'matryoshka|kvm|kvm_intel'
check "the module goes" rmmod kmemleak_test
check "and what it leaves makes a test fail" fails nothing_leaked
say "$(grep -c '^unreferenced' "$TMP/leaks") objects"
# Nobody can free them any more.
forget_leaks
finish
