# SPDX-License-Identifier: GPL-2.0
"""scripts/profile: where the instructions of one operation go, by level and function."""

import argparse
import collections
import os
import shlex
import shutil
import signal
import subprocess
import sys

from . import __main__ as emu
from . import locks, package
from .demangle import readable
from .symbols import Symbols

HELP = """\
examples:
  scripts/profile hypercall --depth 2            the operation as the benchmark does it (matryoshka bench --profile)
  scripts/profile --depth 1 --file t=/bin/t --command '/bin/t'
                                                 any program that brackets what it does with the emulator's XGETBV
                                                 codes (Documentation/lab.md)
  scripts/profile touch_warm --config l0 --locks    how long L0's locks were held and waited for as well
  scripts/profile --report out/profile           print a recorded one again

files in the output directory: profile (raw), profile.folded (stacks with counts, for flame-graph tools: flamegraph.pl, inferno,
speedscope), profile.txt (what is printed). Level is the outermost frame: L0 the host, L1 its guest, ..."""

# Frames that are how the compiler and the mitigations call, not what is called.
PLUMBING = ("__x86_indirect_thunk", "__x86_return_thunk", "srso_", "retbleed_", "__x86_indirect_call_thunk", "__x86_indirect_jump_thunk",
            "entry_untrain", "its_return_thunk")


MODULES = 0xFFFFFFFFA0000000    # where the kernel puts modules
CONFIGS = ("stock", "idle", "l0", "all")    # as matryoshka bench has them
DEEPEST = 8    # MAX_DEPTH of rust/vmm/src/stack.rs


class Profile:
    """A raw profile, read."""

    def __init__(self, path):
        self.contexts, self.nodes, self.regions, self.locks = [], [], [], []
        with open(path, encoding="ascii") as f:
            if next(f, "").strip() != "matryoshka-profile 1":
                raise ValueError(f"{path} is not a profile")
            for line in f:
                kind, *fields = line.split()
                if kind == "context":
                    self.contexts.append(int(fields[1]))
                elif kind == "node":
                    self.nodes.append((int(fields[1]), int(fields[2]), int(fields[3], 16), int(fields[4], 16)))
                elif kind == "region":
                    self.regions.append((int(fields[0]), int(fields[1]), [], []))
                elif kind == "count":
                    self.regions[-1][2].append((int(fields[0]), int(fields[1], 16), int(fields[2])))
                elif kind == "exit":
                    self.regions[-1][3].append((int(fields[0]), int(fields[1]), int(fields[2])))
                elif kind in ("wait", "hold"):
                    self.locks.append((kind, int(fields[0]), int(fields[1], 16), int(fields[2]), int(fields[3])))

    def typical(self):
        """The regions within 1 % of the median length: those no interrupt hit."""
        total = sum(times for _, times, _, _ in self.regions)
        seen, median = 0, 0
        for length, times, _, _ in self.regions:
            seen += times
            if seen * 2 >= total:
                median = length
                break
        return median, total, [r for r in self.regions if abs(r[0] - median) * 100 <= median]

    def levels(self, depth):
        """{context: level}: L0 is context 0; the DEPTH guests that started last are L1, L2, ... in that order.

        Guests sort by their TSC offset. Two levels may share one, when the inner hypervisor does not set any (the payload does
        not): the one that executes VMX instructions is the outer of the two. DEPTH 0 stands for the levels that were seen.
        """
        seen, hypervisors = set(), set()
        for _, _, counts, exits_ in self.regions:
            seen.update(self.nodes[node][1] for node, _, _ in counts)
            seen.update(context for context, _, _ in exits_)
            hypervisors.update(context for context, reason, _ in exits_ if 19 <= reason <= 27 or reason in (50, 53))
        guests = range(1, len(self.contexts))
        offsets = sorted({self.contexts[n] for n in guests if depth or n in seen}, reverse=True)
        if not offsets:
            return {0: 0}
        last = {n for n in seen if n and self.contexts[n] == offsets[-1]}
        split = bool(last & hypervisors and last - hypervisors)
        if depth:
            offsets = offsets[-max(1, depth - split):]
        found = {0: 0}
        for n in guests:
            if self.contexts[n] in offsets:
                level = offsets.index(self.contexts[n]) + 1
                if split and level == len(offsets) and n not in hypervisors:
                    level += 1
                found[n] = level
        return found


