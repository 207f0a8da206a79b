# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
#
# The emulator: its source and firmware are fetched here, scripts/emulator/build makes it. Debian's own build is the
# fall-back; MATRYOSHKA_EMULATOR=package asks for that one, beside the other, to try it.

# use_emu: set EMU_DIR. The recipe and its patches decide what comes out, not the programs that run it.
use_emu() {
	case ${MATRYOSHKA_EMULATOR:-} in
	'' | package) ;;
	*) die "MATRYOSHKA_EMULATOR=$MATRYOSHKA_EMULATOR means nothing" "Set it to package, or not at all." ;;
	esac
	local -a inputs=()
	EMU_DIR=
	[ -x "$SCRIPTS/emulator/build" ] || return 0
	mapfile -t inputs < <(cd "$SCRIPTS/emulator" && find "$PWD/build" "$PWD/SHA256SUMS" "$PWD/patches" \
		"$PWD/instrument" -type f 2>/dev/null | sort; find "$SCRIPTS/emulator" -maxdepth 1 -name '*.c' | sort)
	EMU_DIR=$CACHE/emu-$(key "${inputs[@]}" layout-2 ${MATRYOSHKA_EMULATOR:+"$MATRYOSHKA_EMULATOR"})
}

# fetch_emu: set EMU_DL to where there are the firmware packages, and the upstream tarball as Debian has it. Its checksum is
# in the archive's signed source index, which is not kept: it is needed this once. Only without it are the packages of
# Debian's own build fetched.
fetch_emu() {
	EMU_DL=dl
	mkdir -p -- "$CACHE/dl"
	if [ "${MATRYOSHKA_EMULATOR:-}" = package ]; then fetch_emu_package; return; fi
	has_dl 'bochsbios_*.deb' && has_dl 'vgabios_*.deb' || enter /cache/dl apt-get -q download bochsbios vgabios
	has_dl 'bochs_*.orig.tar.?z' || fetch_emu_source || {
		warn "the emulator's source could not be fetched; Debian's own build, slower and without profiles, has to do"
		fetch_emu_package
	}
}

has_dl() { [ -n "$(find "$CACHE/dl" -maxdepth 1 -name "$1" -print -quit)" ]; }

# fetch_emu_package: Debian's build and whatever library it needs that the root file system lacks (its debugger has a
# graphical front end). They are not installed there: the emulator keeps them with it, unpacked.
fetch_emu_package() {
	EMU_DL=dl/bochs-package
	[ ! -e "$CACHE/$EMU_DL/.ready" ] || return 0
	mkdir -p -- "$CACHE/$EMU_DL/partial"
	enter "/cache/$EMU_DL" apt-get -q -y --no-install-recommends --download-only -o APT::Sandbox::User=root -o Debug::NoLocking=1 \
		-o "Dir::Cache::archives=/cache/$EMU_DL" install bochs bochs-term bochsbios vgabios
	mark_ready "$CACHE/$EMU_DL"
}

fetch_emu_source() {
	enter /cache/dl sh -e -c '
		mkdir /tmp/lists
		sed -n "s/^deb /deb-src /p" /etc/apt/sources.list | grep " $1 " >/tmp/src.list
		set -- -o Dir::Etc::sourcelist=/tmp/src.list -o Dir::Etc::sourceparts=- -o Dir::State::lists=/tmp/lists
		apt-get -q "$@" update
		base=$(sed "s/^deb-src \([^ ]*\) .*/\1/; q" /tmp/src.list)
		apt-cache "$@" showsrc --only-source bochs | awk "
			/^Directory:/ { dir = \$2 }
			/^Checksums-Sha256:/ { sums = 1; next }
			/^[^ ]/ { sums = 0 }
			sums && \$3 ~ /\.orig\.tar\./ { sum = \$1; file = \$3 }
			END { print dir, file, sum }" >/tmp/tarball
		read -r dir file sum </tmp/tarball
		/usr/lib/apt/apt-helper download-file "$base/$dir/$file" "$file.part" "SHA256:$sum"
		mv "$file.part" "$file"' sh "$SUITE"
}

# build_emu: the recipe moves what it made to its place when it is whole.
build_emu() {
	fetch_emu
	enter /src scripts/emulator/build "/cache/${EMU_DIR##*/}" "/cache/$EMU_DL" || {
		local status=$?
		# Debian has a source that our patches are not for: then its program has to do. Anything else is a failure.
		[ "$status" = 1 ] && [ -d "$EMU_DIR.build/source" ] &&
			[ ! -d "$EMU_DIR.build/source/instrument/matryoshka" ] || return "$status"
		fetch_emu_package
		enter /src scripts/emulator/build "/cache/${EMU_DIR##*/}" "/cache/$EMU_DL"
	}
	if [ -e "$EMU_DIR/unpatched" ]; then
		# The recipe takes the program, this the libraries.
		enter "/cache/$EMU_DL" sh -e -c 'for deb in *.deb; do dpkg-deb -x "$deb" "$1"; done' sh "/cache/${EMU_DIR##*/}/package"
	fi
	mark_ready "$EMU_DIR"
}

# has_profiler: whether there is the instrumented emulator as well, or cannot be (Debian's own has none).
has_profiler() { [ -x "$EMU_DIR/bochs-prof" ] || [ -e "$EMU_DIR/unpatched" ]; }

# build_profiler: the instrumented emulator, which only profiles need.
build_profiler() {
	has_profiler || enter /src scripts/emulator/build "/cache/${EMU_DIR##*/}" /cache/dl bochs-prof
}

# emu_permille LOG: the recipe says how far it is.
emu_permille() { awk '/building bochs(-prof)?: / { p = $(NF - 3) * 10 } END { print p + 0 }' "$1"; }
