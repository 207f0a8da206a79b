# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
#
# The stock kernel under test: resolved among what the mirror offers, fetched, unpacked, and its source prepared
# so that out-of-tree Rust modules can be built for it.

CROSS=x86_64-linux-gnu-
KERNEL_CC=${CROSS}gcc-14

# use_kernel VERSION: set KVER and KERNEL_DIR, SOURCE_DIR with it.
use_kernel() {
	KVER=$1
	KERNEL_DIR=$CACHE/kernel-$KVER
	SOURCE_DIR=$CACHE/source-$KVER
}

# wanted_kernel: the version asked for, or the one the last set-up resolved, or nothing.
wanted_kernel() {
	# Whoever evaluates what `paths` prints may have KERNEL exported, and then it is the kernel's directory.
	if [ -n "${KERNEL:-}" ] && [ "${KERNEL##*/kernel-}" != "$KERNEL" ]; then printf '%s\n' "${KERNEL##*/kernel-}"
	elif [ -n "${KERNEL:-}" ]; then printf '%s-amd64\n' "${KERNEL%-amd64}"
	elif [ -s "$CACHE/kernel-current" ]; then cat -- "$CACHE/kernel-current"; fi
}

# offers: from the package lists in the root file system, "VERSION PACKAGE-VERSION SOURCE-PACKAGE" of each kernel of
# flavour amd64 that has its modules, its headers and the source of the very same version; oldest first.
offers() {
	enter / sh -c 'apt-get indextargets --format "\$(FILENAME)" "Created-By: Packages" |
		while read -r f; do /usr/lib/apt/apt-helper cat-file "$f"; done' |
	awk '
		/^Package: / { package = $2 }
		/^Version: / && package ~ /^linux-/ { have[package, $2] = 1 }
		/^Version: / && package ~ /^linux-binary-[0-9][^-]*-amd64$/ { binary[package " " $2] = 1 }
		END {
			for (item in binary) {
				split(item, part, " ")
				kernel = substr(part[1], length("linux-binary-") + 1)
				split(kernel, number, ".")
				source = "linux-source-" number[1] "." number[2]
				if (((source, part[2]) in have) && (("linux-modules-" kernel, part[2]) in have) &&
				    (("linux-headers-" kernel, part[2]) in have) && (("linux-base-" kernel, part[2]) in have))
					print kernel, part[2], source
			}
		}' | sort -V
}

# update_lists: ask the mirror what there is.
update_lists() {
	enter / apt-get -q update ||
		die "the package lists could not be fetched" \
		    "Is there a network? Check this machine's connection and proxy (http_proxy), or name a mirror: MIRROR=URL" \
		    "The mirror in use: $(awk '/^deb / { print $2; exit }' "$ROOT"/etc/apt/sources.list)"
}

# resolve: set KVER, KPKG (the package version), KSRC (the source package) for $KERNEL or the newest kernel.
resolve() {
	local all line
	all=$(offers)
	if [ -n "${KERNEL:-}" ]; then
		line=$(awk -v want="$(wanted_kernel)" '$1 == want' <<<"$all" | tail -n 1)
	else
		line=$(tail -n 1 <<<"$all")
	fi
	if [ -z "$all" ]; then
		die "the mirror offers no kernel with linux-source of the same version in $SUITE-backports" \
		    "Name another mirror: MIRROR=URL scripts/lab setup --refresh"
	elif [ -z "$line" ]; then
		die "the mirror offers no kernel $KERNEL with linux-source of the same version" \
		    "It offers: $(cut -d' ' -f1 <<<"$all" | tr '\n' ' ')" \
		    "Choose one of these, or ask the mirror anew: scripts/lab setup --refresh"
	fi
	read -r KVER KPKG KSRC <<<"$line"
	use_kernel "$KVER"
}

# fetch_kernel: the packages go to $CACHE/dl; apt checks them against the archive's signature.
fetch_kernel() {
	mkdir -p -- "$CACHE/dl"
	enter /cache/dl apt-get -q download "$KSRC=$KPKG" "linux-binary-$KVER=$KPKG" "linux-modules-$KVER=$KPKG" \
		"linux-headers-$KVER=$KPKG" "linux-base-$KVER=$KPKG" ||
		die "the packages of kernel $KVER could not be fetched" \
		    "If the network is fine, the mirror may have replaced this version: scripts/lab setup --refresh"
}

