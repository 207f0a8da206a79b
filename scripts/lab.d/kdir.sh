# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
#
# For the kernel that this machine itself runs: a source tree with the Rust metadata that Debian's headers package
# lacks, made with this machine's own packages and compilers. DKMS calls this before it builds the module.

kdir_missing() {
	die "$1 is missing" \
	    "apt-get install ${KDIR_CC#x86_64-linux-gnu-} rustc rust-src bindgen make bc bison flex perl python3 pahole libelf-dev libssl-dev xz-utils" \
	    "Or build in the lab, which has them: scripts/lab setup --kernel $KVER &&" \
	    "scripts/lab build-module --for host --kernel $KVER"
}

# kdir_tools CONFIG: the compilers have to be the ones that built the kernel.
kdir_tools() {
	local config=$1 want have tool source
	grep -qx 'CONFIG_RUST=y' "$config" || die "kernel $KVER is built without CONFIG_RUST, so it cannot load a Rust module" \
		"Run a kernel of Debian's trixie-backports: apt-get install -t trixie-backports linux-image-amd64"
	KDIR_CC=$(sed -n 's/^CONFIG_CC_VERSION_TEXT="\([^ "]*\).*/\1/p' "$config")
	want=$(sed -n 's/^CONFIG_RUSTC_VERSION_TEXT="\(.*\)"$/\1/p' "$config")
	RUSTC=${RUSTC:-$([ -x /usr/bin/rustc ] && echo /usr/bin/rustc || echo rustc)}
	for tool in "$KDIR_CC" "$RUSTC" bindgen make bc bison flex xz perl python3 pahole; do
		command -v "$tool" >/dev/null || kdir_missing "$tool"
	done
	for tool in libelf.h openssl/opensslv.h; do
		printf '#include <%s>\n' "$tool" | "$KDIR_CC" -E - >/dev/null 2>&1 || kdir_missing "the header $tool"
	done
	have=$("$RUSTC" --version)
	[ "$have" = "$want" ] || die "kernel $KVER was built with $want, and $RUSTC is $have" \
		"Name the right one with RUSTC=, or build in the lab: scripts/lab setup --kernel $KVER &&" \
		"scripts/lab build-module --for host --kernel $KVER"
	source=$("$RUSTC" --print sysroot)/lib/rustlib/src/rust/library/core/src/lib.rs
	[ -f "$source" ] || die "the source of Rust's core library is missing ($source)" "apt-get install rust-src"
}

# kdir_source: set KDIR_TARBALL to the source of exactly this kernel package, fetching it if need be.
kdir_source() {
	local package version name dir=$CACHE/dl
	version=$(dpkg-query -W -f '${Version}' "linux-headers-$KVER") ||
		die "linux-headers-$KVER is not an installed package" "apt-get install linux-headers-$KVER"
	package=linux-source-$(cut -d. -f1,2 <<<"$KVER")
	name=$package.tar.xz
	KDIR_TARBALL=/usr/src/$name
	if [ "$(dpkg-query -W -f '${Version}' "$package" 2>/dev/null)" != "$version" ] || [ ! -f "$KDIR_TARBALL" ]; then
		note "fetching $package $version"
		mkdir -p -- "$dir"
		(cd "$dir" && apt-get -q -o APT::Sandbox::User=root download "$package=$version" >&2 &&
			dpkg-deb --fsys-tarfile "$package"_*.deb | tar -xO "./usr/src/$name" >"$name.part" &&
			mv -- "$name.part" "$name" && rm -f -- "$package"_*.deb) ||
			die "the source of kernel $KVER ($package $version) could not be fetched" \
			    "apt-get install $package=$version, then run this again."
		KDIR_TARBALL=$dir/$name
	fi
}

