// SPDX-License-Identifier: GPL-2.0
//! Not written yet.
#![no_std]
