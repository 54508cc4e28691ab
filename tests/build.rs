//! Hands on where edge-ctl's build script put the bench-only eBPF object, and builds the program with another layout of its
//! flows, for the test of migration.

use std::{env, error::Error, path::PathBuf, process::Command};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-env-changed=DEP_EDGE_EBPF_BENCH");
    println!("cargo::rustc-env=EDGE_BENCH_OBJECT={}", env::var("DEP_EDGE_EBPF_BENCH")?);
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?).join("..").canonicalize()?;
    for path in ["edge-ebpf/src", "edge-ebpf/Cargo.toml", "edge-ebpf/Cargo.lock", "edge-ebpf/.cargo", "edge-common"] {
        println!("cargo::rerun-if-changed={}", root.join(path).display());
    }
    let target_dir = root.join("target").join("ebpf-layout-test");
    // As edge-ctl's build script does, with one feature more.
    let status = Command::new(env::var("CARGO")?)
        .args(["build", "--release", "--locked", "--bin", "edge-ebpf", "--features", "layout-test", "--target-dir"])
        .arg(&target_dir)
        .current_dir(root.join("edge-ebpf"))
        .env("RUSTC_BOOTSTRAP", "1")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("RUSTFLAGS")
        .env_remove("RUSTC_WRAPPER")
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .env_remove("CARGO_BUILD_TARGET")
        .env_remove("CARGO_TARGET_DIR")
        .status()?;
    if !status.success() {
        return Err("the eBPF object with another layout did not build".into());
    }
    let built = target_dir.join("bpfel-unknown-none/release/edge-ebpf");
    println!("cargo::rustc-env=EDGE_LAYOUT_OBJECT={}", built.display());
    Ok(())
}