class Resolver:
    """Function names by level."""

    def __init__(self, tables):
        self._tables = tables
        self._known = {}

    def name(self, level, address):
        """What is at ADDRESS, as level LEVEL sees it."""
        key = level, address
        if key not in self._known:
            self._known[key] = self._name(level, address)
        return self._known[key]

    def _name(self, level, address):
        for table in self._tables.get(level, []):
            found = table.find(address)
            if found:
                return found[1]
        if address < 1 << 47:
            return "[user]"
        if address >= MODULES:
            return f"[module {address & ~0xFFF:x}]"
        return f"[{address & ~0xFFF:x}]"


def fold(profile, regions, levels, resolver):
    """Counts by stack: {(frame, ...): instructions}, the level first. Inlines what tail calls hide."""
    paths = {}

    def level_of(context):
        return levels.get(context, f"other guest {context}")

    def path(number):
        """Frames of a node; and its level."""
        if number in paths:
            return paths[number]
        parent, context, target, site = profile.nodes[number]
        level = level_of(context)
        if parent < 0:
            result = (f"L{level}" if isinstance(level, int) else level,), level
        else:
            frames, _ = path(parent)
            if site > 255:
                caller = resolver.name(level, site)
                if frames[-1] != caller and not caller.startswith(PLUMBING):
                    frames += (caller,)
            callee = resolver.name(level, target)
            if not callee.startswith(PLUMBING) and (frames[-1] != callee or callee == "[user]"):
                frames += (callee,) if frames[-1] != "[user]" or callee != "[user]" else ()
            result = frames, level
        paths[number] = result
        return result

    stacks = collections.Counter()
    for _, _, counts, _ in regions:
        for node, address, count in counts:
            frames, level = path(node)
            leaf = resolver.name(level, address)
            if frames[-1] != leaf and not leaf.startswith(PLUMBING):
                frames += (leaf,)
            stacks[frames] += count
    names = readable({name for frames in stacks for name in frames})
    plain = collections.Counter()
    for frames, count in stacks.items():
        plain[tuple(names.get(name, name) for name in frames)] += count
    return plain


def exits(regions, levels):
    """Exits by (level left, reason)."""
    found = collections.Counter()
    for _, _, _, entries in regions:
        for context, reason, count in entries:
            found[levels.get(context, "?"), reason] += count
    return found


REASONS = dict(enumerate("""exception_or_NMI external_interrupt triple_fault INIT SIPI IO_SMI other_SMI interrupt_window NMI_window task_switch CPUID GETSEC
HLT INVD INVLPG RDPMC RDTSC RSM VMCALL VMCLEAR VMLAUNCH VMPTRLD VMPTRST VMREAD VMRESUME VMWRITE VMXOFF VMXON CR_access MOV_DR
IO_instruction RDMSR WRMSR entry_failure_guest_state entry_failure_MSR - MWAIT monitor_trap - MONITOR PAUSE entry_failure_MCE - TPR_threshold
APIC_access virtualized_EOI GDTR_IDTR LDTR_TR EPT_violation EPT_misconfig INVEPT RDTSCP preemption_timer INVVPID WBINVD XSETBV APIC_write RDRAND INVPCID
VMFUNC ENCLS RDSEED PML_full XSAVES XRSTORS""".split()))


