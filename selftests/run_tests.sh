#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
#
# Runs selftests as root on the host they are on, without make, and prints KTAP.
#
# usage: run_tests.sh [-l] [TEST]...
#   -l     list the tests
#   TEST   such as layout or layout.sh; all of them without one
# Exit status: 0 none failed, 1 some failed, 2 wrong usage, 4 all were skipped.

here=$(cd -- "$(dirname -- "$0")" && pwd)

# all_tests: their names, one a line.
all_tests() {
	sed -n 's/^TEST_PROGS := //p' "$here/Makefile" 2>/dev/null | tr ' ' '\n' | sed 's/\.sh$//' | grep . ||
		{ echo "run_tests.sh: no list of tests: $here/Makefile is missing or has no TEST_PROGS" >&2; return 2; }
}

case ${1:-} in
-h | --help) sed -n '4,9s/^# \{0,1\}//p' "$0"; exit 0 ;;
-l) all_tests; exit ;;
-*) echo "run_tests.sh: no such option: $1" >&2; exit 2 ;;
esac
[ $# -gt 0 ] || { all=$(all_tests) || exit; # shellcheck disable=SC2086 # words
	set -- $all; }
for name; do
	[ -f "$here/${name%.sh}.sh" ] || { echo "run_tests.sh: no such test: $name; -l lists them" >&2; exit 2; }
done

# Long runs, and hosts that run slowly, need longer.
timeout=${MATRYOSHKA_TIMEOUT:-$(sed -n 's/^timeout=//p' "$here/settings")}
status_file=$(mktemp)
trap 'rm -f "$status_file"' EXIT
number=0 passed=0 failed=0 skipped=0
echo "TAP version 13"
echo "1..$#"
for name; do
	number=$((number + 1))
	name=${name%.sh}
	title="selftests: matryoshka: $name.sh"
	began=$(cut -d. -f1 /proc/uptime)
	echo "# $title"
	# A pipe has the status of its last command, and the test's is wanted.
	{ timeout -k 10 "$timeout" sh "$here/$name.sh" 2>&1; echo $? >"$status_file"; } | awk '{ print "# " $0; fflush() }'
	status=$(cat "$status_file")
	took=$(($(cut -d. -f1 /proc/uptime) - began))
	case $status in
	0) passed=$((passed + 1)); echo "ok $number $title" ;;
	4) skipped=$((skipped + 1)); echo "ok $number $title # SKIP" ;;
	124 | 137 | 143) failed=$((failed + 1)); echo "not ok $number $title # TIMEOUT $timeout seconds" ;;
	*) failed=$((failed + 1)); echo "not ok $number $title # exit=$status" ;;
	esac
	echo "# time $took s"
done
echo "# Totals: pass:$passed fail:$failed xfail:0 xpass:0 skip:$skipped error:0"
[ "$failed" -eq 0 ] || exit 1
[ "$passed" -gt 0 ] || exit 4
