# SPDX-License-Identifier: GPL-2.0
"""Boots a stock kernel as L0 in the emulator, runs a command there and brings back what it left."""
