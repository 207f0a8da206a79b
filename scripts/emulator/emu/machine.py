# SPDX-License-Identifier: GPL-2.0
"""One run of the emulator: starts it, listens to it, notices when it hangs, and ends it."""

import ctypes
import os
import re
import selectors
import signal
import subprocess
import sys
import time
import tty

from . import package

BOCHSRC = """\
config_interface: textconfig
display_library: {display}
cpu: model={model}, count={cpus}, ips={ips}, ignore_bad_msrs=1
memory: guest={memory}, host={host}
romimage: file={emulator}/BIOS-bochs-latest
vgaromimage: file={emulator}/vgabios-stdvga.bin
com1: enabled=1, mode=term, dev={tty}
port_e9_hack: enabled=1
log: {log}
clock: sync=none, time0=1700000000
pci: enabled=1, chipset=i440fx
panic: action=fatal
error: action=ignore
info: action=ignore
debug: action=ignore
"""


def complaints():
    """What a Linux kernel prints when something is wrong in it, at whatever level it runs: the list of the selftests."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "..", "selftests", "lib.sh")
    with open(path, encoding="utf-8") as lines:
        return next(line.split("'")[1] for line in lines if line.startswith("COMPLAINTS='"))


TROUBLE = re.compile(complaints())
PANIC = re.compile(r"Kernel panic - ")


class Hang(Exception):
    """Nothing was heard for too long."""


class Crash(Exception):
    """The emulator ended by itself, or L0 panicked."""


class Frames:
    """Takes the frames (see agent.c) out of the emulator's standard output, past what else it prints."""

    MAGIC = b"\x01MTK"

    def __init__(self):
        self._buffer = bytearray()
        self.noise = bytearray()

    def feed(self, data):
        """Adds bytes; yields (type, payload) for each frame that is complete."""
        self._buffer += data
        while True:
            start = self._buffer.find(self.MAGIC)
            if start < 0:
                keep = len(self.MAGIC) - 1
                self.noise += self._buffer[:-keep]
                del self._buffer[:-keep]
                return
            self.noise += self._buffer[:start]
            del self._buffer[:start]
            if len(self._buffer) < 10:
                return
            length = int.from_bytes(self._buffer[5:9], "little")
            if length > 1 << 20:
                del self._buffer[:1]
                continue
            if len(self._buffer) < length + 10:
                return
            payload = bytes(self._buffer[9:9 + length])
            if sum(payload) & 0xFF != self._buffer[9 + length]:
                del self._buffer[:1]
                continue
            kind = chr(self._buffer[4])
            del self._buffer[:length + 10]
            yield kind, payload


class Lines:
    """Cuts a byte stream into lines."""

    def __init__(self):
        self._rest = b""

    def feed(self, data):
        """Adds bytes, returns the lines that are complete."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [line.decode("utf-8", "replace").rstrip("\r") for line in lines]


def _die_with_parent():
    """In the child: end when the runner ends, however it ends. Ctrl-C is the runner's business."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    os.setpgid(0, 0)


