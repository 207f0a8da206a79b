# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
#
# What the scripts beside the lab's have in common. scripts/lab itself tells time in another way (progress.sh).

# clock SECONDS: as hours, minutes and seconds.
clock() { printf '%d:%02d:%02d' $(($1 / 3600)) $(($1 / 60 % 60)) $(($1 % 60)); }

# took NAME: seconds that it took when it was last done here, from the file $times; nothing if it never was.
# shellcheck disable=SC2154 # the caller's
took() { sed -n "s/^$1=//p" "$times" 2>/dev/null | tail -n 1; }

# note_time NAME SECONDS: for `took`.
note_time() {
	{ grep -v "^$1=" "$times" 2>/dev/null; echo "$1=$2"; } >"$times.part" && mv -- "$times.part" "$times"
}
