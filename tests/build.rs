//! Hands on where edge-ctl's build script put the eBPF objects that are for benchmarks and test networks.

use std::env;

fn main() -> Result<(), env::VarError> {
    for name in ["BENCH", "WIRE"] {
        println!("cargo::rerun-if-env-changed=DEP_EDGE_EBPF_{name}");
        println!("cargo::rustc-env=EDGE_{name}_OBJECT={}", env::var(format!("DEP_EDGE_EBPF_{name}"))?);
    }
    Ok(())
}
