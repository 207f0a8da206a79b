# SPDX-License-Identifier: GPL-2.0
#
# `make help` says what there is. Kbuild has the module itself; this file is for people.

OUT := $(CURDIR)/out
LAB := scripts/lab
EMU := scripts/emu

# A kernel that the mirror offers, instead of the newest one.
KERNEL ?=
export KERNEL

# What `make run` and `make bench` measure.
DEPTHS ?= 1,2,3
CONFIGS ?= stock,idle,l0
OPS ?= hypercall,cpuid,vmread_unshadowed,vmptrld_switch,touch_cold
# What `make profile` looks into, and in which configuration: stock, idle, l0 or all.
OP ?= hypercall
DEPTH ?= 2
CONFIG ?= stock

# For the kernel that this machine runs, or another one's tree.
KVER ?= $(shell uname -r)
KDIR ?= /lib/modules/$(KVER)/build

emu = $(EMU) run $(if $(KERNEL),--kernel $(KERNEL)) --out $(OUT)/$(1)

.PHONY: help
help:
	@echo 'Matryoshka: cheap nested virtualization, at every depth.'
	@echo ''
	@echo 'In the lab (an emulated host with VMX on a stock Debian kernel; needs no VMX of this machine):'
	@echo '  make run       stock KVM and Matryoshka side by side, as L1, L2 and L3; writes out/bench.json'
	@echo '  make test      everything that can be tested, ending in one table'
	@echo '  make soak TIME=8h   the tests that have chance in them, with other seeds until the time is over'
	@echo '  make sanitize  the tests on kernels with KASAN, lockdep, kmemleak and KCSAN, and those that take'
	@echo '                 long: make sanitize PARTS="kasan-stress kcsan" (scripts/sanitize --list)'
	@echo '  make bench     as make run, with every operation, or those that you choose:'
	@echo '                   make bench DEPTHS=2 CONFIGS=stock,l0 OPS=hypercall,touch_cold'
	@echo '  make profile   which kernel functions an operation spends its instructions in:'
	@echo '                   make profile OP=hypercall DEPTH=2 CONFIG=l0 (stock, idle, l0 or all)'
	@echo '  make fuzz      random programs with and without the module, for hours: make fuzz PROGRAMS=100000'
	@echo '  make xen       Debian'"'"'s Xen as L1 instead of a KVM, with and without the module'
	@echo '  make shell     a shell on the emulated host, with the module and the tool at hand'
	@echo '  make lab       only set it up: once, cached in $${MATRYOSHKA_CACHE:-~/.cache/matryoshka}'
	@echo '  KERNEL=V       with any of these: another kernel than the newest (scripts/lab kernels lists them)'
	@echo ''
	@echo 'On a host with VMX, as root:'
	@echo '  make modules           build matryoshka.ko for the running kernel'
	@echo '                           make modules KDIR=/path/to/a/prepared/kernel/tree'
	@echo '  make modules_install   install it below /lib/modules; then: modprobe matryoshka'
	@echo '  make install           the tool and what it starts guests from (make build first); then:'
	@echo '                           matryoshka doctor. DESTDIR= and PREFIX= (/usr/local) as usual'
	@echo '  make -C selftests run_tests       every selftest; `host` suspends the machine, unplugs CPU 1 and swaps, so name'
	@echo '                           others where that must not be: make -C selftests run_tests TESTS="load sysfs"'
	@echo '  make uninstall         remove what make install put there'
	@echo ''
	@echo 'While changing something:'
	@echo '  make check     the part of `make test` that boots nothing: unit and property tests, formatting,'
	@echo '                 lints, the module with W=1'
	@echo '  make build     compile the tool, the payload and the modules in the lab'
	@echo '  make clean     remove out/; make distclean also the lab'

# --- in the lab ---

.PHONY: lab build run bench profile shell test soak sanitize check fuzz xen
lab:
	@$(LAB) setup $(if $(KERNEL),--kernel $(KERNEL))

build: lab
	@$(LAB) build $(if $(KERNEL),--kernel $(KERNEL))

