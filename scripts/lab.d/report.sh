# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
#
# What is where, what is missing, and how to get rid of it.

# assign NAME PATH: NAME=PATH if it is there, NAME= if not.
assign() {
	if [ -e "$2" ]; then printf '%s=%q\n' "$1" "$2"; else printf '%s=\n' "$1"; fi
}

cmd_paths() {
	local version
	while [ $# -gt 0 ]; do
		case $1 in
		--kernel) [ -n "${2:-}" ] || usage_error "--kernel takes a version"; export KERNEL=$2; shift 2 ;;
		--kernel=?*) export KERNEL=${1#*=}; shift ;;
		--kernel=) usage_error "--kernel takes a version" ;;
		*) usage_error "paths: no such option: $1" ;;
		esac
	done
	version=$(wanted_kernel)
	[ -n "$version" ] || die "the lab is not set up" "Run: scripts/lab setup"
	find_root
	use_kernel "$version"
	ready "$KERNEL_DIR" || [ -f "$KERNEL_DIR/vmlinuz" ] ||
		die "kernel $KVER is not in the lab" "Run: scripts/lab setup --kernel $KVER"
	use_guest
	use_emu
	use_builds
	printf 'CACHE=%q\n' "$CACHE"
	assign ROOT "$ROOT"
	printf 'KVER=%q\n' "$KVER"
	if [ -n "${MATRYOSHKA_DEBUG:-}" ]; then
		debug_ready || die "the kernel $MATRYOSHKA_DEBUG is not in the lab" "Run: MATRYOSHKA_DEBUG=$MATRYOSHKA_DEBUG scripts/lab setup"
		KERNEL_DIR=$DEBUG_DIR
	fi
	assign KERNEL "$KERNEL_DIR"
	assign KMODULES "$KERNEL_DIR/modules"
	assign KBUILD "$KERNEL_DIR/build"
	printf 'GVER=%q\n' "$GVER"
	if ready "$GUEST_DIR"; then
		assign GUEST "$GUEST_DIR"
		assign GUEST_MODULES "$GUEST_DIR/modules"
		assign GUEST_KBUILD "$GUEST_DIR/build"
	else
		printf 'GUEST=\nGUEST_MODULES=\nGUEST_KBUILD=\n'
	fi
	if [ -n "$EMU_DIR" ]; then assign EMU "$EMU_DIR"; else printf 'EMU=\n'; fi
	assign TOOL "$TOOL"
	assign PAYLOAD "$PAYLOAD"
	assign MODULE "$MODULE"
	assign TEST_MODULES "$TEST_MODULES"
	assign GUEST_MODULE "$GUEST_MODULE"
	assign GUEST_MODULE_STRIPPED "$GUEST_MODULE_STRIPPED"
}

# check TEXT COMMAND...: a line of the doctor's report.
check() {
	local text=$1 why
	shift
	if why=$( ("$@") 2>&1); then
		printf '  ok       %s\n' "$text"
	else
		printf '  missing  %s\n' "$text"
		# shellcheck disable=SC2001
		sed 's/^/           /' <<<"${why:-no further word on it}"
		DOCTOR=1
	fi
}

has_mmdebstrap() {
	command -v mmdebstrap >/dev/null || [ -x "$CACHE/mmdebstrap/usr/bin/mmdebstrap" ] || {
		command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null && command -v perl >/dev/null
	} || die "mmdebstrap is not installed and, without apt, dpkg and perl, cannot be fetched" "Install mmdebstrap."
}

has_keyring() {
	local file
	for file in /usr/share/keyrings/debian-archive-keyring.*; do [ ! -e "$file" ] || return 0; done
	die "this machine has no keyring of the Debian archive" "apt-get install debian-archive-keyring"
}

has_memory() {
	local mib
	mib=$(awk '/^MemTotal:/ { print int($2 / 1024) }' /proc/meminfo)
	[ "$mib" -ge 3600 ] || die "$mib MiB of memory, and the lab wants 4 GiB"
}