class Machine:
    """The emulator as a child process, its serial console on a pseudo terminal."""

    def __init__(self, directory, emulator, binary, boot_lines, memory, cpus, model, ips, environment=None):
        self._patched = not package.used(emulator)
        self.directory = directory
        self.master, self._slave = os.openpty()
        tty.setraw(self._slave)
        os.set_blocking(self.master, False)
        config = BOCHSRC.format(emulator=emulator, display="nogui" if self._patched else "term", memory=memory, host=min(memory, 2048),
                                cpus=cpus, model=model, ips=ips, tty=os.ttyname(self._slave), log=os.path.join(directory, "bochs.log"))
        path = os.path.join(directory, "bochsrc")
        with open(path, "w", encoding="utf-8") as f:
            f.write(config + boot_lines)
        self.stderr_path = os.path.join(directory, "stderr")
        with open(self.stderr_path, "wb") as stderr:
            self.process = subprocess.Popen([binary, "-q", "-f", path], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                            stderr=stderr, cwd=directory, preexec_fn=_die_with_parent,
                                            env={**os.environ, **(environment or {}), "BXSHARE": emulator})
        os.set_blocking(self.process.stdout.fileno(), False)
        self._screen = None if self._patched else package.Screen(self.stderr_path)

    def stop(self):
        """Ends the emulator, if it still runs, and frees the terminal."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        if self._screen:
            self._screen.close()
        for fd in (self.master, self._slave):
            try:
                os.close(fd)
            except OSError:
                pass

    def cpu_time(self):
        """Seconds of processor time the emulator has used; its silence is measured in them, not to take a busy machine for a hang."""
        try:
            with open(f"/proc/{self.process.pid}/stat", encoding="ascii", errors="replace") as f:
                fields = f.read().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        except (OSError, IndexError, ValueError):
            return 0.0

    def where(self):
        """Asks the (patched) emulator where each processor is; a list of lines."""
        if self.process.poll() is not None or not self._patched:
            return []
        lines = []
        for _ in range(3):
            self.process.send_signal(signal.SIGUSR1)
            time.sleep(0.2)
        with open(self.stderr_path, encoding="utf-8", errors="replace") as f:
            lines = [line.strip() for line in f if line.startswith("MTK-STATUS")]
        return lines

    def log(self, count=8):
        """The last lines the emulator itself wrote."""
        lines = []
        for name in ("bochs.log", "stderr"):
            try:
                with open(os.path.join(self.directory, name), encoding="utf-8", errors="replace") as f:
                    lines += [line.rstrip() for line in f if line.strip() and not line.startswith("MTK-STATUS")]
            except FileNotFoundError:
                pass
        return lines[-count:]

    def events(self, timeout, limit=None, extra=None, tick=None):
        """Yields ("console", bytes), ("frame", type, payload), ("extra", bytes) until the emulator ends.

        TIMEOUT: seconds (of the emulator's processor time) of silence that count as a hang. LIMIT: seconds in all. EXTRA: a file descriptor to read as well. TICK: called once
        or more a second with the seconds since the start.
        """
        frames = Frames()
        started = time.monotonic()
        heard = self.cpu_time()
        out = self.process.stdout.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(self.master, selectors.EVENT_READ, "console")
            selector.register(out, selectors.EVENT_READ, "out")
            if extra is not None:
                selector.register(extra, selectors.EVENT_READ, "extra")
            while True:
                if self._screen and self._screen.find():
                    selector.register(self._screen.fd, selectors.EVENT_READ, "screen")
                ready = selector.select(0.5)
                now = time.monotonic()
                if tick:
                    tick(now - started)
                for key, _ in ready:
                    try:
                        data = os.read(key.fd, 65536)
                    except BlockingIOError:
                        continue
                    except OSError:
                        if key.data != "screen":
                            raise
                        data = b""
                    if key.data == "screen":
                        if not data:
                            selector.unregister(key.fd)
                        continue
                    if key.data == "out":
                        if not data:
                            return
                        for frame in frames.feed(data):
                            heard = self.cpu_time()
                            yield ("frame", *frame)
                    elif data:
                        heard = self.cpu_time()
                        yield (key.data, data)
                    elif key.data == "extra":
                        selector.unregister(key.fd)
                if timeout and self.cpu_time() - heard > timeout:
                    raise Hang(f"nothing was heard from the emulated host while it ran for {timeout} s")
                if limit and now - started > limit:
                    raise Hang(f"the run took longer than the {limit} s it may take")


class Progress:
    """One line on a terminal that says how long the run has taken and may still take."""

    def __init__(self, what, expected=None, stream=sys.stderr):
        self._what, self._expected, self._stream = what, expected, stream
        self._on = stream.isatty()
        self._shown = False
        self._last = -1

    def tick(self, elapsed):
        """Shows the time, at most once a second."""
        if not self._on or int(elapsed) == self._last:
            return
        self._last = int(elapsed)
        text = f"{self._what}: {self._last} s"
        if self._expected:
            left = self._expected - elapsed
            text += f", about {left:.0f} s left" if left >= 1 else f" (was {self._expected:.0f} s last time)"
        self._stream.write(f"\r\x1b[K{text}")
        self._stream.flush()
        self._shown = True

    def clear(self):
        """Takes the line away before something else is printed."""
        if self._shown:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
            self._shown = False
