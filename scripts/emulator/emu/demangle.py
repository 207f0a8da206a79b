# SPDX-License-Identifier: GPL-2.0
"""Rust's names as people write them. binutils' c++filt knows how; where this machine has none, the lab has."""

import os
import re
import shutil
import subprocess

LAB = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))), "lab")


def readable(names):
    """{mangled: readable} for those of NAMES that are mangled and understood."""
    mangled = sorted(name for name in names if name.startswith(("_R", "_ZN")))
    if not mangled:
        return {}
    filt = ["c++filt"] if shutil.which("c++filt") else [LAB, "exec", "--", "c++filt"]
    try:
        done = subprocess.run(filt, input="\n".join(mangled) + "\n", stdout=subprocess.PIPE, text=True, check=False)
    except OSError:
        return {}
    lines = done.stdout.splitlines()
    if done.returncode or len(lines) != len(mangled):
        return {}
    return {name: _plain(line) for name, line in zip(mangled, lines)}


def _plain(name):
    """Without what tells two builds of a crate apart, and without the character that separates folded stacks."""
    name = re.sub(r"\[[0-9a-f]{1,16}\](?=::)", "", name)
    name = re.sub(r"::h[0-9a-f]{16}\b", "", name)
    return name.replace(";", ",").replace("matryoshka_main::", "matryoshka::")