has_space() { ready "$ROOT" || need_space 15; need_space 2; }

has_root() { ready "$ROOT" || die "not set up" "Run: scripts/lab setup"; }

has_kernel() {
	local version
	version=$(wanted_kernel)
	[ -n "$version" ] && use_kernel "$version" && ready "$KERNEL_DIR" && use_guest && ready "$GUEST_DIR" ||
		die "not set up" "Run: scripts/lab setup"
}

has_emu() { use_emu; [ -z "$EMU_DIR" ] || ready "$EMU_DIR" || die "not built" "Run: scripts/lab setup"; }

cmd_doctor() {
	[ $# -eq 0 ] || usage_error "doctor takes no arguments"
	DOCTOR=0
	find_root
	say "This machine:"
	check "an x86-64 processor" need_x86_64
	check "private namespaces" need_namespaces
	check "mmdebstrap, or the means to fetch it" has_mmdebstrap
	check "the Debian archive's keyring" has_keyring
	check "4 GiB of memory" has_memory
	check "disk space" has_space
	say "The lab in $CACHE:"
	check "root file system" has_root
	check "stock kernel and guest kernel" has_kernel
	check "emulator" has_emu
	return "$DOCTOR"
}

# stale: set STALE to the pieces that this checkout, with the kernels there are, no longer uses.
stale() {
	local piece kind
	local -A used=()
	STALE=()
	find_root
	used[$ROOT]=1
	# Both emulators, the own one and the fall-back: which of them is asked for changes from call to call.
	for piece in '' package; do
		MATRYOSHKA_EMULATOR=$piece use_emu
		[ -z "$EMU_DIR" ] || used[$EMU_DIR]=1
	done
	for piece in "$CACHE"/kernel-*/; do
		use_kernel "$(basename -- "${piece#*/kernel-}")"; use_guest; use_builds
		used[$GUEST_DIR]=1 used[$MODULE_DIR]=1 used[$GUEST_MODULE_DIR]=1
		for kind in $(debug_kinds); do
			MATRYOSHKA_DEBUG=$kind use_builds
			used[$DEBUG_DIR]=1 used[$MODULE_DIR]=1
		done
	done
	for piece in "$CACHE"/{root,guest,debug,emu,mod}-*; do
		[ ! -d "$piece" ] || [ -n "${used[$piece]:-}" ] || STALE+=("${piece##*/}")
	done
	[ ${#STALE[@]} -eq 0 ] || note "removing ${STALE[*]}"
}

# in_clean GLOB...: removing takes the same namespaces as making, for whoever is not root.
in_clean() {
	local pattern
	shopt -s nullglob
	for pattern; do
		# shellcheck disable=SC2086 # the pattern is meant to expand
		rm -rf -- "$CACHE"/$pattern
	done
}

cmd_clean() {
	local -a what
	case ${1:-all} in
	root) what=('root-*') ;;
	kernel) what=('kernel-*' 'source-*') ;;
	guest) what=('guest-*' 'debug-*') ;;
	emu) what=('emu-*') ;;
	tool) what=('target-*') ;;
	module) what=('mod-*') ;;
	stale) stale; what=("${STALE[@]}") ;;
	all) what=('root-*' 'kernel-*' 'source-*' 'guest-*' 'debug-*' 'emu-*' 'mod-*' 'target-*' 'check-*' 'kdir-*' 'kvm-selftests-*' 'xen-*' cargo dl log mmdebstrap
		'test-times*' 'sanitize-times*' 'emu-times.json*') ;;
	*) usage_error "clean: no such piece: $1" ;;
	esac
	[ -d "$CACHE" ] || { note "nothing to remove"; return; }
	! inside || die "the root file system cannot remove itself" "Leave it, and run the same command there."
	take_lock setup
	ns_run --int "$LAB" __clean "${what[@]}"
	[ "${1:-all}" != all ] || { rm -rf -- "$CACHE/lock"; rmdir -- "$CACHE" 2>/dev/null || true; }
}