# The steps of the plan; variables come from cmd_prepare_kdir.
kdir_unpack() {
	rm -rf -- "$KDIR" "$KDIR.part" && mkdir -p -- "$KDIR.part"
	tar -xf "$KDIR_TARBALL" --strip-components=1 -C "$KDIR.part"
	cp -- "$KDIR_HEADERS/.config" "$KDIR.part/.config"
	cp -- "$KDIR_HEADERS/Module.symvers" "$KDIR.part/Module.symvers"
	: >"$KDIR.part/.lab"
	mv -- "$KDIR.part" "$KDIR"
	case $KDIR_TARBALL in "$CACHE"/*) rm -f -- "$KDIR_TARBALL" ;; esac
}

kdir_make() {
	local cross=${KDIR_CC%gcc*} different
	make -C "$KDIR" -j"$JOBS" KERNELRELEASE="$KVER" CC="$KDIR_CC" CROSS_COMPILE="$cross" RUSTC="$RUSTC" \
		prepare modules_prepare
	[ -f "$KDIR/rust/libkernel.rmeta" ]
	# Kconfig quietly drops what this machine's tools cannot do. A tool's version alone changes nothing.
	different=$(diff <(grep -v '_VERSION' "$KDIR_HEADERS/.config") <(grep -v '_VERSION' "$KDIR/.config") | grep '^[<>]' || true)
	[ -z "$different" ] ||
		die "with this machine's tools the configuration of $KVER comes out different (< Debian's, > here):" \
		    "$(head -n 5 <<<"$different")" \
		    "A tool is older than the one that the kernel was built with: upgrade it, or build in the lab:" \
		    "scripts/lab setup --kernel $KVER && scripts/lab build-module --for host --kernel $KVER"
	mark_ready "$KDIR"
	# Most of the source is only for the kernel itself; a machine has such a tree for each of its kernels.
	rm -rf -- "$KDIR"/{Documentation,drivers,fs,net,samples,sound} "$KDIR"/tools/{perf,testing}
	find "$KDIR/arch" -mindepth 1 -maxdepth 1 -type d ! -name x86 -exec rm -rf -- {} +
}

cmd_prepare_kdir() {
	KVER=$(uname -r)
	KDIR=
	while [ $# -gt 0 ]; do
		case $1 in
		--kernel) [ -n "${2:-}" ] || usage_error "--kernel takes a version"; KVER=$2; shift 2 ;;
		--kernel=?*) KVER=${1#*=}; shift ;;
		--kernel=) usage_error "--kernel takes a version" ;;
		-*) usage_error "prepare-kdir: no such option: $1" ;;
		*) [ -z "$KDIR" ] || usage_error "prepare-kdir takes one directory"; KDIR=$1; shift ;;
		esac
	done
	need_x86_64
	KDIR=$(realpath -m -- "${KDIR:-$CACHE/kdir-$KVER}")
	KDIR_HEADERS=${KDIR_HEADERS:-/lib/modules/$KVER/build}
	[ -f "$KDIR_HEADERS/.config" ] && [ -f "$KDIR_HEADERS/Module.symvers" ] ||
		die "the headers of kernel $KVER are not in $KDIR_HEADERS" \
		    "apt-get install linux-headers-$KVER (only Debian's own kernels are known to work), or point KDIR_HEADERS at them."
	[ ! -e "$KDIR" ] || [ -e "$KDIR/.lab" ] || rmdir -- "$KDIR" 2>/dev/null ||
		die "$KDIR is there already and was not made by this command" "Name a directory that is not there yet."
	kdir_tools "$KDIR_HEADERS/.config"
	if ready "$KDIR" && cmp -s "$KDIR_HEADERS/Module.symvers" "$KDIR/Module.symvers"; then
		note "$KDIR is prepared already"
		say "$KDIR"
		return
	fi
	command -v dpkg-query >/dev/null || die "this is no Debian system, and only Debian's kernels are known to work"
	take_lock kdir
	# What an interrupted preparation left serves, unless the kernel's packages are others meanwhile.
	if [ ! -d "$KDIR/drivers" ] || ! cmp -s "$KDIR_HEADERS/.config" "$KDIR/.config" ||
	   ! cmp -s "$KDIR_HEADERS/Module.symvers" "$KDIR/Module.symvers"; then
		kdir_source
		step "kernel source" kdir_unpack 25 0
	fi
	step "kernel metadata for Rust" kdir_make 95 215
	run_plan >&2
	say "$KDIR"
	note "now: make modules KDIR=$KDIR"
}
