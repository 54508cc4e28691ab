//! Fragments: the rest of a packet follows its first fragment, which has the ports.

use edge_common::{
    maps::{Fragment, FragmentKey},
    verdict::Reason,
};

use super::{
    coverage::Point,
    decide::{Decision, Input, Original, Rewrite, answer, refuse},
    flow::{Flow, Key},
    forward::{Onward, account, onward},
    state::{SECOND, State, TABLES},
    told::What,
    wire::{ETHERNET, Ip, Segment, UDP},
};
use crate::datapath::rig::Action;

/// How long the rest of a packet may come after its first fragment: as long as Linux waits for it.
const LIFETIME: u64 = 30 * SECOND;

/// A first fragment goes on by `flow`: the ID that it leaves with, which is free where the source is a new one.
pub fn remember(state: &mut State, input: &Input, segment: &Segment, flow: &Flow) -> u32 {
    state.hit(Point::FirstFragment);
    let (ip, key) = (&segment.ip, &segment.key);
    let id = if flow.new_src == key.src { ip.id } else { input.id_after };
    let (src_port, dst_port, protocol) = (key.src_port, key.dst_port, key.protocol);
    let fragment =
        Fragment { seen: input.now, src_port, dst_port, id: in_map(ip.v6, id), protocol, ..Fragment::default() };
    state.fragments.insert(name(ip), fragment);
    state.touched_fragments.push(name(ip));
    id
}

/// A later fragment.
pub fn follow(state: &mut State, input: &Input, ip: Ip) -> Decision {
    let first = state.fragments.get(&name(&ip)).copied();
    let in_time = first.filter(|first| input.now.saturating_sub(first.seen) < LIFETIME);
    let Some(Fragment { src_port, dst_port, id, protocol, .. }) = in_time else {
        state.hit(if first.is_some() { Point::FragmentTooLate } else { Point::Fragment });
        state.because(Reason::Fragment, 0);
        return Decision::PASS;
    };
    // The swap goes both ways.
    let id = in_map(ip.v6, id);
    let key = Key { v6: ip.v6, src: ip.src, dst: ip.dst, src_port, dst_port, protocol };
    let Some((table, flow)) = TABLES.into_iter().find_map(|table| Some((table, *state.flow(table, &key)?))) else {
        state.hit(Point::FragmentWithoutFlow);
        return refuse(state, Reason::FragmentWithoutFlow, 0);
    };
    let end = ETHERNET + ip.total_len;
    if ip.header_len < 20 || ip.total_len < ip.header_len || end > input.frame.len() {
        state.hit(Point::FragmentMalformed);
        return refuse(state, Reason::Malformed, flow.service);
    }
    if ip.ttl <= 1 {
        state.hit(Point::FragmentTtl);
        return tell(state, input, &ip, (What::Expired, Reason::IcmpUnanswered), flow.service);
    }
    state.hit(Point::LaterFragment);
    let l4 = ETHERNET + ip.header_len;
    let segment = Segment { ip, key, l4, headers: ip.header_len, flags: 0, seq: 0, ack: 0, lacks_checksum: false };
    let rewrite = |macs| Rewrite {
        addresses: (flow.new_src, flow.new_dst),
        ports: (flow.new_src_port, flow.new_dst_port),
        macs,
        id,
        mss: None,
        segment: Original {
            l4,
            udp: key.protocol == UDP,
            later_fragment: true,
            v6: ip.v6,
            fragment_at: ip.fragment_at,
        },
    };
    let outcome = onward(state, input, &ip, 0, (table, &flow));
    let (action, macs) = match outcome {
        Onward::Nowhere(reason) => return refuse(state, reason, flow.service),
        Onward::TooBig(mtu) => {
            state.hit(Point::FragmentTooBig);
            return tell(state, input, &ip, (What::TooBig(mtu), Reason::IcmpUndeliverable), flow.service);
        }
        Onward::Stack(reason) => {
            state.because(reason, flow.service);
            (Action::Pass, None)
        }
        Onward::Out(action, macs) => (action, Some(macs)),
    };
    account(state, input, &segment, table);
    Decision { action, rewrite: Some(rewrite(macs)), ..Decision::PASS }
}

/// What all fragments of a packet have in common.
fn name(ip: &Ip) -> FragmentKey {
    FragmentKey { src: ip.src, dst: ip.dst, id: in_map(ip.v6, ip.id), protocol: ip.kind().into() }
}

/// An identification as its bytes are in the packet.
fn in_map(v6: bool, id: u32) -> u32 {
    if v6 { id.to_be() } else { (id as u16).to_be().into() }
}

/// Nobody is told about a later fragment of IPv4 (RFC 1812, 4.3.2.7); RFC 4443, 2.4 (e), makes no such exception.
fn tell(state: &mut State, input: &Input, ip: &Ip, (told, untold): (What, Reason), service: u32) -> Decision {
    if !ip.v6 {
        return refuse(state, untold, service);
    }
    state.hit(Point::LaterFragmentTold);
    answer(state, input, told, service)
}
