#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# What a VMM may do to memory while its guest's guest faults on it: memory slots made, moved and deleted and
# page tables copied (fork) beside it all the time; pages handed out by a thread through userfaultfd; both with the log
# of writes switched on and off. What the guest prints is what it prints on stock code, left in peace, and EPT02 never
# has more than it may.
. "$(dirname "$0")/lib.sh"

# Not ept_around and ept_edits: they use old entries as long as nobody invalidates them, which KVM does when slots change.
TESTS=ept_pages,ept_logging,ept_resume

# groups NAME OPTION...: runs them with each config; logs in $TMP/NAME.
groups() {
	_name=$1
	shift
	mkdir -p "$TMP/$_name"
	bench_test --depth 1 --tests "$TESTS" --set prefault/walk=256 --log "$TMP/$_name" --timeout 900 "$@" \
		>"$TMP/said" 2>&1 || { cat "$TMP/said"; return 1; }
}

# said WHAT: the number after WHAT in what the last run said.
said() { sed -n "s/^$1 \([0-9]*\) .*/\1/p" "$TMP/said"; }

crowd() {
	mkdir -p "$TMP/crowd"
	bench_test --depth 1 --crowd --tests ept_crowd --config "stock,l0$(! thorough || echo ,check)" --set prefault/walk=256 \
		--log "$TMP/crowd" --timeout 900 >"$TMP/said" 2>&1 || { cat "$TMP/said"; return 1; }
}

# no_dearer: no kind of a crowd takes more instructions with the paths on. They are all processors' only if the host has one.
no_dearer() {
	sed -n 's,^\([a-z0-9]*\): ept_crowd/\([a-z ]*\): \([0-9]*\) instructions.*,\2:\1:\3,p' "$TMP/said" | awk -F: '
		{ n[$1 ":" $2] = $3; kinds[$1] = 1 }
		END {
			for (k in kinds) {
				print k ": stock " n[k ":stock"] ", l0 " n[k ":l0"]
				if (n[k ":l0"] + 0 == 0 || n[k ":l0"] > n[k ":stock"]) bad = 1
			}
			exit bad
		}'
}

begin
need_guest
configs=l0
! thorough || configs='l0 check'
if thorough; then plan 19; else plan 11; fi
check "four vCPUs touch the same pages at once, with the module absent and on" crowd
if is_instrumented; then
	skip "and take no more instructions with it" "KASAN's checks are in the kernel and not all alike in C and Rust"
elif [ "$(nproc)" -eq 1 ]; then
	check "and take no more instructions with it" no_dearer
	no_dearer | while read -r line; do say "$line"; done
else
	skip "and take no more instructions with it" "this host has several processors, whose instructions are not counted"
fi
check "left in peace, stock" groups still --config stock
if thorough; then
	check "slots come and go, with the module absent" groups churn --config stock --churn
	check "stock: the same" same_log "$TMP/still/stock.log" "$TMP/churn/stock.log"
fi
for config in $configs; do
	check "slots come and go: $config" groups churn --config $config --churn
	say "churned $(said churned) times"
	check "they did" at_least churned 20 "$(said churned)"
	check "$config: the same" same_log "$TMP/still/stock.log" "$TMP/churn/$config.log"
	check "$config: EPT02 has nothing that it may not" equal violations 0 "$(walked all_violations)"
	check "$config: no mismatch" equal mismatches 0 "$(mismatches)"
	unload
done
check "pages from userfaultfd" groups missing --config "l0$(! thorough || echo ,check)" --userfaultfd
say "handed out $(sed -n 's/^handed out \([0-9]*\) .*/\1/p' "$TMP/said") pages"
check "they were" at_least pages 1000 "$(sed -n 's/^handed out \([0-9]*\) .*/\1/p' "$TMP/said")"
check "l0: the same" same_log "$TMP/still/stock.log" "$TMP/missing/l0.log"
! thorough || check "check: the same" same_log "$TMP/still/stock.log" "$TMP/missing/check.log"
finish
