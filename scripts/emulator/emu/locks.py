# SPDX-License-Identifier: GPL-2.0
"""How long the host's locks were held and waited for (scripts/profile --locks)."""

import collections
import os
import shutil
import subprocess
import sys

# Functions of the kernel that take a lock for writing or reading, and those that release it.
LOCKS = (("write", "_raw_write_lock", "_raw_write_unlock"), ("read", "_raw_read_lock", "_raw_read_unlock"))


class Uses:
    """How long something took, each time."""

    def __init__(self):
        self._lengths = collections.Counter()

    def add(self, length, times):
        """TIMES times LENGTH instructions."""
        self._lengths[length] += times

    def times(self):
        """How often."""
        return sum(self._lengths.values())

    def total(self):
        """Instructions of all."""
        return sum(length * times for length, times in self._lengths.items())

    def at(self, share):
        """The length that SHARE of all do not exceed."""
        left = share * self.times()
        for length, times in sorted(self._lengths.items()):
            left -= times
            if left <= 0:
                return length
        return 0


def report(lines, name_of, out):
    """Who held which kind of lock how long, and waited for it, from L0's first instruction to its last."""
    uses = collections.defaultdict(lambda: {"wait": Uses(), "hold": Uses()})
    for what, pair, site, length, times in lines:
        uses[LOCKS[pair][0], name_of(site)][what].add(length, times)
    print("\nlocks of L0 for reading and writing, by the function that took them, in instructions (of the whole machine)", file=out)
    print(f"  {'times':>9} {'held':>13} {'median':>9} {'99 %':>9} {'longest':>9} {'waited':>11} {'longest':>9}", file=out)
    for (kind, name), use in sorted(uses.items(), key=lambda item: -item[1]["hold"].total()):
        hold, wait = use["hold"], use["wait"]
        least = wait.at(0)
        print(f"  {hold.times():>9,} {hold.total():>13,} {hold.at(0.5):>9,} {hold.at(0.99):>9,} {hold.at(1):>9,}"
              f" {wait.total() - least * wait.times():>11,} {wait.at(1) - least:>9,}  {kind} {name}", file=out)


def functions(directory, run):
    """Where the kernel has them, as the emulator wants to be told: L0 runs with nokaslr, so another boot has them there too."""
    out = os.path.join(directory, "symbols")
    if subprocess.run([*run, "--out", out, "--", "sh", "-c", "cat /proc/kallsyms >/out/kallsyms"], check=False).returncode:
        sys.exit("profile: L0 did not come up to say where its functions are")
    with open(os.path.join(out, "kallsyms"), encoding="ascii") as f:
        known = {fields[2]: fields[0] for fields in map(str.split, f) if len(fields) == 3}
    shutil.rmtree(out)
    missing = [name for pair in LOCKS for name in pair[1:] if name not in known]
    if missing:
        sys.exit(f"profile: this kernel has no function {missing[0]}: --locks cannot be used with it")
    return ",".join(f"{known[take]}={known[release]}" for _, take, release in LOCKS)