def report(stacks, left, times, median, total, out):
    """Writes the tree and the lists."""
    everything = sum(stacks.values()) or 1
    unit = max(times, 1)
    print(f"{median} instructions (median of {total} regions; {times} of them within 1 %, these are shown); all figures are per region", file=out)
    by_level = collections.Counter()
    own, inclusive = collections.Counter(), collections.Counter()
    tree = {}
    for frames, count in stacks.items():
        by_level[frames[0]] += count
        own[frames[0], frames[-1]] += count
        for name in set(frames[1:]):
            inclusive[frames[0], name] += count
        node = tree
        for name in frames:
            entry = node.setdefault(name, [0, {}])
            entry[0] += count
            node = entry[1]

    print("\nby level", file=out)
    for level, count in sorted(by_level.items()):
        print(f"  {level:<14}{count / unit:>12,.0f}  {count * 100 / everything:5.1f} %", file=out)
    print("\nexits into L0", file=out)
    for (level, reason), count in sorted(left.items(), key=lambda item: -item[1]):
        print(f"  from L{level:<12}{count / unit:>12,.2f}  {REASONS.get(reason, reason)}", file=out)
    for title, table in (("own instructions", own), ("with what they call", inclusive)):
        print(f"\ntop functions by {title}", file=out)
        for (level, name), count in table.most_common(40):
            print(f"  {count / unit:>12,.0f}  {count * 100 / everything:5.1f} %  {level}  {name}", file=out)

    for level in sorted(by_level)[1:]:
        print(f"\n{level}, top functions by own instructions", file=out)
        mine = collections.Counter({name: count for (of, name), count in own.items() if of == level})
        for name, count in mine.most_common(12):
            print(f"  {count / unit:>12,.0f}  {count * 100 / by_level[level]:5.1f} % of {level}  {name}", file=out)

    print("\ntree (from 0.5 % up)", file=out)

    def show(node, depth):
        for name, (count, below) in sorted(node.items(), key=lambda item: -item[1][0]):
            if count * 200 < everything:
                continue
            print(f"  {count / unit:>12,.0f}  {count * 100 / everything:5.1f} %  {'| ' * depth}{name}", file=out)
            show(below, depth + 1)

    show(tree, 0)


