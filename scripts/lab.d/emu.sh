# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
#
# The emulator: its source and firmware are fetched here, scripts/emulator/build makes it.

# use_emu: set EMU_DIR. The recipe and its patches decide what comes out, not the programs that run it.
use_emu() {
	local -a inputs=()
	EMU_DIR=
	[ -x "$SCRIPTS/emulator/build" ] || return 0
	mapfile -t inputs < <(cd "$SCRIPTS/emulator" && find "$PWD/build" "$PWD/SHA256SUMS" "$PWD/patches" \
		"$PWD/instrument" -type f 2>/dev/null | sort; find "$SCRIPTS/emulator" -maxdepth 1 -name '*.c' | sort)
	EMU_DIR=$CACHE/emu-$(key "${inputs[@]}" layout-1)
}

# fetch_emu: the firmware packages, and the upstream tarball as Debian has it. Its checksum is in the archive's signed
# source index, which is not kept: it is needed this once. Only without it are the packages of Debian's own build fetched.
fetch_emu() {
	mkdir -p -- "$CACHE/dl"
	has_dl 'bochsbios_*.deb' && has_dl 'vgabios_*.deb' || enter /cache/dl apt-get -q download bochsbios vgabios
	has_dl 'bochs_*.orig.tar.?z' || fetch_emu_source || {
		warn "the emulator's source could not be fetched; Debian's own build, half as fast, has to do"
		enter /cache/dl apt-get -q download bochs bochs-term libltdl7 libreadline8t64
	}
}

has_dl() { [ -n "$(find "$CACHE/dl" -name "$1" -print -quit)" ]; }

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
	enter /src scripts/emulator/build "/cache/${EMU_DIR##*/}" /cache/dl
	mark_ready "$EMU_DIR"
}

# emu_permille LOG: the recipe builds two programs and says how far each is.
emu_permille() {
	awk '/building bochs: / { p = $(NF - 3) * 5 } /building bochs-prof: / { p = 500 + $(NF - 3) * 5 } END { print p + 0 }' "$1"
}
