//! `edge-fuzz-datapath`: random packets through the loaded program, compared with the reference model.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::{Parser, ValueEnum};
use edge_ctl::datapath::object::EBPF_OBJECT;
use edge_tests::{
    datapath::rig::Hook,
    model::run::{CACHES, fuzz_object},
    skip::namespaces_missing,
};

/// Random packets through the loaded program, compared with the reference model.
#[derive(Parser)]
struct Arguments {
    /// Packets at each hook.
    #[arg(long, default_value_t = 1_000_000)]
    packets: u64,
    /// What a run follows from; a fresh one where none is given. Printed, so that a run can be repeated.
    #[arg(long, value_parser = seed)]
    seed: Option<u64>,
    /// Where; both where not given.
    #[arg(long)]
    hook: Option<Where>,
    /// Sets of the flow cache, all CPUs together; 0: none.
    #[arg(long, default_value_t = CACHES[0])]
    cache: u32,
    /// Another object than the one built in, as `cargo xtask build-ebpf` makes it.
    #[arg(long)]
    object: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Where {
    Xdp,
    Tc,
}

fn seed(text: &str) -> Result<u64, std::num::ParseIntError> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if let Some(why) = namespaces_missing() {
        ensure!(false, "{why}");
    }
    let hooks = match arguments.hook {
        Some(Where::Xdp) => vec![Hook::Xdp],
        Some(Where::Tc) => vec![Hook::Tc],
        None => vec![Hook::Xdp, Hook::Tc],
    };
    let seed = match arguments.seed {
        Some(seed) => seed,
        None => edge_tests::model::dice::fresh()?,
    };
    let object = arguments.object.map(std::fs::read).transpose()?;
    for hook in hooks {
        println!("{hook:?}: seed {seed:#x}");
        println!(
            "{}",
            fuzz_object(object.as_deref().unwrap_or(EBPF_OBJECT), hook, seed, arguments.packets, arguments.cache)?
        );
    }
    Ok(())
}
