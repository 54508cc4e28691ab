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
    packet::{SkbPacket, XdpPacket, redirect},
    pipeline, stages,
};

/// The verdict as XDP takes it.
#[inline(always)]
pub fn at_xdp(verdict: Verdict) -> u32 {
    match verdict.action() {
        Action::Pass => xdp_action::XDP_PASS,
        Action::Transmit => xdp_action::XDP_TX,
        Action::Redirect(ifindex) => redirect(ifindex) as u32,
        Action::Drop => xdp_action::XDP_DROP,
    }
}

/// The verdict as TC takes it.
#[inline(always)]
pub fn at_tc(packet: &SkbPacket, verdict: Verdict) -> i32 {
    match verdict.action() {
        Action::Pass => TC_ACT_OK,
        Action::Transmit => redirect(pipeline::ingress(packet)) as i32,
        Action::Redirect(ifindex) => redirect(ifindex) as i32,
        Action::Drop => TC_ACT_SHOT,
    }
}

macro_rules! stage {
    ($($stage:path: $at_xdp:ident, $at_tc:ident;)*) => {
        $(
            #[xdp(frags)]
            pub fn $at_xdp(ctx: XdpContext) -> u32 {
                at_xdp($stage(&mut XdpPacket::new(&ctx)))
            }

            #[classifier]
            pub fn $at_tc(ctx: TcContext) -> i32 {
                let mut packet = SkbPacket::new(&ctx);
                let verdict = $stage(&mut packet);
                at_tc(&packet, verdict)
            }
        )*
    };
}

stage! {
    stages::track::<u32, _>: edge_xdp_track, edge_tc_track;
    stages::create::<u32, _>: edge_xdp_create, edge_tc_create;
    stages::send::<u32, _>: edge_xdp_send, edge_tc_send;
    stages::relay::<u32, _>: edge_xdp_relay, edge_tc_relay;
    stages::answer::<u32, _>: edge_xdp_answer, edge_tc_answer;
    stages::frag::<u32, _>: edge_xdp_frag, edge_tc_frag;
    pipeline::ipv6: edge_xdp_ipv6, edge_tc_ipv6;
    stages::track::<Wide, _>: edge_xdp_track6, edge_tc_track6;
    stages::create::<Wide, _>: edge_xdp_creat6, edge_tc_creat6;
    stages::send::<Wide, _>: edge_xdp_send6, edge_tc_send6;
    stages::mid_flow::<u32, _>: edge_xdp_midflo, edge_tc_midflo;
    stages::mid_flow::<Wide, _>: edge_xdp_midfl6, edge_tc_midfl6;
    stages::relay::<Wide, _>: edge_xdp_relay6, edge_tc_relay6;
    stages::answer::<Wide, _>: edge_xdp_answe6, edge_tc_answe6;
    stages::frag::<Wide, _>: edge_xdp_frag6, edge_tc_frag6;
}
