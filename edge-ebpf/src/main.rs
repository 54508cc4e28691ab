//! The XDP and TC entry points: verdict to action, nothing else.
#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "exported sections: the license")]
#![allow(missing_docs, reason = "the entry point macros make a function without the documentation it was given")]

use aya_ebpf::{
    bindings::{TC_ACT_OK, TC_ACT_SHOT, xdp_action},
    macros::{classifier, xdp},
    programs::{TcContext, XdpContext},
};
use edge_common::verdict::Action;
use edge_ebpf::{
    packet::{SkbPacket, XdpPacket, redirect},
    pipeline,
};

/// The program for native and generic XDP.
#[xdp]
pub fn edge_xdp(ctx: XdpContext) -> u32 {
    let mut packet = XdpPacket::new(&ctx);
    match pipeline::run(&mut packet).action() {
        Action::Pass => xdp_action::XDP_PASS,
        Action::Transmit => xdp_action::XDP_TX,
        Action::Redirect(ifindex) => redirect(ifindex) as u32,
        Action::Drop => xdp_action::XDP_DROP,
    }
}

/// The program for TC ingress (tcx or clsact).
#[classifier]
pub fn edge_tc(ctx: TcContext) -> i32 {
    let mut packet = SkbPacket::new(&ctx);
    match pipeline::run(&mut packet).action() {
        Action::Pass => TC_ACT_OK,
        Action::Transmit => redirect(pipeline::ingress(&packet)) as i32,
        Action::Redirect(ifindex) => redirect(ifindex) as i32,
        Action::Drop => TC_ACT_SHOT,
    }
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