def tables(args, profile, levels):
    """Symbol tables for each level, from what was captured and what the lab has."""
    found = {0: []}
    kallsyms = os.path.join(args.out, "kallsyms")
    if os.path.exists(kallsyms):
        found[0].append(Symbols().map(kallsyms))
    paths = {}
    if not args.bare and not (args.kernel_tree and args.emulator):
        paths = emu.lab_paths(args)
    deepest = max(levels.values())
    guest, payload = paths.get("GUEST", ""), paths.get("PAYLOAD", "")
    modules = [os.path.join(root, name) for root, _, names in os.walk(paths.get("GUEST_MODULES") or "/nonexistent") for name in names
               if name.endswith(".ko")] + [paths[name] for name in ("GUEST_MODULE",) if os.path.exists(paths.get(name, ""))]
    for level in range(1, deepest + 1):
        table = found.setdefault(level, [])
        if level == deepest and payload and os.path.exists(payload):
            table.append(Symbols().elf(payload))
        if payload and level == deepest - 1 and os.path.exists(payload):
            table.append(Symbols().elf(payload))    # the payload is the innermost hypervisor and its guest
        if guest and level < deepest and os.path.exists(os.path.join(guest, "System.map")):
            table.append(Symbols().map(os.path.join(guest, "System.map")))
            targets = {target for _, context, target, _ in profile.nodes if levels.get(context) == level and target >= MODULES}
            loaded = Symbols()
            for path in modules:
                loaded.module(path, targets)
            table.insert(0, loaded)
    if paths.get("TOOL") and os.path.exists(paths["TOOL"]):
        user = Symbols().elf(paths["TOOL"])
        for level in range(0, deepest):
            found[level].append(user)
    for entry in args.symbols:
        level, _, path = entry.partition("=")
        with open(path, "rb") as f:
            elf = f.read(4) == b"\x7fELF"
        found.setdefault(int(level), []).insert(0, Symbols().elf(path) if elf else Symbols().map(path))
    return found


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(prog="scripts/profile", description=__doc__, epilog=HELP, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("op", nargs="?", help="operation, as matryoshka bench names it")
    add("--depth", type=int, metavar="N", help="level that executes the operation (default 2)")
    add("--config", default="stock", help="stock, idle, l0 or all (default stock)")
    add("--command", metavar="COMMAND", help="profile this shell command's regions instead")
    add("--report", metavar="DIR", help="only print what DIR holds")
    add("--out", default=None, metavar="DIR", help="where it goes, instead of a profile that is there (default out/profile-OP-N)")
    add("--symbols", action="append", default=[], metavar="LEVEL=FILE", help="more symbols for a level: ELF, System.map or kallsyms")
    add("--file", action="append", default=[], metavar="SRC=DST", help="put a file into L0")
    add("--kernel", metavar="VERSION", help="kernel version (default: the lab's)")
    add("--locks", action="store_true", help="how long L0's readers' and writers' locks were held and waited for, too (whole run)")
    add("--cpus", type=int, metavar="N", help="processors of L0 (default 1)")
    for hidden in ("--kernel-tree", "--emulator", "--busybox"):
        add(hidden, help=argparse.SUPPRESS)
    add("--bare", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not (args.op or args.command or args.report):
        parser.error("say what to profile: an operation, --command or --report")
    if args.config not in CONFIGS:
        parser.error(f"--config {args.config}: one of {', '.join(CONFIGS)}")
    if args.depth is not None and not 1 <= args.depth <= DEEPEST:
        parser.error(f"--depth {args.depth}: from 1 to {DEEPEST}")
    return args


def make_room(directory):
    """Makes the output directory, without what a profile before left in it; one with anything else in it is somebody's."""
    if os.path.isdir(directory) and os.listdir(directory):
        if not any(os.path.exists(os.path.join(directory, name)) for name in ("profile", "depth")):
            sys.exit(f"profile: {directory} is not empty and holds no profile: choose another --out, or empty it")
        shutil.rmtree(directory)
    os.makedirs(directory, exist_ok=True)


def has_profiler(args):
    """Whether the instrumented emulator is there, or is not for us to make."""
    directory = args.emulator or emu.lab_paths(args)["EMU"]
    return bool(args.emulator) or package.used(directory) or os.access(os.path.join(directory, "bochs-prof"), os.X_OK)


def record(args):
    """Runs it on the instrumented emulator; returns its status."""
    command = args.command or f"matryoshka bench --profile {shlex.quote(args.op)} --depth {args.depth} --config {shlex.quote(args.config)}"
    make_room(args.out)
    # First, so that what a run that failed has left is known for a profile's.
    with open(os.path.join(args.out, "depth"), "w", encoding="ascii") as f:
        f.write(str(args.depth))
    if not has_profiler(args):
        lab = [os.path.join(emu.PROJECT, "scripts", "lab"), "setup", "--profiler"]
        status = subprocess.run(lab + (["--kernel", args.kernel] if args.kernel else []), check=False).returncode
        if status:
            return status
    run = [sys.executable, "-m", "emu", "run"]
    for name in ("kernel", "kernel_tree", "emulator", "busybox"):
        if getattr(args, name):
            run += ["--" + name.replace("_", "-"), getattr(args, name)]
    environment = {**os.environ, **({"MATRYOSHKA_LOCKS": locks.functions(args.out, run)} if args.locks else {})}
    run += ["--prof", "--out", args.out] + (["--cpus", str(args.cpus)] if args.cpus else [])
    for entry in args.file:
        run += ["--file", entry]
    run += ["--bare"] if args.bare else []
    run += ["--", "sh", "-c", f"{command}; s=$?; cat /proc/kallsyms >/out/kallsyms; exit $s"]
    # SIGTERM to this process alone ends both.
    with subprocess.Popen(run, env=environment) as child:
        signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        return child.wait()


def main():
    """Records, if asked to, and reports."""
    args = arguments()
    if args.report:
        args.out = args.report
    else:
        args.depth = args.depth or (0 if args.command else 2)
        args.out = args.out or f"out/profile-{args.op or 'command'}-{args.depth}"
        status = record(args)
        if status:
            return status
    path = os.path.join(args.out, "profile")
    if not os.path.exists(path):
        print("profile: no region was recorded: nothing executed XGETBV with ECX=0x4d545201 and 0x4d545202", file=sys.stderr)
        return 1
    if args.report and not args.depth:
        try:
            with open(os.path.join(args.out, "depth"), encoding="ascii") as f:
                args.depth = int(f.read())
        except (OSError, ValueError):
            pass
    profile = Profile(path)
    median, total, regions = profile.typical()
    levels = profile.levels(args.depth)
    resolver = Resolver(tables(args, profile, levels))
    stacks = fold(profile, regions, levels, resolver)
    with open(os.path.join(args.out, "profile.folded"), "w", encoding="utf-8") as f:
        for frames, count in sorted(stacks.items()):
            f.write(f"{';'.join(frames)} {count}\n")
    with open(os.path.join(args.out, "profile.txt"), "w", encoding="utf-8") as f:
        if regions:
            report(stacks, exits(regions, levels), sum(r[1] for r in regions), median, total, f)
        if profile.locks:
            locks.report(profile.locks, lambda site: resolver.name(0, site), f)
    with open(os.path.join(args.out, "profile.txt"), encoding="utf-8") as f:
        sys.stdout.write(f.read())
    if regions:
        print(f"\nstacks for flame-graph tools: {os.path.join(args.out, 'profile.folded')}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)
