# SPDX-License-Identifier: GPL-2.0
"""Writes initramfs images (the kernel's "newc" cpio) without root and without copying files first."""

import os
import stat


class Cpio:
    """A cpio archive being written to a file. Parent directories are made as needed."""

    def __init__(self, path):
        self._out = open(path, "wb")
        self._ino = 0
        self._dirs = set()
        self._seen = set()

    def _entry(self, name, mode, data=b"", rdev=(0, 0)):
        self._ino += 1
        encoded = name.encode() + b"\0"
        fields = (self._ino, mode, 0, 0, 2 if stat.S_ISDIR(mode) else 1, 0, len(data),
                  0, 0, rdev[0], rdev[1], len(encoded), 0)
        self._out.write(b"070701" + b"".join(b"%08x" % f for f in fields) + encoded)
        self._pad(110 + len(encoded))
        self._out.write(data)
        self._pad(len(data))

    def _pad(self, length):
        self._out.write(b"\0" * (-length % 4))

    def directory(self, name):
        """Make NAME and what is above it."""
        name = name.strip("/")
        if not name or name in self._dirs:
            return
        self.directory(os.path.dirname(name))
        self._dirs.add(name)
        self._entry(name, stat.S_IFDIR | 0o755)

    def data(self, name, data, mode=0o644):
        """A regular file with the given content. The first of two of one name wins."""
        name = name.strip("/")
        if name in self._seen:
            return
        self._seen.add(name)
        self.directory(os.path.dirname(name))
        self._entry(name, stat.S_IFREG | mode, data)

    def link(self, name, target):
        """A symbolic link."""
        name = name.strip("/")
        if name in self._seen:
            return
        self._seen.add(name)
        self.directory(os.path.dirname(name))
        self._entry(name, stat.S_IFLNK | 0o777, target.encode())

    def device(self, name, kind, major, minor):
        """A device node; KIND is stat.S_IFCHR or stat.S_IFBLK."""
        name = name.strip("/")
        self.directory(os.path.dirname(name))
        self._entry(name, kind | 0o600, rdev=(major, minor))

    def copy(self, source, name):
        """SOURCE (a file or a whole directory) becomes NAME, with its mode."""
        if os.path.isdir(source):
            self.directory(name)
            for entry in sorted(os.listdir(source)):
                path = os.path.join(source, entry)
                if os.path.islink(path) and os.path.isdir(path):
                    self.link(f"{name}/{entry}", os.readlink(path))
                else:
                    self.copy(path, f"{name}/{entry}")
            return
        with open(source, "rb") as f:
            self.data(name, f.read(), os.stat(source).st_mode & 0o777)

    def close(self):
        """Finish the archive; the kernel wants it padded."""
        self._ino = -1
        self._entry("TRAILER!!!", 0)
        self._pad(self._out.tell())
        self._out.close()
