# SPDX-License-Identifier: GPL-2.0
"""Turns addresses into function names, from ELF files, System.map, or /proc/kallsyms."""

import bisect
import collections
import struct

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

    def elf(self, path):
        """An ELF program."""
        for value, name in _functions(path)[0]:
            self.add(value, name)
        return self

    def module(self, path, targets):
        """A kernel module that was loaded somewhere: at the page from which most of TARGETS are its functions' entries.

        Nobody has to ask the guest where its modules are. True if they were found.
        """
        functions, _ = _functions(path, relocatable=True)
        votes = collections.Counter()
        by_page_offset = collections.defaultdict(list)
        for offset, _ in functions:
            by_page_offset[offset & 0xFFF].append(offset)
        for target in targets:
            votes.update({target - offset for offset in by_page_offset[target & 0xFFF]})
        ranked = votes.most_common(2)
        if not ranked or ranked[0][1] < 3 or (len(ranked) == 2 and ranked[0][1] == ranked[1][1]):
            return False
        for offset, name in functions:
            self.add(ranked[0][0] + offset, name)
        return True


def _functions(path, relocatable=False):
    """([(address, name)] of an ELF file's functions, size of its text); for a module offsets into its text as the kernel lays it out."""
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

    bases, end = {}, 0
    for index, header in enumerate(headers):
        if header[2] & 6 != 6:      # SHF_ALLOC and SHF_EXECINSTR
            continue
        if not relocatable:
            bases[index] = 0
        elif not string(shstrndx, header[0]).startswith(".init"):
            align = header[8] or 1
            bases[index] = -(-end // align) * align     # as the kernel's layout_sections() does
            end = bases[index] + header[5]
    found = []
    for header in headers:
        if header[1] != 2:      # SHT_SYMTAB
            continue
        for offset in range(header[4], header[4] + header[5], 24):
            name, info, _, index, value, _ = struct.unpack_from("<IBBHQQ", data, offset)
            if info & 15 not in (STT_NOTYPE, STT_FUNC) or index not in bases or not name:
                continue
            text = string(header[6], name)
            if not text.startswith(("__pfx_", ".L", "$")):
                found.append((bases[index] + value, text))
    return found, end
