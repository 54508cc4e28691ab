//! Fragments: the rest of a packet follows its first fragment, which has the ports.

use edge_common::{flow::FlowKeyV4, maps::FlowV4, verdict::Reason};

use super::{
    coverage::Point,
    decide::{Decision, Input, Original, Rewrite, refuse},
    forward::{Onward, account, onward},
    state::{State, TABLES},
    wire::{ETHERNET, Ip, Segment, UDP},
};
use crate::datapath::rig::Action;

/// A first fragment goes on by `flow`: the ID that it leaves with, which is free where the source is a new one.
pub fn remember(state: &mut State, input: &Input, segment: &Segment, flow: &FlowV4) -> u16 {
    state.hit(Point::FirstFragment);
    let (ip, key) = (&segment.ip, &segment.key);
    let id = if flow.new_src == key.src { ip.id } else { input.id_after };
    state.fragments.insert((ip.src, ip.dst, ip.id, ip.protocol), (key.src_port, key.dst_port, id));
    id
}

/// A later fragment.
pub fn follow(state: &mut State, input: &Input, ip: Ip) -> Decision {
    let Some((src_port, dst_port, id)) = state.fragments.get(&(ip.src, ip.dst, ip.id, ip.protocol)).copied() else {
        state.hit(Point::Fragment);
        state.because(Reason::Fragment, 0);
        return Decision::PASS;
    };
    let key = FlowKeyV4 { src: ip.src, dst: ip.dst, src_port, dst_port, protocol: ip.protocol, _pad: [0; 3] };
    let Some((table, flow)) = TABLES.into_iter().find_map(|table| Some((table, *state.flow(table, &key)?))) else {
        state.hit(Point::FragmentWithoutFlow);
        return refuse(state, Reason::FragmentWithoutFlow, 0);
    };
    if ip.ttl <= 1 {
        state.hit(Point::FragmentTtl);
        return refuse(state, Reason::IcmpUnanswered, flow.service);
    }
    state.hit(Point::LaterFragment);
    let l4 = ETHERNET + ip.header_len;
    let segment = Segment { ip, key, l4, headers: ip.header_len, flags: 0, seq: 0, ack: 0 };
    let rewrite = |macs| Rewrite {
        addresses: (flow.new_src, flow.new_dst),
        ports: (flow.new_src_port, flow.new_dst_port),
        macs,
        id,
        segment: Original { l4, udp: key.protocol == UDP, later_fragment: true },
    };
    let outcome = onward(state, input, &ip, 0, (table, &flow));
    let (action, macs) = match outcome {
        Onward::Nowhere(reason) => return refuse(state, reason, flow.service),
        Onward::TooBig => {
            state.hit(Point::FragmentTooBig);
            return refuse(state, Reason::IcmpUndeliverable, flow.service);
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
