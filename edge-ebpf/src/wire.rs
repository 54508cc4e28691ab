//! For test networks: passes every packet. A veth sends what XDP transmits only if its peer runs some XDP program.
#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "exported sections: the license")]

use aya_ebpf::{bindings::xdp_action, macros::xdp, programs::XdpContext};

/// Passes.
#[xdp]
pub fn edge_wire(_ctx: XdpContext) -> u32 {
    xdp_action::XDP_PASS
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
