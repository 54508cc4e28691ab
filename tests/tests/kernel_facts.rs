//! The program against the limits of kernels older than the one the tests run on, and docs/kernels.md against the program.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use edge_ctl::datapath::object::EBPF_OBJECT;
use edge_tests::kernel_facts::{self, MAX_PROCESSED, MAX_STACK};

fn docs() -> Result<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/kernels.md");
    fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
}

#[test]
fn the_deepest_chain_of_calls_fits_kernels_that_round_every_frame_up_to_32_bytes() -> Result<()> {
    for facts in kernel_facts::of(EBPF_OBJECT)? {
        assert!(facts.deepest <= MAX_STACK, "{}: {} bytes by {:?}", facts.program, facts.deepest, facts.chain);
        // 6.1 processes about a sixth more than newer kernels; half the limit leaves room for that.
        assert!(facts.processed <= MAX_PROCESSED / 2, "{}: {} instructions", facts.program, facts.processed);
    }
    Ok(())
}

#[test]
fn the_documentation_names_every_helper_and_map_type_that_the_object_uses() -> Result<()> {
    let docs = docs()?;
    let listed = |name: &str| docs.contains(&format!("`{name}`"));
    for helper in kernel_facts::helpers(EBPF_OBJECT)? {
        let row = docs.lines().find(|line| line.starts_with(&format!("| {helper} | `bpf_")));
        assert!(row.is_some(), "docs/kernels.md has no row for helper {helper}");
    }
    for kind in kernel_facts::map_types(EBPF_OBJECT)? {
        assert!(listed(&kind), "docs/kernels.md does not name the map type `{kind}`");
    }
    Ok(())
}
