# SPDX-License-Identifier: GPL-2.0
"""Turns addresses into function names, from ELF files, System.map, or /proc/kallsyms."""

import bisect
import re
import struct

SHF_ALLOC, SHN_LORESERVE = 2, 0xFF00
STT_NOTYPE, STT_FUNC = 0, 2


class Symbols:
    """A sorted table of (address, name)."""

    def __init__(self):
        self._table = {}
        self._sorted = None

    def add(self, address, name):
        """One symbol. Of two at one address the first stays."""
        self._table.setdefault(address, name.removeprefix("__pi_"))
        self._sorted = None

    def find(self, address):
        """(start, name) of the function ADDRESS lies in, or None."""
        if self._sorted is None:
            self._sorted = sorted(self._table)
        at = bisect.bisect_right(self._sorted, address) - 1
        if at < 0:
            return None
        start = self._sorted[at]
        if address - start > 1 << 20:   # nothing is that long: a gap between tables
            return None
        return start, self._table[start]

    def map(self, path):
        """System.map or /proc/kallsyms; modules' symbols are taken as well. Symbols of data are left out."""
        with open(path, encoding="utf-8", errors="replace") as f:
            for line in f:
                fields = line.split()
                # 0 hides addresses; __pfx_ symbols are the padding before a function
                if len(fields) < 3 or fields[1] not in "tTwWvV" or fields[2].startswith("__pfx_"):
                    continue
                address = int(fields[0], 16)
                if address:
                    self.add(address, fields[2])
        return self

    def elf(self, path, sections=None):
        """An ELF file; a module if SECTIONS says where each of its sections was loaded."""
        with open(path, "rb") as f:
            data = f.read()
        if data[:5] != b"\x7fELF\x02":
            raise ValueError(f"{path} is not a 64-bit ELF file")
        shoff, = struct.unpack_from("<Q", data, 0x28)
        shentsize, shnum, shstrndx = struct.unpack_from("<HHH", data, 0x3A)
        headers = [struct.unpack_from("<IIQQQQIIQQ", data, shoff + i * shentsize) for i in range(shnum)]

        def string(table, offset):
            start = headers[table][4] + offset
            return data[start:data.index(b"\0", start)].decode()

        names = [string(shstrndx, h[0]) for h in headers]
        for header in headers:
            if header[1] != 2:      # SHT_SYMTAB
                continue
            for offset in range(header[4], header[4] + header[5], 24):
                name, info, _, index, value, _ = struct.unpack_from("<IBBHQQ", data, offset)
                if info & 15 not in (STT_NOTYPE, STT_FUNC) or not 0 < index < SHN_LORESERVE or not name:
                    continue
                text = string(header[6], name)
                if not headers[index][2] & 4 or text.startswith(("__pfx_", ".L", "$")):     # SHF_EXECINSTR
                    continue
                if sections is not None:
                    if names[index] not in sections:
                        continue
                    value += sections[names[index]]
                self.add(value, text)
        return self


def module_sections(path):
    """What a log says about modules in guests: {level: {module: {section: address}}}.

    Lines `mtk-section LEVEL MODULE SECTION ADDRESS`, printed by the tool as first process of a guest
    whose command line has mtk.sections.
    """
    found = {}
    with open(path, encoding="utf-8", errors="replace") as f:
        for line in f:
            match = re.search(r"mtk-section (\d+) (\S+) (\S+) (?:0x)?([0-9a-f]+)", line)
            if match:
                level, module, section, address = match.groups()
                found.setdefault(int(level), {}).setdefault(module, {})[section] = int(address, 16)
    return found
