# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
#
# Private namespaces. Everything that mounts or runs for long does so in a mount and PID namespace of its own, held
# by one unshare process that dies with us. When it dies, for whatever reason, the kernel ends every process in
# there and drops every mount: nothing has to be cleaned up, so nothing can be left behind.

# userns_args: options of unshare(1) by which we get to be root over there, one per line.
userns_args() {
	[ "$(id -u)" -ne 0 ] || return 0
	if unshare --help | grep -q -- --map-auto; then
		printf '%s\n' --user --map-root-user --map-auto
	else
		die "unshare of this machine is too old to map subordinate user ids (util-linux 2.38 has it)" \
		    "Run the lab as root, for example with sudo."
	fi
}

# need_namespaces: try what the lab is going to do and say in words why it does not work.
need_namespaces() {
	local -a args
	local why
	command -v unshare >/dev/null || die "unshare is missing" "Install util-linux."
	command -v setpriv >/dev/null || die "setpriv is missing" "Install util-linux."
	if [ "$(id -u)" -ne 0 ]; then
		command -v newuidmap >/dev/null ||
			die "newuidmap is missing, so a normal user cannot own a root file system" \
			    "apt-get install uidmap, or run the lab as root."
		grep -qs "^$(id -un):\|^$(id -u):" /etc/subuid && grep -qs "^$(id -un):\|^$(id -u):" /etc/subgid ||
			die "user $(id -un) has no subordinate ids in /etc/subuid and /etc/subgid" \
			    "As root: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 $(id -un)" \
			    "Or run the lab as root."
	fi
	mapfile -t args < <(userns_args)
	why=$(unshare "${args[@]}" --mount --pid --fork --mount-proc mount -t tmpfs none /tmp 2>&1) ||
		die "this machine does not let us have private namespaces: $why" \
		    "In a container, give it the right to mount (--privileged, or --cap-add SYS_ADMIN with no seccomp filter)." \
		    "As a normal user, have root allow user namespaces (sysctl kernel.unprivileged_userns_clone=1," \
		    "kernel.apparmor_restrict_unprivileged_userns=0), or run the lab as root."
}

# interrupted: end what runs in the namespaces, and then ourselves the way that a shell expects of an interrupted program.
interrupted() {
	kill -KILL "$NS_CHILD" 2>/dev/null
	printf '\n' >&2
	note "interrupted; what was finished is kept, and the same command continues from there"
	trap - INT
	kill -INT $$
}

# ns_run [--int] CMD...: run CMD in fresh user (if not root), mount and PID namespaces and return its status. An
# interrupt ends it at once with --int, and is otherwise left to CMD, which may be an editor or a debugger.
ns_run() {
	local -a args
	local child status=0 on_int=:
	if [ "$1" = --int ]; then on_int=interrupted; shift; fi
	mapfile -t args < <(userns_args)
	# Background processes of a script start with SIGINT ignored, which suits unshare; env undoes it for CMD. The bash is
	# PID 1 over there: a program that is PID 1 itself would not die of the terminal's signals.
	setpriv --pdeathsig KILL env MATRYOSHKA_NS=1 MATRYOSHKA_CACHE="$CACHE" \
		unshare "${args[@]}" --mount --pid --fork --kill-child=KILL --mount-proc \
		env --default-signal=INT,QUIT bash -c '"$@"; exit $?' bash "$@" <&0 &
	child=$!
	NS_CHILD=$child
	# shellcheck disable=SC2064 # what to do is meant to be fixed now
	trap "$on_int" INT
	# shellcheck disable=SC2064
	trap "kill -KILL $child 2>/dev/null; exit 143" TERM
	# shellcheck disable=SC2064
	trap "kill -KILL $child 2>/dev/null; exit 129" HUP
	while :; do
		status=0
		wait "$child" || status=$?
		kill -0 "$child" 2>/dev/null || break
	done
	trap - INT TERM HUP
	return "$status"
}

# ca_bundle: the file with the certificates that this machine trusts, if there is one.
ca_bundle() {
	local file
	for file in "${SSL_CERT_FILE:-}" "${CURL_CA_BUNDLE:-}" /etc/ssl/certs/ca-certificates.crt \
		/etc/pki/tls/certs/ca-bundle.crt /etc/ssl/ca-bundle.pem; do
		if [ -n "$file" ] && [ -s "$file" ]; then realpath -- "$file"; return; fi
	done
}

# cargo_config: of the host's cargo configuration, what says where crates come from. Linkers, wrappers and flags
# of the host mean nothing in the root file system.
cargo_config() {
	local file home=${CARGO_HOME:-${HOME:-/root}/.cargo}
	for file in "$home/config.toml" "$home/config"; do
		[ -f "$file" ] || continue
		awk '/^[ \t]*\[/ { keep = ($0 ~ /^[ \t]*\[+(source|registry|registries|http|net)[].]/) } keep' "$file"
		return
	done
}

# bind SOURCE TARGET: bind a file or directory over TARGET under $ROOT, which is made first.
bind() {
	local target=$ROOT$2
	if [ -d "$1" ]; then mkdir -p -- "$target"
	elif [ ! -e "$target" ]; then mkdir -p -- "$(dirname -- "$target")"; : >"$target"; fi
	mount --bind -- "$1" "$target"
}

