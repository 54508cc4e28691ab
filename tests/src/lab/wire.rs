//! The far end of an interface that an XDP program transmits on.
//!
//! A veth puts transmitted (XDP_TX) frames into its peer's ring but wakes the peer only if that runs an XDP program itself;
//! GRO, which suffices for XDP_REDIRECT, does not. Without a program there, frames wait for the next ordinary packet.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use aya::{
    Ebpf,
    programs::{Xdp, XdpMode, links::FdLink},
};

static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("EDGE_WIRE_OBJECT"));

/// Attaches a program that passes everything to `interface` of the calling thread's namespace; the link is pinned at `pin`,
/// on a bpffs, and lives until the pin goes.
pub fn pass_everything(interface: &str, pin: &Path) -> Result<()> {
    let mut object = Ebpf::load(OBJECT).context("load the pass-all program")?;
    let program: &mut Xdp = object.program_mut("edge_wire").context("no program edge_wire")?.try_into()?;
    program.load()?;
    let id = program.attach(interface, XdpMode::Driver).with_context(|| format!("attach XDP to {interface}"))?;
    let link: FdLink = program.take_link(id)?.try_into()?;
    if let Some(folder) = pin.parent() {
        fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    }
    link.pin(pin).with_context(|| format!("pin the link at {}", pin.display()))?;
    Ok(())
}
