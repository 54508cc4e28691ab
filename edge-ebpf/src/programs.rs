//! The stages' programs, and what becomes of a verdict at each hook. A module of both objects, since a program belongs to
//! the object whose slots it is put into.

use aya_ebpf::{
    bindings::{TC_ACT_OK, TC_ACT_SHOT, xdp_action},
    macros::{classifier, xdp},
    programs::{TcContext, XdpContext},
};
use edge_common::{
    address::Wide,
    verdict::{Action, Verdict},
};
use edge_ebpf::{
    packet::{Packet, SkbPacket, XdpPacket, redirect},
    pipeline, stages, vlan,
};

/// The verdict as XDP takes it.
#[inline(always)]
pub fn at_xdp(packet: &mut XdpPacket, verdict: Verdict) -> u32 {
    match verdict.action() {
        Action::Pass => xdp_action::XDP_PASS,
        Action::Transmit | Action::Return => xdp_action::XDP_TX,
        Action::Redirect(ifindex) => redirect(ifindex) as u32,
        Action::Tagged(next_hop, same) => match vlan::leave(packet, next_hop) {
            0 => xdp_action::XDP_DROP,
            _ if same => xdp_action::XDP_TX,
            ifindex => redirect(ifindex) as u32,
        },
        Action::Drop => xdp_action::XDP_DROP,
    }
}

/// The verdict as TC takes it.
#[inline(always)]
pub fn at_tc(packet: &mut SkbPacket, verdict: Verdict) -> i32 {
    match verdict.action() {
        Action::Pass => TC_ACT_OK,
        Action::Transmit | Action::Return => redirect(pipeline::ingress(packet)) as i32,
        Action::Redirect(ifindex) => redirect(ifindex) as i32,
        Action::Tagged(next_hop, _) => match vlan::leave(packet, next_hop) {
            0 => TC_ACT_SHOT,
            ifindex => redirect(ifindex) as i32,
        },
        Action::Drop => TC_ACT_SHOT,
    }
}

/// A stage that packets with tags pass through, without them.
#[inline(always)]
fn settled<P: Packet>(packet: &mut P, stage: impl FnOnce(&mut P) -> Verdict) -> Verdict {
    let verdict = stage(packet);
    vlan::settle(packet, verdict)
}

/// As [`settled`], a stage that sends nothing to a next hop; said so that the kernel is not given the code for it.
#[inline(always)]
fn kept<P: Packet>(packet: &mut P, stage: impl FnOnce(&mut P) -> Verdict) -> Verdict {
    match settled(packet, stage) {
        verdict if matches!(verdict.action(), Action::Tagged(..)) => Verdict::DROP,
        verdict => verdict,
    }
}

/// A stage that only packets without tags come to.
#[inline(always)]
fn plain<P: Packet>(packet: &mut P, stage: impl FnOnce(&mut P) -> Verdict) -> Verdict {
    stage(packet)
}

macro_rules! stage {
    ($($end:ident $stage:path: $at_xdp:ident, $at_tc:ident;)*) => {
        $(
            #[xdp(frags)]
            pub fn $at_xdp(ctx: XdpContext) -> u32 {
                let mut packet = XdpPacket::new(&ctx);
                let verdict = $end(&mut packet, $stage);
                at_xdp(&mut packet, verdict)
            }

            #[classifier]
            pub fn $at_tc(ctx: TcContext) -> i32 {
                let mut packet = SkbPacket::new(&ctx);
                let verdict = $end(&mut packet, $stage);
                at_tc(&mut packet, verdict)
            }
        )*
    };
}

stage! {
    kept stages::track::<u32, _>: edge_xdp_track, edge_tc_track;
    kept stages::create::<u32, _>: edge_xdp_create, edge_tc_create;
    settled stages::send::<u32, _>: edge_xdp_send, edge_tc_send;
    settled stages::relay::<u32, _>: edge_xdp_relay, edge_tc_relay;
    kept stages::answer::<u32, _>: edge_xdp_answer, edge_tc_answer;
    settled stages::frag::<u32, _>: edge_xdp_frag, edge_tc_frag;
    plain pipeline::ipv6: edge_xdp_ipv6, edge_tc_ipv6;
    kept stages::track::<Wide, _>: edge_xdp_track6, edge_tc_track6;
    kept stages::create::<Wide, _>: edge_xdp_creat6, edge_tc_creat6;
    settled stages::send::<Wide, _>: edge_xdp_send6, edge_tc_send6;
    kept stages::mid_flow::<u32, _>: edge_xdp_midflo, edge_tc_midflo;
    kept stages::mid_flow::<Wide, _>: edge_xdp_midfl6, edge_tc_midfl6;
    settled stages::relay::<Wide, _>: edge_xdp_relay6, edge_tc_relay6;
    kept stages::answer::<Wide, _>: edge_xdp_answe6, edge_tc_answe6;
    settled stages::frag::<Wide, _>: edge_xdp_frag6, edge_tc_frag6;
    settled pipeline::vlan: edge_xdp_vlan, edge_tc_vlan;
    settled pipeline::untagged_ipv6: edge_xdp_vlan6, edge_tc_vlan6;
}
