//! The XDP and TC entry points: verdict to action, nothing else.
#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "exported sections: the license")]
#![allow(missing_docs, reason = "the entry point macros make a function without the documentation it was given")]

mod programs;

use aya_ebpf::{
    macros::{classifier, xdp},
    programs::{TcContext, XdpContext},
};
use edge_ebpf::{
    packet::{SkbPacket, XdpPacket},
    pipeline,
};
use programs::{at_tc, at_xdp};

/// The program for native and generic XDP.
#[xdp(frags)]
pub fn edge_xdp(ctx: XdpContext) -> u32 {
    let mut packet = XdpPacket::new(&ctx);
    let verdict = pipeline::run(&mut packet);
    at_xdp(&mut packet, verdict)
}

/// The program for TC ingress (tcx or clsact).
#[classifier]
pub fn edge_tc(ctx: TcContext) -> i32 {
    let mut packet = SkbPacket::new(&ctx);
    let verdict = pipeline::run(&mut packet);
    at_tc(&mut packet, verdict)
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}

// SAFETY: the kernel reads this section by name as a string; no other symbol has this name.
#[unsafe(link_section = "license")]
// SAFETY: as above.
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
