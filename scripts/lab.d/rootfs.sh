# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
#
# The Debian root file system with compilers and tools.

SUITE=trixie

# What the lab needs, one purpose a line. gcc-14 is what Debian builds this kernel with, rustc and rust-src must
# be the very ones that it was built with: all come from $SUITE, only the kernel from backports.
ROOT_PACKAGES=(
	ca-certificates
	gcc-14 gcc g++ make patch
	bc bison flex libelf-dev libssl-dev pahole kmod cpio rsync gawk perl python3
	xz-utils zstd
	rustc rust-src cargo rustfmt rust-clippy bindgen clang lld llvm
	busybox-static isolinux syslinux-common xorriso
	shellcheck
)

# find_root: set ROOT to the root file system that this version of the lab wants.
find_root() {
	if inside; then ROOT=/; return; fi
	ROOT=$CACHE/root-$(key "$SUITE" "${ROOT_PACKAGES[*]}" layout-1)
}

# host_mirror: the Debian archive that this machine's own APT uses, or nothing. Only a Debian machine has one.
host_mirror() {
	local uri release component
	grep -qs '^ID=debian' /etc/os-release && command -v apt-get >/dev/null || return 0
	# Security and third-party archives are in that list as well: the archive proper is where main is found under the
	# name of this machine's own release.
	local name
	name=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
	apt-get indextargets --format "\$(REPO_URI) \$(RELEASE) \$(COMPONENT)" 'Created-By: Packages' 2>/dev/null |
		while read -r uri release component; do
			case $uri in http:* | https:* | file:*) ;; *) continue ;; esac
			if [ "$component" = main ]; then
				case $release in
				"$name" | stable | testing | unstable | sid) printf '%s\n' "${uri%/}"; break ;;
				esac
			fi
		done
}

# find_mmdebstrap: set MMDEBSTRAP to a way to run it, fetching the package (a perl script) if need be.
find_mmdebstrap() {
	local dir=$CACHE/mmdebstrap
	MMDEBSTRAP=$(command -v mmdebstrap || true)
	[ -z "$MMDEBSTRAP" ] || return 0
	if [ ! -x "$dir/usr/bin/mmdebstrap" ]; then
		command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null && command -v perl >/dev/null ||
			die "mmdebstrap is not installed, and without apt, dpkg and perl it cannot be fetched" \
			    "Install mmdebstrap (and apt), or set the lab up on a Debian or Ubuntu machine."
		rm -rf -- "$dir.part" && mkdir -p -- "$dir.part"
		(cd "$dir.part" && apt-get -o APT::Sandbox::User=root download mmdebstrap && dpkg-deb -x mmdebstrap_*.deb .) ||
			die "mmdebstrap is not installed and could not be fetched" \
			    "apt-get update && apt-get install mmdebstrap, then run this again."
		rm -rf -- "$dir" && mv -- "$dir.part" "$dir"
	fi
	MMDEBSTRAP=$dir/usr/bin/mmdebstrap
	# It looks for its helper (mmtarfilter) there.
	PATH=$dir/usr/bin:$PATH
}

# make_root: build $ROOT. Runs as root of private namespaces.
make_root() {
	local mirror=${MIRROR:-$(host_mirror)} part=$ROOT.part archives=$CACHE/dl/archives pocket packages option hook
	local -a sources=() options=()
	find_mmdebstrap
	# No Debian archive configured here (Ubuntu): the one that mmdebstrap itself falls back to.
	[ -n "$mirror" ] || mirror=$(grep -o "https\?://[a-z.]*/debian'" "$MMDEBSTRAP" | head -n 1 | tr -d "'")
	[ -n "$mirror" ] || die "no Debian mirror is known here" "Name one: MIRROR=URL scripts/lab setup"
	for pocket in "$SUITE" "$SUITE-updates" "$SUITE-backports"; do
		sources+=("deb $mirror $pocket main")
	done
	# The machine's proxy settings count in there as well.
	while read -r option; do
		[ -z "$option" ] || options+=("--aptopt=$option")
	done < <(apt-config dump 2>/dev/null | grep -iE '^Acquire::(http|https)::(Proxy|Verify)' || true)
	rm -rf -- "$part"
	# What is downloaded outlives an interruption: APT finds it where it left it, partial files as well. The mount is in our
	# own namespace and goes with it.
	mkdir -p -- "$archives/partial"
	printf -v hook 'mkdir -p "$1/var/cache/apt/archives" && mount --bind %q "$1/var/cache/apt/archives"' "$archives"
	packages=${ROOT_PACKAGES[*]}
	"$MMDEBSTRAP" --mode=root --variant=apt --architectures=amd64 --format=directory \
		--include="${packages// /,}" \
		--aptopt='APT::Sandbox::User "root"' --aptopt='Acquire::Retries "3"' \
		--aptopt='Acquire::Languages "none"' "${options[@]}" \
		--dpkgopt=force-unsafe-io \
		--dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
		--dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/info/*' \
		--skip=cleanup/apt/lists --skip=chroot/mount/sys \
		--setup-hook="$hook" --skip=download/empty --skip=essential/unlink --skip=cleanup/apt/cache \
		"$SUITE" "$part" "${sources[@]}" ||
		die "mmdebstrap could not make the root file system from $mirror" \
		    "Lines of the log that begin with E: or Err: say why. If a name was not resolved or a connection refused: is" \
		    "there a network, and does this machine need a proxy (http_proxy)? Another mirror: MIRROR=URL scripts/lab setup" \
		    "If a signature was not accepted: apt-get install debian-archive-keyring"
	umount -- "$part/var/cache/apt/archives"
	mkdir -p -- "$part/var/cache/apt/archives/partial"
	rm -f -- "$part"/var/cache/apt/*.bin
	mkdir -p -- "$part/src" "$part/cache"
	mark_ready "$part"
	rm -rf -- "$ROOT"
	mv -- "$part" "$ROOT"
	rm -rf -- "$archives"
}
