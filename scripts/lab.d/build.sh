# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
#
# Our own parts, built in the root file system. The compilers' output is the cache's; the checkout stays clean.

# use_builds: set TOOL, PAYLOAD, MODULE, TEST_MODULES, GUEST_MODULE to where the builds for $KVER (or the kernel that looks for mistakes) and
# $GVER put them.
use_builds() {
	local target=$CACHE/target-$CHECKOUT/x86_64-unknown-linux-gnu/release
	TOOL=$target/matryoshka
	PAYLOAD=$target/payload
	MODULE_DIR=$CACHE/mod-$KVER-$(key "$KVER" host "$CHECKOUT" layout-1)
	if [ -n "${MATRYOSHKA_DEBUG:-}" ]; then
		use_debug "$MATRYOSHKA_DEBUG"
		MODULE_DIR=$CACHE/mod-$DVER-$(key "${DEBUG_DIR##*/}" "$CHECKOUT" layout-1)
	fi
	MODULE=$MODULE_DIR/matryoshka.ko
	TEST_MODULES=$MODULE_DIR/test_modules
	GUEST_MODULE_DIR=$CACHE/mod-$GVER-$(key "${GUEST_DIR##*/}" "$CHECKOUT" layout-1)
	GUEST_MODULE=$GUEST_MODULE_DIR/matryoshka.ko
	GUEST_MODULE_STRIPPED=$GUEST_MODULE_DIR/stripped.ko
}

# fetch_crates: what Cargo.lock names comes into the cache, so that later builds need no network. Skipped when the
# lock file did not change since.
fetch_crates() {
	local sum
	[ -f "$PROJECT/rust/Cargo.lock" ] || return 0
	sum=$(key "$PROJECT/rust/Cargo.lock")
	[ "$(cat -- "$CACHE/cargo/.fetched" 2>/dev/null)" != "$sum" ] || return 0
	enter /src/rust cargo fetch --locked --target x86_64-unknown-linux-gnu ||
		die "the crates of rust/Cargo.lock could not be fetched" \
		    "Is there a network? A registry mirror configured in ~/.cargo/config.toml is used here as well."
	printf '%s\n' "$sum" | write_file "$CACHE/cargo/.fetched"
}

# build_tool: rust/build decides how, when there is one; else everything that is a default member of the workspace.
build_tool() {
	mkdir -p -- "$CACHE/cargo"
	fetch_crates
	if [ -x "$PROJECT/rust/build" ]; then
		enter /src/rust env CARGO_NET_OFFLINE=true ./build "$@"
	else
		enter /src/rust env CARGO_NET_OFFLINE=true \
			CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS='-C target-feature=+crt-static' \
			cargo build --release --locked --target x86_64-unknown-linux-gnu "$@"
	fi
}

# kbuild DIR SOURCE OUTPUT RELEASE MAKE-ARGUMENT...: build the module in the directory SOURCE of the checkout against the tree DIR
# into OUTPUT.
kbuild() {
	local dir=$1 source=$2 output=$3 release=$4
	local -a args=()
	shift 4
	# Debian's release string is not derivable from its source tree; that of the guest kernel is.
	[ -z "$release" ] || args+=("KERNELRELEASE=$release")
	mkdir -p -- "$output"
	# pahole leaves Rust's types out, and resolve_btfids fails on the empty rest: the module goes without BTF of its own.
	kmake "/cache/${dir#"$CACHE/"}" "${args[@]}" M="/src$source" MO="/cache/${output#"$CACHE/"}" \
		CONFIG_DEBUG_INFO_BTF_MODULES= "$@" modules
}

# kbuild_host SOURCE OUTPUT MAKE-ARGUMENT...: for the kernel that is L0.
kbuild_host() {
	local source=$1 output=$2
	shift 2
	if [ -n "${MATRYOSHKA_DEBUG:-}" ]; then KERNEL_CC=${DEBUG_CC:-$KERNEL_CC} kbuild "$DEBUG_DIR/build" "$source" "$output" '' "$@"
	else kbuild "$KERNEL_DIR/build" "$source" "$output" "$KVER" "$@"; fi
}

