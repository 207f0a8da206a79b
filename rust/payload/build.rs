// SPDX-License-Identifier: GPL-2.0-or-later
//! Links the payload for bare metal although it is compiled for the host's own target: no C runtime,
//! no dynamic linking, and our own layout.

fn main() {
    let root = std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
    println!("cargo:rerun-if-changed=link.ld");
    for argument in [
        "-nostartfiles",
        "-nostdlib",
        "-static",
        "-no-pie",
        "-Wl,--build-id=none",
    ] {
        println!("cargo:rustc-link-arg-bins={argument}");
    }
    println!(
        "cargo:rustc-link-arg-bins=-Wl,-T,{root}/link.ld,-z,max-page-size=4096,--no-dynamic-linker"
    );
}
