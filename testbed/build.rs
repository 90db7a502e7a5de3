//! Compiles the Linux guest's init, statically, so that the library can carry it.
//!
//! Cargo itself cannot build one binary of a workspace statically for the host's own target without
//! a second build directory; the guest needs nothing but std, so that one call of the compiler does.

use std::env;
use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=guest");
    let out = env::var_os("OUT_DIR").expect("cargo sets OUT_DIR for build scripts");
    let rustc = env::var_os("RUSTC").expect("cargo sets RUSTC for build scripts");
    let target = env::var("TARGET").expect("cargo sets TARGET for build scripts");
    let status = Command::new(rustc)
        .args([
            "--edition=2024",
            "--crate-name=ferry_guest",
            "--crate-type=bin",
        ])
        .args(["--target", &target])
        .args(["-Copt-level=3", "-Cpanic=abort", "-Cstrip=symbols"])
        .args(["-Ctarget-feature=+crt-static", "-Crelocation-model=static"])
        .arg("-o")
        .arg(Path::new(&out).join("ferry-guest"))
        .arg("guest/main.rs")
        .status()
        .expect("the compiler that cargo names can be started");
    assert!(status.success(), "the guest's init did not compile");
}
