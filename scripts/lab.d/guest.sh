# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
#
# Kernels of our own configuration, from the same source as the stock kernel, each with a build tree that the module can be
# built against as well: the one of the levels between L0 and the payload (scripts/guest.config), and those that look for
# mistakes as L0 (the same, with scripts/debug-KIND.config on top).

# use_guest: set GUEST_DIR and GVER for the kernel $KVER.
use_guest() {
	GUEST_DIR=$CACHE/guest-$KVER-$(key "$SCRIPTS/guest.config" "$KVER" layout-1)
	GVER=
	[ ! -s "$GUEST_DIR/release" ] || GVER=$(cat -- "$GUEST_DIR/release")
}

# guest.config has the newest kernel's names. What older kernels call the same symbol is set as well; a kernel ignores
# the name that it does not know.
GUEST_OLD_NAMES='CONFIG_PROC_SYSCTL=y' # CONFIG_SYSCTL, before 7.3

# use_debug KIND: set DEBUG_DIR and DVER for the kernel $KVER that looks for the mistakes that KIND says.
use_debug() {
	DEBUG_KIND=$1
	[ -f "$SCRIPTS/debug-$1.config" ] || die "there is no kernel of the kind $1" "Kinds: $(debug_kinds)"
	# Where rustc instruments as well, its LLVM and the C compiler's must be one.
	DEBUG_CC=$(sed -n 's/^# CC=//p' "$SCRIPTS/debug-$1.config")
	DEBUG_DIR=$CACHE/debug-$1-$KVER-$(key "$SCRIPTS/guest.config" "$SCRIPTS/debug-$1.config" "$KVER" layout-3)
	DVER=
	[ ! -s "$DEBUG_DIR/release" ] || DVER=$(cat -- "$DEBUG_DIR/release")
}

# debug_ready: that kernel is built, with the functions kept that the module of this checkout hooks or calls.
debug_ready() { ready "$DEBUG_DIR" && [ "$(cat -- "$DEBUG_DIR/build/functions.kept")" = "$(kept_functions)" ]; }

# debug_kinds: what there is, in a line.
debug_kinds() {
	local file
	for file in "$SCRIPTS"/debug-*.config; do
		file=${file##*/debug-}
		printf '%s ' "${file%.config}"
	done
}

# merged FRAGMENT...: the fragments as one; of a symbol that several name, the last line.
merged() {
	awk '
		/^CONFIG_[A-Z0-9_]*=/ { name = substr($0, 1, index($0, "=") - 1) }
		/^# CONFIG_[A-Z0-9_]* is not set/ { name = $2 }
		!/^CONFIG_/ && !/^# CONFIG_/ { next }
		!(name in line) { order[++n] = name }
		{ line[name] = $0 }
		END { for (i = 1; i <= n; i++) print line[order[i]] }
	' "$@"
}

# kept_functions: the names of all functions of KVM's that the module hooks or calls, as alternatives of a pattern.
kept_functions() {
	sed -nE 's/^\t(HOOK|CALL)\([a-z0-9_]+, [a-z_]+, ([A-Za-z0-9_]+), .*/\2/p' "$SCRIPTS/../include/hooks.h" | sort -u | paste -sd'|'
}

# keep_functions BUILD: what the module hooks or calls stays a function of its own. Stock's compiler, with stock's options,
# leaves it alone; another one inlines a few, and the paths that need them would stay off in a kernel made to test them.
keep_functions() {
	local build=$1 names types='([a-z_0-9]+ )*[a-z_0-9]+ \*?'
	names=$(kept_functions)
	[ "$(cat -- "$build/functions.kept" 2>/dev/null)" != "$names" ] || return 0
	[ -n "$names" ] || die "include/hooks.h has no table" "Is this checkout complete? git status"
	find "$build/arch/x86/kvm" "$build/virt/kvm" -name '*.[ch]' -exec sed -i -E \
		-e "s/^static (inline |__always_inline )?($types)($names)\(/static noinline \2\4(/" {} +
	find "$build/arch/x86/kvm" "$build/virt/kvm" -name '*.c' -exec sed -i -E \
		-e "/^static/!s/^($types)($names)\(/noinline \1\3(/" {} +
	printf '%s\n' "$names" | write_file "$build/functions.kept"
}

# let_rustc_report BUILD: rustc's instrumentation for a race detector of user space calls what KCSAN defines, as clang's does,
# but the kernel does not offer it for its target. All crates must be built for the very same target, so this one says that it
# could; Kbuild asks for it for the module alone.
let_rustc_report() {
	local file=$1/scripts/generate_rust_target.rs
	! grep -q '"kernel-address", "thread"\]' "$file" || return 0
	sed -i '/"supported-sanitizers"/s/"kernel-address"\]/"kernel-address", "thread"]/' "$file"
	grep -q '"kernel-address", "thread"\]' "$file" ||
		die "scripts/generate_rust_target.rs of $KVER is not as expected" "Mend let_rustc_report in scripts/lab.d/guest.sh."
}

# configure_own BUILD FRAGMENT...: allnoconfig with our lines on top; a line that Kconfig did not follow is an error, because a
# missing symbol shows only much later, as a guest that hangs or a module that does not load.
configure_own() {
	local build=$1 line name bad=0
	shift
	if ! { merged "$@" && printf '%s\n' "$GUEST_OLD_NAMES"; } | cmp -s - "$build/guest.config"; then
		{ merged "$@" && printf '%s\n' "$GUEST_OLD_NAMES"; } >"$build/guest.config"
		kmake "/cache/${build#"$CACHE/"}" KCONFIG_ALLCONFIG=guest.config allnoconfig
	fi
	while read -r line; do
		case $line in
		'# CONFIG_'*' is not set')
			name=${line#\# } name=${name%% *}
			! grep "^$name=" "$build/.config" || { echo "guest.config wants $name off"; bad=1; } ;;
		CONFIG_*)
			grep -qxF -- "$line" "$build/.config" || { echo "guest.config wants $line"; bad=1; } ;;
		esac
	done < <(merged "$@")
	if [ "$bad" -ne 0 ]; then
		rm -f -- "$build/guest.config"
		die "Kconfig of $KVER does not follow ${*##*/} in the lines above" \
		    "A symbol was renamed or got a new dependency: mend the fragment."
	fi
}

