# SPDX-License-Identifier: GPL-2.0
"""What the emulator boots from: a kernel and an initramfs that are in memory before the first instruction.

The emulator can put files into guest memory when it starts. So there is no disk and no boot loader, only a boot sector that jumps to
the kernel's real-mode entry (Documentation/arch/x86/boot.rst): the BIOS has run, and the kernel finds the memory
map and the ACPI tables just as behind a boot loader, while the slow loading through BIOS calls falls away.
"""

import lzma
import os
import struct
import subprocess

SETUP = 0x90000          # real-mode kernel, its heap and stack
COMMAND_LINE = 0x9E000   # 4 KiB
KERNEL = 0x100000        # protected-mode kernel
PAGE = 4096

# Segments to 0x9000, a stack, and off to the kernel's entry at 0x9020:0.
BOOT_SECTOR = bytes.fromhex("fa b80090 8ed8 8ec0 8ee0 8ee8 8ed0 bc00e0 ea00002090".replace(" ", ""))


def boot_files(directory, vmlinuz, initramfs, command_line, memory_mib):
    """Writes the boot files into DIRECTORY; returns lines for the emulator's configuration."""
    with open(vmlinuz, "rb") as f:
        image = bytearray(f.read())
    if image[0x202:0x206] != b"HdrS":
        raise ValueError(f"{vmlinuz} is not a bzImage")
    setup_size = ((image[0x1F1] or 4) + 1) * 512
    size = os.path.getsize(initramfs)
    # In the middle: the kernel unpacks itself below, and firmware tables lie at the top.
    address = ((memory_mib << 20) * 3 // 4 - size) & -PAGE

    image[0x210] = 0xFF                                     # type_of_loader: no assigned number
    image[0x211] |= 0x80                                    # loadflags: CAN_USE_HEAP
    struct.pack_into("<H", image, 0x224, 0xE000 - 0x200)    # heap_end_ptr
    struct.pack_into("<I", image, 0x228, COMMAND_LINE)      # cmd_line_ptr
    struct.pack_into("<II", image, 0x218, address, size)    # ramdisk_image, ramdisk_size

    def write(name, data):
        path = os.path.join(directory, name)
        with open(path, "wb") as f:
            f.write(data)
        return path

    low = bytes(image[:setup_size]).ljust(COMMAND_LINE - SETUP, b"\0")
    line = command_line.encode()
    if len(line) > 2047:
        raise ValueError("the kernel command line is longer than the 2047 bytes the kernel takes")
    floppy = write("boot.img", (BOOT_SECTOR.ljust(510, b"\0") + b"\x55\xaa").ljust(1440 * 1024, b"\0"))
    images = [(write("setup", low + line + b"\0"), SETUP),
              (write("kernel", bytes(image[setup_size:])), KERNEL),
              (initramfs, address)]
    lines = f"floppya: image={floppy}, status=inserted\nboot: floppy\n"
    return lines + "".join(f"optramimage{number}: file={path}, address={place:#x}\n" for number, (path, place) in enumerate(images, 1))


def read_module(path):
    """A module's ELF image, whatever it is compressed with."""
    with open(path, "rb") as f:
        data = f.read()
    if path.endswith(".xz"):
        return lzma.decompress(data)
    if path.endswith(".zst"):
        return subprocess.run(["zstd", "-dc"], input=data, stdout=subprocess.PIPE, check=True).stdout
    return data


class Modules:
    """The modules of one kernel: finds a module's file and what it depends on."""

    def __init__(self, tree):
        self._files = {}
        for root, _, names in os.walk(os.path.join(tree, "kernel")):
            for name in names:
                if ".ko" in name:
                    stem = name[:name.index(".ko")].replace("-", "_")
                    self._files[stem] = os.path.join(root, name)

    def load_order(self, wanted):
        """[(file name without .ko, ELF image, names of what it needs)] so that everything comes after what it needs."""
        done = {}

        def visit(name):
            name = name.replace("-", "_")
            if name in done:
                return
            path = self._files.get(name)
            if not path:
                raise FileNotFoundError(f"this kernel has no module {name}")
            image = read_module(path)
            needs = []
            for tag in image.split(b"\0"):
                if tag.startswith(b"depends="):
                    needs = [needed.replace("-", "_") for needed in tag[8:].decode().split(",") if needed]
                    break
            for needed in needs:
                visit(needed)
            base = os.path.basename(path)
            done[name] = base[:base.index(".ko")], image, needs

        for name in wanted:
            visit(name)
        return [(stem, image, [done[n][0] for n in needs]) for stem, image, needs in done.values()]
