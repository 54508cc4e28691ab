//! Bench-only programs, in an object of their own: each writes the headers and picks the flow, as a repeated test run
//! needs (the pipeline rewrites the packet, so the second run would see another one), then runs the pipeline, one LRU
//! lookup, or nothing. The last is the baseline that a figure is net of.
#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "exported sections, and the script's one map element")]
#![allow(missing_docs, reason = "the entry point macros make a function without the documentation it was given")]

mod programs;

use aya_ebpf::{
    bindings::{TC_ACT_OK, TC_ACT_SHOT, xdp_action},
    macros::{classifier, map, xdp},
    maps::Array,
    programs::{TcContext, XdpContext},
};
use edge_common::flow::FlowKeyV4;
use edge_ebpf::{
    maps::{Table, flow},
    packet::{Packet, SkbPacket, XdpPacket, set_word},
    pipeline,
};
use programs::{at_tc, at_xdp};

/// What to write: 56 bytes of frame (54 used), then the runs so far, the flows, the first source address, the first
/// port (both host order), and 1 where the port that varies is the destination's.
#[repr(C)]
pub struct Script {
    frame: [u16; 28],
    runs: u64,
    flows: u64,
    address: u64,
    port: u64,
    reply: u64,
}

#[map]
static SCRIPT: Array<Script> = Array::with_max_entries(1, 0);

const FRAME: usize = 54;
const PORTS: usize = 34;
/// Ports that an address has before the next one is taken.
const PORT_BITS: u32 = 14;

/// Writes the headers of the next flow; `None` where the frame or the script is not there.
#[inline(always)]
fn write<P: Packet>(packet: &mut P) -> Option<FlowKeyV4> {
    // SAFETY: an array element that lives for this program run; one benchmark runs at a time.
    let script = unsafe { &mut *SCRIPT.get_ptr_mut(0)? };
    script.runs += 1;
    let flow = match script.flows {
        0 => script.runs as u32,
        // Uniform over a power of two.
        flows => (script.runs.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as u32 & (flows as u32 - 1),
    };
    let address = (script.address as u32).wrapping_add(flow >> PORT_BITS).to_be();
    let port = (script.port as u16).wrapping_add(flow as u16 & ((1 << PORT_BITS) - 1)).to_be();
    let reply = script.reply != 0;
    let frame = packet.header::<[u16; FRAME / 2]>(0)?;
    let half = |at: usize| u32::from(script.frame[at / 2]);
    let whole = |at: usize| half(at) | half(at + 2) << 16;
    let ports = if reply { half(PORTS) | u32::from(port) << 16 } else { u32::from(port) | half(PORTS + 2) << 16 };
    // Written as it is read later, in words from the IP header on: a load that spans two stores waits for both to reach the
    // cache, which a packet from a wire has done long before.
    set_word::<0, _>(frame, whole(0));
    set_word::<4, _>(frame, whole(4));
    set_word::<8, _>(frame, whole(8));
    frame[6] = script.frame[6];
    set_word::<14, _>(frame, whole(14));
    set_word::<18, _>(frame, whole(18));
    set_word::<22, _>(frame, whole(22));
    set_word::<26, _>(frame, address);
    set_word::<30, _>(frame, whole(30));
    set_word::<34, _>(frame, ports);
    set_word::<38, _>(frame, whole(38));
    set_word::<42, _>(frame, whole(42));
    set_word::<46, _>(frame, whole(46));
    set_word::<50, _>(frame, whole(50));
    Some(FlowKeyV4::new(address, whole(30), ports as u16, (ports >> 16) as u16, 6))
}

/// The wrapper alone.
#[xdp(frags)]
pub fn bench_xdp_baseline(ctx: XdpContext) -> u32 {
    match write(&mut XdpPacket::new(&ctx)) {
        Some(_) => xdp_action::XDP_PASS,
        None => xdp_action::XDP_ABORTED,
    }
}

/// The wrapper and the pipeline.
#[xdp(frags)]
pub fn bench_xdp_pipeline(ctx: XdpContext) -> u32 {
    let mut packet = XdpPacket::new(&ctx);
    if write(&mut packet).is_none() {
        return xdp_action::XDP_ABORTED;
    }
    at_xdp(pipeline::run(&mut packet))
}

/// The wrapper and one lookup in an LRU hash.
#[xdp(frags)]
pub fn bench_xdp_lookup(ctx: XdpContext) -> u32 {
    match write(&mut XdpPacket::new(&ctx)) {
        Some(key) if flow(Table::HalfOpen, &key).is_some() => xdp_action::XDP_PASS,
        Some(_) => xdp_action::XDP_DROP,
        None => xdp_action::XDP_ABORTED,
    }
}

/// The wrapper alone.
#[classifier]
pub fn bench_tc_baseline(ctx: TcContext) -> i32 {
    match write(&mut SkbPacket::new(&ctx)) {
        Some(_) => TC_ACT_OK,
        None => TC_ACT_SHOT,
    }
}

/// The wrapper and the pipeline.
#[classifier]
pub fn bench_tc_pipeline(ctx: TcContext) -> i32 {
    let mut packet = SkbPacket::new(&ctx);
    if write(&mut packet).is_none() {
        return TC_ACT_SHOT;
    }
    let verdict = pipeline::run(&mut packet);
    at_tc(&packet, verdict)
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
