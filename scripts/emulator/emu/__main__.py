# SPDX-License-Identifier: GPL-2.0
"""scripts/emu: boots a stock Linux kernel as L0 on an emulated CPU that has VMX."""

import argparse
import hashlib
import io
import json
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import tempfile
import termios
import time
import tty

from . import boot, cpio, machine, package

HERE = os.path.dirname(os.path.abspath(__file__))
EMULATOR = os.path.dirname(HERE)
PROJECT = os.path.dirname(os.path.dirname(EMULATOR))

HUNG, WARNED, BROKEN = 124, 123, 125

TLBS = ("tagged", "flushed", "deaf")
EXAMPLES = """\
examples:
  scripts/emu run -- uname -a                        one command in L0
  scripts/emu run --out out/x -- matryoshka bench --depth 2 --json /out/bench.json
                                                     what the command leaves in /out comes back to out/x
  scripts/emu run --file my_test=/bin/my_test -- my_test
                                                     put a (static) program in, run it
  scripts/emu shell                                  a shell in L0; Ctrl-] ends it
  MATRYOSHKA_EMULATOR=package scripts/emu run -- uname -a
                                                     the same on Debian's bochs package (after scripts/lab setup with it)

exit status: COMMAND's own; 123 a kernel warned (--fail-on-warn); 124 it hung; 125 it could not be run.
Documentation/lab.md explains the emulated host."""


