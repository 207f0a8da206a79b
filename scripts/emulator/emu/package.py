# SPDX-License-Identifier: GPL-2.0
"""Debian's own bochs, the fall-back where the emulator could not be built: what it boots from, and how it is started.

It has none of our patches. A RAM image longer than a block is read wrong, so it boots from a CD image, as a machine would. Its screen
is a terminal that it opens by itself.
"""

import os
import re
import subprocess
import tty

# Its local APIC timer runs at another rate than CPUID says, and it rejects posted-interrupt descriptors that are not
# page-aligned: Documentation/lab.md, "Oddities".
KERNEL_ARGUMENTS = "nolapic_timer"
KVM_INTEL_OPTIONS = "enable_apicv=0"

LACKS = "no exit counts, no profiles"

CONFIG = """\
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata0-master: type=cdrom, path={iso}, status=inserted
boot: cdrom
sound: waveoutdrv=dummy, waveindrv=dummy, midioutdrv=dummy
"""

ISOLINUX = """\
default l0
prompt 0
label l0
  kernel /vmlinuz
  append initrd=/initrd {line}
"""


def used(emulator):
    """Whether the emulator in the directory EMULATOR is Debian's package; the recipe leaves a mark."""
    return os.path.exists(os.path.join(emulator, "unpatched"))


def boot_files(directory, root, vmlinuz, initramfs, command_line):
    """Writes a boot CD's image into DIRECTORY with the tools of the root file system ROOT; returns lines for the emulator's configuration."""
    if len(command_line) > 2000:
        raise ValueError("the kernel command line is longer than isolinux takes")
    config, iso = os.path.join(directory, "isolinux.cfg"), os.path.join(directory, "boot.iso")
    with open(config, "w", encoding="utf-8") as f:
        f.write(ISOLINUX.format(line=command_line))
    content = {"isolinux.bin": f"{root}/usr/lib/ISOLINUX/isolinux.bin", "ldlinux.c32": f"{root}/usr/lib/syslinux/modules/bios/ldlinux.c32",
               "isolinux.cfg": config, "vmlinuz": vmlinuz, "initrd": initramfs}
    for path in content.values():
        if not os.path.exists(path):
            raise ValueError(f"{path} is missing: run scripts/lab setup")
    # The root file system's program runs with its own C library: this machine may have none that fits.
    command = [f"{root}/usr/lib64/ld-linux-x86-64.so.2", "--library-path", f"{root}/usr/lib/x86_64-linux-gnu", f"{root}/usr/bin/xorriso",
               "-as", "mkisofs", "-quiet", "-o", iso, "-b", "isolinux.bin", "-c", "boot.cat", "-no-emul-boot", "-boot-load-size", "4",
               "-boot-info-table", "-graft-points", *(f"{name}={path}" for name, path in content.items())]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise ValueError("xorriso could not make the boot CD: " + done.stdout.decode("utf-8", "replace").strip()[-500:])
    return CONFIG.format(iso=iso)


class Screen:
    """The terminal that has the emulator's screen. Nobody looks at it, but unread it would fill up and stop the emulator."""

    def __init__(self, stderr_path):
        self._stderr = stderr_path
        self.fd = None

    def find(self):
        """Opens it once the emulator has said which one it is; true if it has been found just now."""
        if self.fd is not None:
            return False
        with open(self._stderr, encoding="utf-8", errors="replace") as f:
            said = re.search(r'connected to screen "(/dev/[a-z0-9/]+)"', f.read())
        if not said:
            return False
        try:
            self.fd = os.open(said[1], os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
            tty.setraw(self.fd)
        except OSError:
            return False
        return True

    def close(self):
        """Lets go of it."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None
