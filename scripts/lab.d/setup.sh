# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
#
# The set-up as a whole: a plan of whatever is missing.

# Seconds and log lines were measured on two cores of a small virtual machine.
plan_setup() {
	local refresh=$1 profiler=$2
	ready "$ROOT" || { step "root file system" make_root 60 0; refresh=; }
	if [ -n "$refresh" ]; then step "package lists" refresh_lists 8 0; fi
	# Which kernel it is can only be told once there are package lists.
	if [ -n "$KNOWN" ] && ready "$KERNEL_DIR"; then :; else
		[ -n "$KNOWN" ] && [ -f "$KERNEL_DIR/vmlinuz" ] && [ -d "$SOURCE_DIR" ] ||
			step "kernel packages" get_kernel 35 0
		step "kernel metadata for Rust" prepare_known 95 215
	fi
	if [ -z "$KNOWN" ] || { use_guest; ! ready "$GUEST_DIR"; }; then step "guest kernel" guest_known 300 1620; fi
	if [ -n "${MATRYOSHKA_DEBUG:-}" ] && { [ -z "$KNOWN" ] || { use_debug "$MATRYOSHKA_DEBUG"; ! debug_ready; }; }; then
		step "$MATRYOSHKA_DEBUG kernel" debug_known 600 2400
	fi
	use_emu
	if [ -n "$EMU_DIR" ] && ! ready "$EMU_DIR"; then step "emulator" build_emu 140 emu_permille; fi
	if [ -n "$EMU_DIR" ] && [ -n "$profiler" ] && ! has_profiler; then step "emulator for profiles" build_profiler 150 emu_permille; fi
	if [ -f "$PROJECT/rust/Cargo.lock" ] &&
	   [ "$(cat -- "$CACHE/cargo/.fetched" 2>/dev/null)" != "$(key "$PROJECT/rust/Cargo.lock")" ]; then
		step "crates" crates 15 0
	fi
}

# Steps are subshells: what one finds out, the next reads from the cache.
refresh_lists() { update_lists; }

get_kernel() {
	resolve
	fetch_kernel
	unpack_kernel
	# Only the newest becomes the lab's own choice; another one asked for stays an exception.
	[ -n "${KERNEL:-}" ] || printf '%s\n' "$KVER" | write_file "$CACHE/kernel-current"
}

# The kernel is resolved by now, whoever named it.
known() { use_kernel "$(wanted_kernel)"; }

prepare_known() { known; prepare_kernel; }
guest_known()   { known; use_guest; build_guest; }
debug_known()   { known; use_debug "$MATRYOSHKA_DEBUG"; build_debug; }
crates()        { mkdir -p -- "$CACHE/cargo"; fetch_crates; }

# in_setup REFRESH PROFILER: runs as root of private namespaces; the lock is held by our caller.
in_setup() {
	local refresh=${1:-} profiler=${2:-} started=$SECONDS
	trap 'exit 130' INT
	trap 'exit 143' TERM
	find_root
	KNOWN=$(wanted_kernel)
	use_kernel "${KNOWN:-none}"
	if [ -n "$refresh" ] && ready "$ROOT" && [ -z "${KERNEL:-}" ]; then
		update_lists >/dev/null
		resolve
		[ "$KVER" = "$KNOWN" ] || note "the newest kernel on offer is $KVER"
		[ -d "$KERNEL_DIR" ] && printf '%s\n' "$KVER" | write_file "$CACHE/kernel-current"
		[ -d "$KERNEL_DIR" ] || { rm -f -- "$CACHE/kernel-current"; KNOWN=; }
		refresh=
	fi
	# A kernel that cannot be had is better told now than after the steps before it.
	if [ -n "${KERNEL:-}" ] && ready "$ROOT" && [ ! -f "$KERNEL_DIR/vmlinuz" ]; then resolve; fi
	plan_setup "$refresh" "$profiler"
	if [ ${#STEP_NAME[@]} -eq 0 ]; then
		known
		say "lab: everything is there (kernel $KVER)"
		return
	fi
	run_plan
	known
	say "lab: set up with kernel $KVER in $(clock $((SECONDS - started)))"
}

cmd_setup() {
	local refresh='' profiler=''
	while [ $# -gt 0 ]; do
		case $1 in
		--kernel) [ -n "${2:-}" ] || usage_error "--kernel takes a version"; export KERNEL=$2; shift 2 ;;
		--kernel=?*) export KERNEL=${1#*=}; shift ;;
		--kernel=) usage_error "--kernel takes a version" ;;
		--refresh) refresh=1; shift ;;
		--profiler) profiler=1; shift ;;
		*) usage_error "setup: no such option: $1" ;;
		esac
	done
	! inside || die "the root file system cannot set itself up" "Leave it, and run the same command there."
	need_x86_64
	need_namespaces
	local lock=setup
	if [ -n "${MATRYOSHKA_DEBUG:-}" ]; then
		use_kernel "$(wanted_kernel)"
		use_debug "$MATRYOSHKA_DEBUG"
		# What every kernel needs comes first. Then a lock of its own, so that who does not want this kernel need not wait for it.
		MATRYOSHKA_DEBUG='' "$LAB" setup ${refresh:+--refresh} || exit
		lock=setup-$MATRYOSHKA_DEBUG refresh=''
	fi
	take_lock "$lock"
	find_root
	if ! ready "$ROOT"; then need_space 15; else need_space 3; fi
	ns_run --int "$LAB" __setup "$refresh" "$profiler"
}