def fail(message):
    """Ends the runner: it could not do its work."""
    print(f"emu: {message}", file=sys.stderr)
    sys.exit(BROKEN)


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(prog="scripts/emu", description=__doc__, epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True, metavar="run | shell")
    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument
    add("--kernel", metavar="VERSION", help="kernel version (default: the lab's)")
    add("--cpus", type=int, default=1, metavar="N", help="processors of L0 (default 1; counts repeat exactly only with 1)")
    add("--memory", type=int, default=2048, metavar="MIB", help="memory of L0 (default 2048)")
    add("--append", default="", metavar="ARGS", help="more arguments for the kernel command line")
    add("--kvm-intel", default="", metavar="OPTIONS", help="more options for kvm_intel (nested=1 is always there)")
    add("--file", action="append", default=[], metavar="SRC=DST", help="put a file or directory into L0")
    add("--module", action="append", default=[], metavar="NAME", help="load one more of the kernel's modules")
    add("--prof", action="store_true", help="use the instrumented emulator (slower; see scripts/profile)")
    add("--model", default="corei7_skylake_x", help=argparse.SUPPRESS)
    add("--ips", type=int, default=os.environ.get("MATRYOSHKA_IPS") or "3500000000", metavar="N",
        help="instructions that L0 takes for a second (default $MATRYOSHKA_IPS or 3500000000). Fewer make what waits for "
             "timers shorter, such as RCU's grace periods, and interrupt more often what is measured")
    add("--tlb", choices=TLBS, default=os.environ.get("MATRYOSHKA_TLB") or "tagged",
        help="guests and hypervisors keep their TLB entries by VPID and EPT, as on real processors, so that a forgotten invalidation "
        "shows; or each VM entry and VM exit flushes all; deaf: INVEPT and INVVPID do nothing, to see that it shows (default "
        "$MATRYOSHKA_TLB or tagged)")
    add("--random", type=int, default=os.environ.get("MATRYOSHKA_RANDOM") or "1", metavar="N",
        help="what the processor's random numbers start from (default $MATRYOSHKA_RANDOM or 1): the same make the same run")
    add("--kernel-tree", metavar="DIR", help="directory with vmlinuz and the module tree (default: from scripts/lab)")
    add("--emulator", metavar="DIR", help="directory with the emulator (default: from scripts/lab)")
    add("--busybox", metavar="FILE", help="static busybox (default: the lab's)")
    add("--bare", action="store_true", help="leave out the tool, the module and the guest kernel")
    run = modes.add_parser("run", parents=[common], help="run one command in L0", epilog=EXAMPLES,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    run.add_argument("--timeout", type=int, default=300, metavar="S", help="silence that counts as a hang, in seconds of the emulator's processor time (default 300)")
    run.add_argument("--limit", type=int, default=0, metavar="S", help="time the whole run may take")
    run.add_argument("--out", metavar="DIR", help="where /out of the guest and console.log go")
    run.add_argument("--fail-on-warn", action="store_true", help="a WARNING, BUG or Oops of any kernel fails the run")
    run.add_argument("-v", "--verbose", action="store_true", help="show the console")
    run.add_argument("command", nargs="+", metavar="COMMAND", help="what to run, after --")
    modes.add_parser("shell", parents=[common], help="a shell in L0")
    args = parser.parse_args()
    # What comes from the environment is not held against the choices, and the emulator takes any other word for "flushed".
    if args.tlb not in TLBS:
        parser.error(f"MATRYOSHKA_TLB={args.tlb}: one of {', '.join(TLBS)}")
    return args


def lab_paths(args):
    """What `scripts/lab paths` says, as a dictionary."""
    if args.kernel_tree and args.emulator and args.busybox:
        return {}
    lab = os.path.join(PROJECT, "scripts", "lab")
    command = [lab, "paths"] + (["--kernel", args.kernel] if args.kernel else [])
    try:
        text = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    except FileNotFoundError:
        fail("scripts/lab is not there; give --kernel-tree, --emulator and --busybox")
    except subprocess.CalledProcessError:
        sys.exit(BROKEN)  # The lab has said why.
    return dict(line.split("=", 1) for line in shlex.split(text, comments=True) if "=" in line)


def cache():
    """The project's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.environ.get("MATRYOSHKA_CACHE") or os.path.join(base, "matryoshka")


def build_initramfs(path, args, paths, tree):
    """Writes L0's initramfs; returns the kernel version it is for."""
    image = cpio.Cpio(path)
    image.device("dev/console", stat.S_IFCHR, 5, 1)
    image.device("dev/null", stat.S_IFCHR, 1, 3)
    for name in ("proc", "sys", "tmp", "run", "out", "root"):
        image.directory(name)
    for pair in args.file:
        source, _, name = pair.partition("=")
        if not os.path.exists(source):
            fail(f"--file {pair}: {source} does not exist")
        image.copy(source, name or "/bin/" + os.path.basename(source))
    busybox = args.busybox or os.path.join(paths.get("ROOT", ""), "bin/busybox")
    image.copy(busybox, "bin/busybox")
    for applet in subprocess.run([busybox, "--list"], stdout=subprocess.PIPE, check=True, text=True).stdout.split():
        image.link(f"bin/{applet}", "busybox")
    image.copy(os.path.join(args.emulator, "emu-agent"), "bin/emu-agent")
    image.copy(os.path.join(EMULATOR, "init"), "init")

    modules = boot.Modules(tree).load_order(["kvm", "kvm_intel", *args.module])
    version = next(tag[9:].split()[0].decode() for tag in modules[0][1].split(b"\0") if tag.startswith(b"vermagic="))
    load, depends = "", ""
    for name, data, needs in modules:
        image.data(f"lib/modules/{version}/{name}.ko", data)
        options = f"nested=1 {args.kvm_intel}" if name == "kvm-intel" else ""
        load += f"{name}.ko {options}\n"
        depends += f"{name}.ko:{''.join(f' {n}.ko' for n in needs)}\n"
    image.data("etc/emu/modules", load.encode())
    image.data(f"lib/modules/{version}/modules.dep", depends.encode())  # for modprobe
    image.data("etc/modprobe.conf", f"options kvm_intel nested=1 {args.kvm_intel}\n".encode())
    image.data("etc/emu/mode", args.mode.encode())
    if args.mode == "run":
        image.data("etc/emu/command", ("exec " + shlex.join(args.command) + "\n").encode())
    config = os.path.join(paths.get("KERNEL") or args.kernel_tree, "config")
    if os.path.exists(config):
        image.copy(config, f"boot/config-{version}")
    image.data("etc/passwd", b"root:x:0:0:root:/:/bin/sh\n")

    if not args.bare:
        guest = paths.get("GUEST", "")
        for source, name in ((paths.get("TOOL"), "bin/matryoshka"), (paths.get("MODULE"), "lib/matryoshka/matryoshka.ko"),
                             (guest and guest + "/vmlinux", "lib/matryoshka/guest/vmlinux"),
                             (paths.get("GUEST_MODULE_STRIPPED"), "lib/matryoshka/guest/matryoshka.ko"),
                             (paths.get("PAYLOAD"), "lib/matryoshka/payload")):
            if source and os.path.exists(source):
                image.copy(source, name)
        try:
            for name, data, _ in boot.Modules(paths.get("GUEST_MODULES", "")).load_order(["kvm", "kvm_intel"]):
                image.data(f"lib/matryoshka/guest/{name}.ko", data)
        except FileNotFoundError:
            pass    # built in, or there is no guest kernel
    image.close()
    return version


class History:
    """How long runs of the same command took, for the progress line."""

    def __init__(self, key):
        self._path = os.path.join(cache(), "emu-times.json")
        self._key = hashlib.sha256(key.encode()).hexdigest()[:16]

    def _load(self):
        try:
            with open(self._path, encoding="utf-8") as f:
                return json.load(f)
        except (OSError, ValueError):
            return {}

    def expected(self):
        """Seconds, or None."""
        return self._load().get(self._key)

    def record(self, seconds):
        """Remembers a run that ended well. Two at a time may lose one entry, which does not matter."""
        times = self._load()
        times[self._key] = round(seconds, 1)
        try:
            os.makedirs(os.path.dirname(self._path), exist_ok=True)
            with open(f"{self._path}.{os.getpid()}", "w", encoding="utf-8") as f:
                json.dump(times, f)
            os.replace(f"{self._path}.{os.getpid()}", self._path)
        except OSError:
            pass


class Run:
    """`emu run`: what came from the guest, and what became of it."""

    def __init__(self, args, host, directory):
        self.args, self.host = args, host
        self.out = args.out or os.path.join(directory, "out")
        os.makedirs(self.out, exist_ok=True)
        self.console = open(os.path.join(self.out, "console.log"), "w", encoding="utf-8")
        self.output = open(os.path.join(self.out, "output.log"), "wb")
        # What comes is added to it, and nothing may come at all.
        open(os.path.join(self.out, "kernel.log"), "wb").close()
        slow = ["package"] if package.used(args.emulator) else []
        self.history = History(" ".join([*args.command, str(args.prof), args.kernel or "", *slow]))
        self.progress = machine.Progress("L0", self.history.expected())
        self.lines, self.text = machine.Lines(), {"O": machine.Lines(), "E": machine.Lines()}
        self.trouble, self.last = [], []
        self.status = None
        self.archive = io.BytesIO()

    def look(self, lines):
        """Notes what a kernel complains of."""
        for line in lines:
            if machine.TROUBLE.search(line) and line not in self.trouble:
                self.trouble.append(line)

    def on_console(self, data):
        """Serial console of L0."""
        for line in self.lines.feed(data):
            self.console.write(line + "\n")
            self.last = (self.last + [line])[-20:]
            self.look([line])
            if self.args.verbose:
                self.progress.clear()
                print(line, flush=True)
            if machine.PANIC.search(line):
                self.console.flush()
                raise machine.Crash("L0's kernel panicked")

    def on_frame(self, kind, data):
        """A frame from the agent; true if it was the last one."""
        if kind in "OE":
            self.progress.clear()
            stream = sys.stdout if kind == "O" else sys.stderr
            stream.buffer.write(data)
            stream.flush()
            self.output.write(data)
            lines = self.text[kind].feed(data)
            self.last = (self.last + lines)[-20:]
            self.look(lines)
        elif kind == "X":
            self.status = data[0]
        elif kind == "F":
            self.archive.write(data)
        elif kind == "K":
            with open(os.path.join(self.out, "kernel.log"), "ab") as f:
                f.write(data)
            self.look(data.decode("utf-8", "replace").splitlines())
        return kind == "Z"

    def unpack(self):
        """Writes the files that came back."""
        if not self.archive.tell():
            return
        self.archive.seek(0)
        with tarfile.open(fileobj=self.archive) as tar:
            for member in tar:
                target = os.path.normpath(os.path.join(self.out, member.name))
                if not target.startswith(os.path.abspath(self.out)) and not target.startswith(self.out):
                    continue
                if member.isdir():
                    os.makedirs(target, exist_ok=True)
                elif member.isfile():
                    os.makedirs(os.path.dirname(target), exist_ok=True)
                    with open(target, "wb") as f:
                        shutil.copyfileobj(tar.extractfile(member), f)
                    os.chmod(target, member.mode & 0o777)

    def tell(self, message):
        """Says what went wrong, with the last lines that were heard."""
        self.progress.clear()
        print(f"emu: {message}", file=sys.stderr)
        for line in self.last[-15:]:
            print(f"emu:   | {line}", file=sys.stderr)
        for line in self.host.where():
            print(f"emu:   {line}", file=sys.stderr)
        for line in self.host.log():
            print(f"emu:   emulator: {line}", file=sys.stderr)

    def go(self):
        """Runs to the end; returns the exit status."""
        started = time.monotonic()
        try:
            for event in self.host.events(self.args.timeout, self.args.limit, tick=self.progress.tick):
                if event[0] == "console":
                    self.on_console(event[1])
                elif self.on_frame(event[1], event[2]) and not self.args.prof:
                    break  # a profile is written as the emulator ends by itself
        except machine.Hang as problem:
            self.tell(f"{problem}; ended. The last it said:")
            return HUNG
        except machine.Crash as problem:
            self.tell(f"{problem}. The last it said:")
            return BROKEN
        finally:
            self.console.close()
            self.output.close()
            self.progress.clear()
        self.unpack()
        if self.status is None:
            self.tell("the emulator ended before the command did. The last it said:")
            return BROKEN
        for line in self.trouble:
            print(f"emu: kernel: {line}", file=sys.stderr)
        if self.trouble and self.args.fail_on_warn:
            print(f"emu: {len(self.trouble)} complaint(s) of a kernel; kernel.log and console.log have the rest", file=sys.stderr)
            return WARNED
        self.history.record(time.monotonic() - started)
        return self.status


def shell(host):
    """`emu shell`: the terminal becomes L0's serial console."""
    interactive = sys.stdin.isatty()
    saved = termios.tcgetattr(sys.stdin) if interactive else None
    try:
        if interactive:
            tty.setraw(sys.stdin)
        for event in host.events(0, extra=sys.stdin.fileno()):
            if event[0] == "console":
                sys.stdout.buffer.write(event[1])
                sys.stdout.flush()
            elif event[0] == "extra":
                if b"\x1d" in event[1]:
                    break
                os.write(host.master, event[1].replace(b"\n", b"\r"))
            elif event[1] == "Z":
                break
    finally:
        if saved:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, saved)
    print("\nemu: ended")
    return 0


