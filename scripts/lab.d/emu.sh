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

# fetch_emu: the upstream tarball as Debian has it. Its checksum is in the archive's signed source index, which is not
# kept: it is needed this once.
fetch_emu() {
	mkdir -p -- "$CACHE/dl"
	[ -z "$(emu_tarball)" ] || return 0
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

emu_tarball() { find "$CACHE/dl" -name 'bochs_*.orig.tar.?z' -printf '%f\n' -quit 2>/dev/null; }

# build_emu: the recipe itself knows what to do without a tarball (Debian's own build, which is half as fast).
build_emu() {
	local tarball
	fetch_emu || warn "the emulator's source could not be fetched; the recipe falls back on what it finds"
	tarball=$(emu_tarball)
	enter /src scripts/emulator/build "/cache/${EMU_DIR##*/}" ${tarball:+"/cache/dl/$tarball"}
	mark_ready "$EMU_DIR"
}
