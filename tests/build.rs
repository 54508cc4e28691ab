//! Hands on where edge-ctl's build script put the bench-only eBPF object.

use std::env;

fn main() -> Result<(), env::VarError> {
    println!("cargo::rerun-if-env-changed=DEP_EDGE_EBPF_BENCH");
    println!("cargo::rustc-env=EDGE_BENCH_OBJECT={}", env::var("DEP_EDGE_EBPF_BENCH")?);
    Ok(())
}