# unpack_kernel: vmlinuz, config, modules/ (what is /lib/modules/$KVER on a running system), and the source.
unpack_kernel() {
	local part=$KERNEL_DIR.part tree deb
	tree=$part/usr/lib/modules/$KVER
	# The source tarball is in a package of its own; xz reads it straight out of there.
	if [ ! -d "$SOURCE_DIR" ]; then
		rm -rf -- "$SOURCE_DIR.part" && mkdir -p -- "$SOURCE_DIR.part"
		enter "/cache/dl" sh -c 'dpkg-deb --fsys-tarfile "$1"_*.deb |
			tar -xO --wildcards "./usr/src/$2.tar.xz" | xz -dc -T0 | tar -x --strip-components=1 -C "$3"' \
			sh "$KSRC"_"${KPKG//:/%3a}" "$KSRC" "/cache/${SOURCE_DIR##*/}.part"
		[ -f "$SOURCE_DIR.part/Makefile" ]
		mv -- "$SOURCE_DIR.part" "$SOURCE_DIR"
	fi
	if [ ! -f "$KERNEL_DIR/vmlinuz" ]; then
		rm -rf -- "$part" && mkdir -p -- "$part"
		for deb in linux-binary linux-modules linux-base linux-headers; do
			enter /cache/dl sh -c 'dpkg-deb -x "$1"_*.deb "$2"' sh "$deb-${KVER}_${KPKG//:/%3a}" "/cache/${part##*/}"
		done
		# depmod wants the tree under lib/modules of some base directory.
		ln -s usr/lib "$part/lib"
		enter / depmod -b "/cache/${part##*/}" "$KVER"
		mv -- "$tree/vmlinuz" "$tree/config" "$part/"
		[ ! -f "$tree/System.map" ] || mv -- "$tree/System.map" "$part/"
		rm -f -- "$tree/build" "$tree/source"
		mv -- "$tree" "$part/modules"
		mv -- "$part/usr/src/linux-headers-$KVER/.config" "$part/headers.config"
		mv -- "$part/usr/src/linux-headers-$KVER/Module.symvers" "$part/"
		rm -rf -- "$part/usr" "$part/lib" "$part/boot" "$part/etc"
		rm -rf -- "$KERNEL_DIR"
		mv -- "$part" "$KERNEL_DIR"
	fi
	# Fetched again if ever needed; together they are 300 MB.
	rm -f -- "$CACHE/dl/${KSRC}"_*.deb "$CACHE"/dl/linux-*-"$KVER"_*.deb
}

# copy_source DIR: a tree to build in. Hard links: kbuild makes new files and never writes into the sources.
copy_source() {
	[ ! -f "$1/Makefile" ] || return 0
	rm -rf -- "$1.part"
	cp -al -- "$SOURCE_DIR" "$1.part" || { rm -rf -- "$1.part" && cp -a -- "$SOURCE_DIR" "$1.part"; }
	mv -- "$1.part" "$1"
}

# kmake DIR MAKE-ARGUMENT...: make in the kernel tree DIR (a path in the root file system).
kmake() {
	local dir=$1
	shift
	enter "$dir" make -j"$JOBS" CC=$KERNEL_CC CROSS_COMPILE=$CROSS "$@"
}

# check_rustc CONFIG: Rust metadata of another compiler version cannot be linked against.
check_rustc() {
	local want have
	want=$(sed -n 's/^CONFIG_RUSTC_VERSION_TEXT="\(.*\)"$/\1/p' "$1")
	have=$(enter / rustc --version)
	grep -qx 'CONFIG_RUST=y' "$1" || die "kernel $KVER is built without CONFIG_RUST, so it cannot load a Rust module" \
		"Choose another kernel: scripts/lab kernels"
	[ "$want" = "$have" ] || die "kernel $KVER was built with $want, and the root file system has $have" \
		"Set the root file system up anew: scripts/lab clean root && scripts/lab setup, or choose another kernel."
}

# prepare_kernel: the Rust metadata that Debian's headers package lacks. Same source, same configuration, same
# compilers as the distribution's, so what comes out matches the binary kernel.
prepare_kernel() {
	local build=$KERNEL_DIR/build
	check_rustc "$KERNEL_DIR/headers.config"
	copy_source "$build"
	# Rewriting an unchanged .config would make an interrupted preparation start over.
	cmp -s "$KERNEL_DIR/headers.config" "$build/.config.debian" || {
		cp -- "$KERNEL_DIR/headers.config" "$build/.config"
		cp -- "$KERNEL_DIR/headers.config" "$build/.config.debian"
		cp -- "$KERNEL_DIR/Module.symvers" "$build/Module.symvers"
	}
	kmake "/cache/${KERNEL_DIR##*/}/build" KERNELRELEASE="$KVER" prepare modules_prepare
	[ -f "$build/rust/libkernel.rmeta" ] || die "the preparation of $KVER left no rust/libkernel.rmeta"
	mark_ready "$KERNEL_DIR"
}

# in_kernels, cmd_kernels: what there is to choose from.
in_kernels() {
	find_root
	offers | cut -d' ' -f1
}

cmd_kernels() {
	[ $# -eq 0 ] || usage_error "kernels takes no arguments"
	find_root
	ready "$ROOT" || die "the lab is not set up, so there is no package list yet" "Run: scripts/lab setup"
	ns_run "$LAB" __kernels
}