# fill_root: mount everything a program needs under $ROOT. Only to be called in a mount namespace of its own.
fill_root() {
	local node
	mount --make-rprivate /
	mount --bind -- "$ROOT" "$ROOT"
	# The project may itself live below a directory that is about to be covered: bind it first.
	bind "$PROJECT" /src
	bind "$CACHE" /cache
	mount -t proc proc "$ROOT/proc"
	mount -t tmpfs -o mode=755,size=1m dev "$ROOT/dev"
	for node in null zero full random urandom tty kvm; do
		[ ! -e "/dev/$node" ] || bind "/dev/$node" "/dev/$node"
	done
	mkdir "$ROOT/dev/pts" "$ROOT/dev/shm"
	mount -t devpts -o newinstance,ptmxmode=0666,mode=0620 devpts "$ROOT/dev/pts"
	ln -s pts/ptmx "$ROOT/dev/ptmx"
	ln -s /proc/self/fd "$ROOT/dev/fd"
	ln -s /proc/self/fd/0 "$ROOT/dev/stdin"
	ln -s /proc/self/fd/1 "$ROOT/dev/stdout"
	ln -s /proc/self/fd/2 "$ROOT/dev/stderr"
	mount -t tmpfs -o mode=1777 shm "$ROOT/dev/shm"
	mount -t tmpfs -o mode=1777 tmp "$ROOT/tmp"
	[ ! -s /etc/resolv.conf ] || bind "$(realpath /etc/resolv.conf)" /etc/resolv.conf
	[ ! -s /etc/hosts ] || bind /etc/hosts /etc/hosts
	local ca
	ca=$(ca_bundle)
	[ -z "$ca" ] || bind "$ca" /etc/ssl/certs/ca-certificates.crt
	# Cargo reads .cargo/config.toml of every directory above the one it is started in, so this one always counts.
	mkdir -p -- "$ROOT/.cargo"
	cargo_config | cmp -s - "$ROOT/.cargo/config.toml" || cargo_config | write_file "$ROOT/.cargo/config.toml"
}

# passed_env: of our environment, what is meant for programs in the root file system, as NAME=VALUE lines.
passed_env() {
	local name
	for name in $(compgen -e); do
		case $name in
		CARGO_HOME | CARGO_TARGET_DIR | CARGO_HTTP_CAINFO | CARGO_MANIFEST_DIR) ;;
		http_proxy | https_proxy | no_proxy | all_proxy | HTTP_PROXY | HTTPS_PROXY | NO_PROXY | ALL_PROXY | \
		TERM | COLORTERM | NO_COLOR | RUST_BACKTRACE | RUST_LOG | SOURCE_DATE_EPOCH | \
		KERNEL | DEPTH | OP | OPS | CONFIGS | CPUS | V | W | \
		CARGO_NET_* | CARGO_HTTP_* | CARGO_SOURCE_* | CARGO_REGISTRIES_* | CARGO_REGISTRY_* | CARGO_TERM_* | \
		PROPTEST_* | KSELFTEST_* | MATRYOSHKA_*)
			case $name in MATRYOSHKA_CACHE | MATRYOSHKA_NS) continue ;; esac
			printf '%s=%s\n' "$name" "${!name}" ;;
		esac
	done
}

# in_enter DIR CMD...: become CMD in the root file system $ROOT, in directory DIR of it. Runs inside ns_run.
in_enter() {
	local dir=$1
	local -a env
	shift
	ROOT=${MATRYOSHKA_ROOT:?}
	fill_root
	unset MATRYOSHKA_ROOT
	mapfile -t env < <(passed_env)
	# 9 is the lock of the set-up, not for the programs it runs.
	exec env -i "${env[@]}" \
		PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 \
		MATRYOSHKA_INSIDE=1 MATRYOSHKA_CACHE=/cache JOBS="$JOBS" \
		CARGO_HOME=/cache/cargo CARGO_TARGET_DIR="/cache/target-$CHECKOUT" \
		CARGO_HTTP_CAINFO=/etc/ssl/certs/ca-certificates.crt SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt \
		chroot "$ROOT" /bin/sh -c 'cd "$1" && shift && exec "$@"' sh "$dir" "$@" 9>&-
}

# enter DIR CMD...: run CMD in the root file system, from within ns_run.
enter() {
	MATRYOSHKA_ROOT=$ROOT unshare --mount "$LAB" __enter "$@"
}

# cmd_exec [--] CMD...: the user's way in. The working directory is kept if it is in the project.
cmd_exec() {
	local dir=/src here
	[ "${1:-}" != -- ] || shift
	[ $# -gt 0 ] || usage_error "exec: no command given"
	if inside; then exec "$@"; fi
	need_x86_64
	find_root
	ready "$ROOT" || die "the lab is not set up" "Run: scripts/lab setup"
	here=$(pwd -P)
	case $here/ in
	"$PROJECT"/*) dir=/src${here#"$PROJECT"} ;;
	"$CACHE"/*) dir=/cache${here#"$CACHE"} ;;
	esac
	MATRYOSHKA_ROOT=$ROOT ns_run "$LAB" __enter "$dir" "$@"
}

cmd_shell() {
	[ -t 0 ] || usage_error "shell: standard input is not a terminal"
	cmd_exec -- bash -i
}