# What was measured is kept also if the benchmark has something to complain of.
keep = status=$$?; [ ! -f $(OUT)/$@/bench.json ] || { mv $(OUT)/$@/bench.json $(OUT)/bench.json && \
	echo 'written to out/bench.json'; }; exit $$status

run: build
	@$(call emu,run) -- matryoshka bench --depth $(DEPTHS) --config $(CONFIGS) --ops $(OPS) --pattern sequential --pages 512 --json /out/bench.json; $(keep)

# With no choice made, bench measures every operation and run the few that tell most.
ALL_OPS = $(if $(filter file,$(origin OPS)),every,$(OPS))

bench: build
	@$(call emu,bench) -- matryoshka bench --depth $(DEPTHS) --config $(CONFIGS) --ops $(ALL_OPS) --json /out/bench.json; $(keep)

profile: build
	@scripts/profile $(OP) --depth $(DEPTH) --config $(CONFIG) $(if $(KERNEL),--kernel $(KERNEL)) --out $(OUT)/profile

PROGRAMS ?= 100000
SEED ?= 1

fuzz: build
	@scripts/fuzz --programs $(PROGRAMS) --seed $(SEED)

xen:
	@scripts/xen

shell: build
	@$(EMU) shell $(if $(KERNEL),--kernel $(KERNEL))

test:
	@scripts/test

TIME ?= 30m
soak:
	@scripts/soak $(TIME)

PARTS ?=
sanitize:
	@scripts/sanitize $(PARTS)

check: lab
	@scripts/check

# --- for this machine's own kernel ---

.PHONY: modules modules_install dkms install uninstall
# The tree knows which kernel it is.
RELEASE = $(or $(shell cat $(KDIR)/include/config/kernel.release 2>/dev/null),$(KVER))
MODULES = $(OUT)/modules-$(RELEASE)
kbuild = $(MAKE) -C $(KDIR) $(shell scripts/check-kdir --flags $(KDIR)) M=$(CURDIR)
# The key that a distribution signs with is in no tree of ours; kbuild would complain of that and go on.
unsigned = $(if $(wildcard $(KDIR)/certs/signing_key.x509),,CONFIG_MODULE_SIG_ALL=)
# Nor is its System.map, without which kbuild leaves depmod out. Where there is no kernel beside the module (packages are
# put together so) it is left out here as well.
moddir = $(INSTALL_MOD_PATH)/lib/modules/$(RELEASE)
depmod = if [ ! -f $(KDIR)/System.map ] && [ -f $(moddir)/modules.builtin ]; then \
	depmod=$$(PATH=$$PATH:/usr/sbin:/sbin command -v depmod) && echo '  DEPMOD  $(moddir)' && \
	$$depmod $(if $(INSTALL_MOD_PATH),-b $(INSTALL_MOD_PATH)) $(RELEASE); fi

modules:
	@scripts/check-kdir $(KDIR)
	@mkdir -p $(MODULES)
	+$(kbuild) MO=$(MODULES) modules
	@echo 'built $(MODULES)/matryoshka.ko'

modules_install:
	@test -f $(MODULES)/matryoshka.ko || { echo 'nothing is built for kernel $(RELEASE) yet: make modules, with the same KDIR' >&2; exit 1; }
	+$(kbuild) $(unsigned) MO=$(MODULES) modules_install
	@$(depmod)

# dkms.conf calls this, with KVER and KDIR. DKMS sets CC, not always to what built the kernel.
dkms:
	@mkdir -p $(OUT)/dkms
	@if scripts/check-kdir $(KDIR) 2>/dev/null; then kdir=$(KDIR); else \
		kdir=$$(KDIR_HEADERS=$(KDIR) $(LAB) prepare-kdir --kernel $(KVER)) || exit 1; fi && \
	$(MAKE) -C $$kdir $$(CC= scripts/check-kdir --flags $$kdir) M=$(CURDIR) MO=$(OUT)/dkms modules

install:
	@scripts/install

uninstall:
	@scripts/install --remove

# --- cleaning ---

.PHONY: clean distclean
clean:
	rm -rf $(OUT)
	+@$(MAKE) -s -C selftests clean

distclean: clean
	@$(LAB) clean