# build_own DIR FRAGMENT...: vmlinux (stripped: the file that a VMM loads), bzImage, System.map, modules.
build_own() {
	local own=$1 build=$1/build dir=/cache/${1##*/} release
	shift
	mkdir -p -- "$own"
	copy_source "$build"
	configure_own "$build" "$@"
	kmake "$dir/build" bzImage modules
	release=$(cat -- "$build/include/config/kernel.release")
	# Everything out of vmlinux that is not loaded, and BTF stays because it is: 17 MB instead of 110.
	enter "$dir" objcopy -S build/vmlinux vmlinux.part
	mv -- "$own/vmlinux.part" "$own/vmlinux"
	cp -- "$build/arch/x86/boot/bzImage" "$build/System.map" "$own/"
	cp -- "$build/.config" "$own/config"
	rm -rf -- "$own/modules" "$own/modules.part"
	kmake "$dir/build" INSTALL_MOD_PATH="$dir/modules.part" INSTALL_MOD_STRIP=1 modules_install
	mv -- "$own/modules.part/lib/modules/$release" "$own/modules"
	rm -rf -- "$own/modules.part" "$own/modules/build"
	printf '%s\n' "$release" | write_file "$own/release"
	mark_ready "$own"
}

build_guest() {
	build_own "$GUEST_DIR" "$SCRIPTS/guest.config"
	# The objects are a good 1.5 GB and the M= builds need none of them.
	find "$GUEST_DIR/build" \( -name '*.o' -o -name '*.a' -o -name '.*.o.cmd' \) \
		! -path '*/build/scripts/*' ! -path '*/build/tools/*' ! -path '*/build/rust/*' -type f -delete
}

# build_debug: L0's boot loader and the emulator's runner look for it under the names that a stock kernel has. The objects stay,
# some 4 GB: a hook more, and only KVM is built again.
build_debug() {
	local KERNEL_CC=${DEBUG_CC:-$KERNEL_CC}
	mkdir -p -- "$DEBUG_DIR"
	copy_source "$DEBUG_DIR/build"
	keep_functions "$DEBUG_DIR/build"
	! grep -q '^CONFIG_KCSAN=y' "$SCRIPTS/debug-$DEBUG_KIND.config" || let_rustc_report "$DEBUG_DIR/build"
	build_own "$DEBUG_DIR" "$SCRIPTS/guest.config" "$SCRIPTS/debug-$DEBUG_KIND.config"
	ln -sf bzImage "$DEBUG_DIR/vmlinuz"
}