def main():
    """Builds what to boot, boots it, and cleans up."""
    args = arguments()
    paths = lab_paths(args)
    tree = args.kernel_tree or paths["KMODULES"]
    vmlinuz = os.path.join(args.kernel_tree or paths["KERNEL"], "vmlinuz")
    args.emulator = args.emulator or paths["EMU"]
    if args.prof and package.used(args.emulator):
        fail("profiles are unavailable: the emulator is Debian's bochs package, which cannot make them (Documentation/lab.md, \"The fall-back\")")
    binary = os.path.join(args.emulator, "bochs-prof" if args.prof else "bochs")
    if not os.access(binary, os.X_OK):
        fail(f"{binary} is missing: run scripts/lab setup" + (" --profiler" if args.prof else ""))
    root = paths.get("ROOT", "/").rstrip("/")
    line = "console=ttyS0,115200 loglevel=5 nokaslr panic=0"
    environment = {"MATRYOSHKA_RANDOM": str(args.random), "MATRYOSHKA_TLB": args.tlb}
    if package.used(args.emulator):
        print(f"emu: this is Debian's bochs package: slower, {package.LACKS} (Documentation/lab.md, \"The fall-back\")", file=sys.stderr)
        line += " " + package.KERNEL_ARGUMENTS
        args.kvm_intel = f"{package.KVM_INTEL_OPTIONS} {args.kvm_intel}"
        environment["EMU_ROOT"] = root
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGHUP, lambda *_: sys.exit(129))
    with tempfile.TemporaryDirectory(prefix="emu-") as directory:
        initramfs = os.path.join(directory, "initramfs")
        try:
            build_initramfs(initramfs, args, paths, tree)
            line = f"{line} {args.append}".strip()
            if package.used(args.emulator):
                boot_lines = package.boot_files(directory, root, vmlinuz, initramfs, line)
            else:
                boot_lines = boot.boot_files(directory, vmlinuz, initramfs, line, args.memory)
        except (OSError, ValueError) as problem:
            fail(str(problem))
        if args.prof and getattr(args, "out", None):
            os.makedirs(args.out, exist_ok=True)
            environment["MATRYOSHKA_PROFILE"] = os.path.abspath(os.path.join(args.out, "profile"))
        host = machine.Machine(directory, args.emulator, binary, boot_lines, args.memory, args.cpus, args.model, args.ips, environment)
        try:
            return shell(host) if args.mode == "shell" else Run(args, host, directory).go()
        finally:
            host.stop()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
