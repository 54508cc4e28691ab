//! Builds the eBPF object and puts it where `include_bytes!` finds it. Needs `bpf-linker` and the `rust-src`
//! component; `cargo xtask setup` installs both.

use std::{env, error::Error, fs, path::PathBuf, process::Command};

fn main() -> Result<(), Box<dyn Error>> {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?).join("..").canonicalize()?;
    let program = root.join("edge-ebpf");
    let target_dir = root.join("target").join("ebpf");
    for path in ["edge-ebpf/src", "edge-ebpf/Cargo.toml", "edge-ebpf/Cargo.lock", "edge-ebpf/.cargo", "edge-common"] {
        println!("cargo::rerun-if-changed={}", root.join(path).display());
    }
    // The pinned stable compiler builds `core` for BPF as the Linux kernel does with its own Rust: RUSTC_BOOTSTRAP.
    let status = Command::new(env::var("CARGO")?)
        .args(["build", "--release", "--locked", "--bins", "--target-dir"])
        .arg(&target_dir)
        .current_dir(&program)
        .env("RUSTC_BOOTSTRAP", "1")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("RUSTFLAGS")
        .env_remove("RUSTC_WRAPPER")
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .env_remove("CARGO_BUILD_TARGET")
        .env_remove("CARGO_TARGET_DIR")
        .status()?;
    if !status.success() {
        return Err("the eBPF object did not build; `cargo xtask setup` installs bpf-linker and rust-src".into());
    }
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let built = target_dir.join("bpfel-unknown-none").join("release");
    fs::copy(built.join("edge-ebpf"), out.join("edge-ebpf"))?;
    // The bench-only wrappers are not part of the product; the tests' build script learns where they are
    // (DEP_EDGE_EBPF_BENCH).
    let bench = out.join("edge-bench");
    fs::copy(built.join("edge-bench"), &bench)?;
    println!("cargo::metadata=bench={}", bench.display());
    Ok(())
}
