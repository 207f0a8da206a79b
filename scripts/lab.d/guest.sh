# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
#
# The kernel of the levels between L0 and the payload: same source as the stock kernel, configuration of its own
# (scripts/guest.config), and a build tree that the module can be built against as well.

# use_guest: set GUEST_DIR and GVER for the kernel $KVER.
use_guest() {
	GUEST_DIR=$CACHE/guest-$KVER-$(key "$SCRIPTS/guest.config" "$KVER" layout-1)
	GVER=
	[ ! -s "$GUEST_DIR/release" ] || GVER=$(cat -- "$GUEST_DIR/release")
}

# guest.config has the newest kernel's names. What older kernels call the same symbol is set as well; a kernel ignores
# the name that it does not know.
GUEST_OLD_NAMES='CONFIG_PROC_SYSCTL=y' # CONFIG_SYSCTL, before 7.3

# configure_guest: allnoconfig with our lines on top; a line that Kconfig did not follow is an error, because a
# missing symbol shows only much later, as a guest that hangs or a module that does not load.
configure_guest() {
	local build=$1 line name bad=0
	if ! { cat -- "$SCRIPTS/guest.config" && printf '%s\n' "$GUEST_OLD_NAMES"; } | cmp -s - "$build/guest.config"; then
		{ cat -- "$SCRIPTS/guest.config" && printf '%s\n' "$GUEST_OLD_NAMES"; } >"$build/guest.config"
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
	done <"$SCRIPTS/guest.config"
	if [ "$bad" -ne 0 ]; then
		rm -f -- "$build/guest.config"
		die "Kconfig of $KVER does not follow scripts/guest.config in the lines above" \
		    "A symbol was renamed or got a new dependency: mend the fragment."
	fi
}

# build_guest: vmlinux (stripped: the file that a VMM loads), bzImage, System.map, modules.
build_guest() {
	local build=$GUEST_DIR/build dir=/cache/${GUEST_DIR##*/} release
	mkdir -p -- "$GUEST_DIR"
	copy_source "$build"
	configure_guest "$build"
	kmake "$dir/build" bzImage modules
	release=$(cat -- "$build/include/config/kernel.release")
	# Everything out of vmlinux that is not loaded, and BTF stays because it is: 17 MB instead of 110.
	enter "$dir" objcopy -S build/vmlinux vmlinux.part
	mv -- "$GUEST_DIR/vmlinux.part" "$GUEST_DIR/vmlinux"
	cp -- "$build/arch/x86/boot/bzImage" "$build/System.map" "$GUEST_DIR/"
	cp -- "$build/.config" "$GUEST_DIR/config"
	rm -rf -- "$GUEST_DIR/modules" "$GUEST_DIR/modules.part"
	kmake "$dir/build" INSTALL_MOD_PATH="$dir/modules.part" INSTALL_MOD_STRIP=1 modules_install
	mv -- "$GUEST_DIR/modules.part/lib/modules/$release" "$GUEST_DIR/modules"
	rm -rf -- "$GUEST_DIR/modules.part" "$GUEST_DIR/modules/build"
	# The objects are a good 1.5 GB and the M= builds need none of them.
	find "$build" \( -name '*.o' -o -name '*.a' -o -name '.*.o.cmd' \) \
		! -path "$build/scripts/*" ! -path "$build/tools/*" ! -path "$build/rust/*" -type f -delete
	printf '%s\n' "$release" | write_file "$GUEST_DIR/release"
	mark_ready "$GUEST_DIR"
}
