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
    helpers::generated::bpf_get_smp_processor_id,
    macros::{classifier, map, xdp},
    maps::Array,
    programs::{TcContext, XdpContext},
};
use edge_common::{
    address::mapped,
    flow::FlowKeyV4,
    maps::{NeighbourKey, ServiceKey},
};
use edge_ebpf::{
    fib::Lookup,
    maps::{Table, add_flow, flow, frontend, next_hop_number, scratch},
    packet::{Packet, Query, SkbPacket, XdpPacket, set_word},
    pipeline,
};
use programs::{at_tc, at_xdp};

/// What to write: 80 bytes of frame (54 of IPv4, 74 of IPv6 used), then the runs so far, the flows, the first source address
/// (of IPv6 its last word), the first port (both host order), 1 where the port that varies is the destination's, and which flow
/// is next: 0 any, 1 one of a Zipf mix, 2 the next one in turn; and a pod (network order).
#[repr(C)]
pub struct Script {
    frame: [u16; 40],
    runs: u64,
    flows: u64,
    address: u64,
    port: u64,
    reply: u64,
    mix: u64,
    pod: u64,
    // To whole cache lines, since each CPU has a script.
    _pad: [u64; 7],
}

#[map]
static SCRIPT: Array<Script> = Array::with_max_entries(CPUS, 0);

/// CPUs that packets may be measured on, each by its own script.
const CPUS: u32 = 64;

/// Ports that an address has before the next one is taken.
const PORT_BITS: u32 = 14;

/// A number in which every bit of `runs` moves every bit (SplitMix64): consecutive ones share no pattern that a cache could follow.
#[inline(always)]
fn scatter(runs: u64) -> u64 {
    let word = runs.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ word >> 31
}

/// Source address and ports of the next flow, in network order; `None` where the script is not there.
#[inline(always)]
fn next(ports: usize) -> Option<(&'static mut Script, u32, u32)> {
    // SAFETY: takes nothing and returns an integer.
    let cpu = unsafe { bpf_get_smp_processor_id() };
    // SAFETY: an array element that lives for this program run; one benchmark runs at a time, and this CPU alone has this one.
    let script = unsafe { &mut *SCRIPT.get_ptr_mut(cpu)? };
    script.runs += 1;
    let random = scatter(script.runs);
    let flow = match script.flows {
        0 => script.runs as u32,
        // The first of the flows get 1, 1/2, 1/4, ... of what each doubling of them gets: Zipf's law with exponent 1.
        flows if script.mix == 1 => {
            let octaves = 64 - flows.leading_zeros() - 1;
            let octave = ((random >> 40) as u32).wrapping_mul(octaves) >> 24;
            1 << octave | (random >> 8) as u32 & ((1 << octave) - 1)
        }
        flows if script.mix == 2 => script.runs as u32 & (flows as u32 - 1),
        // Uniform over a power of two.
        flows => (random >> 32) as u32 & (flows as u32 - 1),
    };
    let address = (script.address as u32).wrapping_add(flow >> PORT_BITS).to_be();
    let port = u32::from((script.port as u16).wrapping_add(flow as u16 & ((1 << PORT_BITS) - 1)).to_be());
    let half = |at: usize| u32::from(script.frame[at / 2]);
    let ports = if script.reply != 0 { half(ports) | port << 16 } else { port | half(ports + 2) << 16 };
    Some((script, address, ports))
}

/// Copies words of the script into the frame. Written as they are read later, 32 bits each from the IP header on: a load that
/// spans two stores waits for both to reach the cache, which a packet from a wire has done long before.
macro_rules! copy {
    ($frame:ident, $script:ident, $($at:literal)*) => {
        $({
            let word = u32::from($script.frame[$at / 2]) | u32::from($script.frame[$at / 2 + 1]) << 16;
            set_word::<$at, _>($frame, word);
        })*
    };
}

/// Writes the headers of the next IPv4 flow; `None` where the frame or the script is not there.
#[inline(always)]
fn write<P: Packet>(packet: &mut P) -> Option<FlowKeyV4> {
    write_for(packet).map(|(_, key)| key)
}

#[inline(always)]
fn write_for<P: Packet>(packet: &mut P) -> Option<(&'static mut Script, FlowKeyV4)> {
    let (script, address, ports) = next(34)?;
    let frame = packet.header::<[u16; 27]>(0)?;
    copy!(frame, script, 0 4 8);
    frame[6] = script.frame[6];
    copy!(frame, script, 14 18 22);
    set_word::<26, _>(frame, address);
    copy!(frame, script, 30);
    set_word::<34, _>(frame, ports);
    copy!(frame, script, 38 42 46 50);
    let dst = u32::from(script.frame[15]) | u32::from(script.frame[16]) << 16;
    let key = FlowKeyV4::new(address, dst, ports as u16, (ports >> 16) as u16, 6);
    Some((script, key))
}