# Beside the module, what selftests load: a livepatch, where the kernel knows of such.
build_module_host() {
	kbuild_host '' "$MODULE_DIR" "$@"
	if [ -d "$PROJECT/selftests/test_modules" ] && grep -qxE 'CONFIG_(LIVEPATCH|KCSAN)=y' "${DEBUG_DIR:-$KERNEL_DIR}/build/.config"; then
		kbuild_host /selftests/test_modules "$TEST_MODULES" "$@"
	fi
}

# Guests get it without what only debuggers read, a seventh of the size: they hold the file in memory, and once more while they load it.
build_module_guest() {
	kbuild "$GUEST_DIR/build" '' "$GUEST_MODULE_DIR" '' "$@"
	[ "$GUEST_MODULE_STRIPPED" -nt "$GUEST_MODULE" ] || {
		enter "/cache/${GUEST_MODULE_DIR##*/}" objcopy --strip-debug matryoshka.ko stripped.ko.part
		mv -- "$GUEST_MODULE_STRIPPED.part" "$GUEST_MODULE_STRIPPED"
	}
}

# in_build tool|host|guest [ARGUMENT...]: one build, its output going straight to the user.
in_build() {
	local what=$1
	shift
	find_root
	use_kernel "$(wanted_kernel)"
	use_guest
	use_builds
	case $what in
	tool) build_tool "$@" ;;
	host | guest) "build_module_$what" "$@" ;;
	esac
}

# prepare_build VERSION LOCK: everything that a build needs is there, or we say what to do.
prepare_build() {
	need_x86_64
	[ -z "$1" ] || export KERNEL=$1
	find_root
	if inside || ! ready "$ROOT" || [ -z "$(wanted_kernel)" ]; then
		! inside || die "builds start outside the root file system" "Leave it, and run the same command there."
		die "the lab is not set up" "Run: scripts/lab setup"
	fi
	use_kernel "$(wanted_kernel)"
	take_lock "$2"
}

cmd_build_tool() {
	[ "${1:-}" != -- ] || shift
	prepare_build '' tool
	ns_run --int "$LAB" __build tool "$@"
	use_guest
	use_builds
	[ ! -f "$TOOL" ] || note "built $TOOL"
}

cmd_build_module() {
	local which='host guest' version='' one
	while [ $# -gt 0 ]; do
		case $1 in
		--for) case ${2:-} in host | guest) which=$2 ;; *) usage_error "--for takes host or guest" ;; esac; shift 2 ;;
		--for=*) set -- --for "${1#*=}" "${@:2}" ;;
		--kernel) [ -n "${2:-}" ] || usage_error "--kernel takes a version"; version=$2; shift 2 ;;
		--kernel=?*) version=${1#*=}; shift ;;
		--kernel=) usage_error "--kernel takes a version" ;;
		--) shift; break ;;
		*) usage_error "build-module: no such option: $1" ;;
		esac
	done
	prepare_build "$version" module
	[ -f "$PROJECT/Kbuild" ] || die "there is no Kbuild in $PROJECT, so there is no module to build"
	use_guest
	for one in $which; do
		case $one in
		host) ready "$KERNEL_DIR" && { [ -z "${MATRYOSHKA_DEBUG:-}" ] || { use_debug "$MATRYOSHKA_DEBUG" && debug_ready; }; } ;;
		guest) ready "$GUEST_DIR" ;;
		esac || die "the $one kernel for $KVER is not in the lab" "Run: scripts/lab setup --kernel $KVER"
		ns_run --int "$LAB" __build "$one" "$@"
		use_builds
		if [ "$one" = host ]; then note "built $MODULE"; else note "built $GUEST_MODULE"; fi
	done
}

cmd_build() {
	local version=''
	while [ $# -gt 0 ]; do
		case $1 in
		--kernel) version=${2:-}; shift ;;
		--kernel=*) version=${1#*=} ;;
		*) usage_error "build: no such option: $1" ;;
		esac
		[ -n "$version" ] || usage_error "--kernel takes a version"
		shift
	done
	cmd_build_tool --
	cmd_build_module ${version:+--kernel "$version"}
}