/// As [`write`], of the next IPv6 flow.
#[inline(always)]
fn write6<P: Packet>(packet: &mut P) -> Option<()> {
    let (script, address, ports) = next(54)?;
    let frame = packet.header::<[u16; 37]>(0)?;
    copy!(frame, script, 0 4 8);
    frame[6] = script.frame[6];
    copy!(frame, script, 14 18 22 26 30);
    set_word::<34, _>(frame, address);
    copy!(frame, script, 38 42 46 50);
    set_word::<54, _>(frame, ports);
    copy!(frame, script, 58 62 66 70);
    Some(())
}

/// The lookups and inserts of a new full-nat flow, and nothing else: three tables without it, its frontend, both halves, no
/// conflict in the two other tables, the entry that sends the packet, its route, and the number of its next hop.
#[inline(always)]
fn bare_new_flow<P: Packet>(packet: &mut P, key: &FlowKeyV4, pod: u32) -> Option<()> {
    // One after the other: the compiler would join two tests of pointers, which the verifier does not allow.
    if flow(Table::Established, key).is_some()
        || flow(Table::HalfOpen, key).is_some()
        || flow(Table::Closing, key).is_some()
    {
        return None;
    }
    let vip = ServiceKey { address: mapped(key.dst), port: key.dst_port, protocol: 6, _pad: 0 };
    let service = frontend(&vip)?;
    // The reply's key: the client's address stands for a backend's port and address.
    let reply = FlowKeyV4::new(key.dst, key.src, key.dst_port, key.src_port, 6);
    let entry = scratch::empty::<u32>()?;
    entry.key = reply;
    entry.service = service;
    add_flow(Table::HalfOpen, entry).ok()?;
    if flow(Table::Established, &reply).is_some() || flow(Table::Closing, &reply).is_some() {
        return None;
    }
    let entry = scratch::empty::<u32>()?;
    entry.key = *key;
    entry.service = service;
    add_flow(Table::HalfOpen, entry).ok()?;
    flow(Table::HalfOpen, key)?;
    let Lookup { route, .. } = scratch::lookup()?;
    let query = Query {
        src: key.dst,
        dst: pod,
        src_port: key.src_port,
        dst_port: key.dst_port,
        protocol: 6,
        tos: 0,
        ingress: packet.ingress(),
    };
    query.encode(route);
    if packet.route(route) != 0 {
        return None;
    }
    let neighbour = NeighbourKey { ifindex: route.0.ifindex, address: mapped(pod) };
    next_hop_number(&neighbour).map(|_| ())
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
    let verdict = pipeline::run(&mut packet);
    at_xdp(&mut packet, verdict)
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

/// The wrapper and [`bare_new_flow`].
#[xdp(frags)]
pub fn bench_xdp_new(ctx: XdpContext) -> u32 {
    let mut packet = XdpPacket::new(&ctx);
    match write_for(&mut packet) {
        Some((script, key)) if bare_new_flow(&mut packet, &key, script.pod as u32).is_some() => xdp_action::XDP_PASS,
        Some(_) => xdp_action::XDP_DROP,
        None => xdp_action::XDP_ABORTED,
    }
}

/// The IPv6 wrapper alone.
#[xdp(frags)]
pub fn bench_xdp_base6(ctx: XdpContext) -> u32 {
    match write6(&mut XdpPacket::new(&ctx)) {
        Some(()) => xdp_action::XDP_PASS,
        None => xdp_action::XDP_ABORTED,
    }
}

/// The IPv6 wrapper and the pipeline.
#[xdp(frags)]
pub fn bench_xdp_pipe6(ctx: XdpContext) -> u32 {
    let mut packet = XdpPacket::new(&ctx);
    if write6(&mut packet).is_none() {
        return xdp_action::XDP_ABORTED;
    }
    let verdict = pipeline::run(&mut packet);
    at_xdp(&mut packet, verdict)
}

/// The IPv6 wrapper alone.
#[classifier]
pub fn bench_tc_base6(ctx: TcContext) -> i32 {
    match write6(&mut SkbPacket::new(&ctx)) {
        Some(()) => TC_ACT_OK,
        None => TC_ACT_SHOT,
    }
}

/// The IPv6 wrapper and the pipeline.
#[classifier]
pub fn bench_tc_pipe6(ctx: TcContext) -> i32 {
    let mut packet = SkbPacket::new(&ctx);
    if write6(&mut packet).is_none() {
        return TC_ACT_SHOT;
    }
    let verdict = pipeline::run(&mut packet);
    at_tc(&mut packet, verdict)
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
