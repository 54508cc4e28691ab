//! Packets in the middle of a TCP connection, or replies, that have no flow. In dnat mode all edges choose alike by the tuple,
//! so that a packet can be taken for the flow that would have been made; in full-nat mode the client is told that there is none
//! (RFC 9293, 3.10.7.1).

use edge_common::{
    maps::{ServiceEntry, balance, flow_flag, mode, service_flag},
    verdict::Reason,
};

use super::{
    choose::agreed,
    connections::bits::{ACK, FIN, RST, SYN},
    coverage::Point,
    create::{Plan, claim_own, numbered, open},
    decide::{Decision, Input, refuse, send},
    flow::Key,
    protect,
    state::{State, Table, twin_key},
    wire::{self, Segment, UDP},
};
use crate::datapath::rig::{Action, Hook};

/// A client's segment that cannot begin a flow.
pub fn segment(state: &mut State, input: &Input, segment: &Segment, number: u32) -> Decision {
    let Some(service) = state.config.services.get(&number).map(|(service, _)| *service) else {
        state.hit(Point::CreateNoService);
        return refuse(state, Reason::NotReady, number);
    };
    if service.mode != mode::DNAT || service.balance != balance::MAGLEV || segment.flags & SYN != 0 {
        return answer(state, input, segment, number, &service);
    }
    if let Some(reason) = protect::refuses(state, input, &segment.key, number, &service, false) {
        return refuse(state, reason, number);
    }
    let Some(chosen) = agreed(state, input, number, &segment.key, 0) else {
        state.hit(Point::AdoptNoBackend);
        return refuse(state, Reason::NoBackend, number);
    };
    state.hit(Point::AdoptedSegment);
    let known = if segment.flags & ACK != 0 { (flow_flag::CLIENT_ACKED, segment.ack) } else { (0, 0) };
    adopt(state, input, segment, segment.key, (number, chosen), known)
}

/// A dnat backend's packet to somebody else than this host.
pub fn reply(state: &mut State, input: &Input, segment: &Segment, backend: u32) -> Decision {
    let number = state.config.backends.get(&backend).map_or(0, |backend| backend.service);
    let service = state.config.services.get(&number).map(|(service, _)| *service);
    let Some(service) = service.filter(|service| service.mode == mode::DNAT) else {
        state.hit(Point::ReplyWithoutFlow);
        return refuse(state, Reason::ReplyWithoutFlow, number);
    };
    let key = segment.key;
    let client = Key {
        v6: key.v6,
        src: key.dst,
        dst: service.address,
        src_port: key.dst_port,
        dst_port: port_asked(&service, key.src_port),
        protocol: key.protocol,
    };
    if segment.lacks_checksum {
        state.hit(Point::ReplyNoChecksum);
        return refuse(state, Reason::ReplyWithoutFlow, number);
    }
    if !is_of(state, number, &client) {
        state.hit(Point::PortOfAnother);
        return refuse(state, Reason::ReplyWithoutFlow, number);
    }
    let first = agreed(state, input, number, &client, 0);
    let second = first.and_then(|first| agreed(state, input, number, &client, first));
    if first != Some(backend) && second != Some(backend) {
        state.hit(Point::ReplyWithoutFlow);
        return refuse(state, Reason::ReplyWithoutFlow, number);
    }
    for table in [Table::Established, Table::HalfOpen] {
        if state.flow(table, &client).is_some_and(|flow| twin_key(flow) != key) {
            state.hit(Point::ReplyOfAnother);
            return refuse(state, Reason::TwinTaken, number);
        }
    }
    state.hit(Point::AdoptedReply);
    let known = match segment.flags {
        _ if key.protocol == UDP => (flow_flag::REPLIED, 0),
        flags if flags & RST != 0 => (0, 0),
        flags if flags & SYN != 0 && flags & ACK != 0 => (flow_flag::SYN_ACK_SEEN, segment.seq.wrapping_add(1)),
        // What is under way may be 2^19 behind this segment, or ahead.
        _ => (flow_flag::SYN_ACK_SEEN, segment.seq.wrapping_sub(1 << 19)),
    };
    adopt(state, input, segment, client, (number, backend), known)
}

/// The VIP's port to which a packet went that a dnat backend answers from its port `replies`: where the service has all ports,
/// its backends keep them.
pub(super) fn port_asked(service: &ServiceEntry, replies: u16) -> u16 {
    if service.port == 0 { replies } else { service.port }
}

/// True where a client's packet of this tuple is the service's: of a service of all ports some are other services'.
pub(super) fn is_of(state: &State, number: u32, client: &Key) -> bool {
    let all_ports = state.config.services.get(&number).is_some_and(|(service, _)| service.port == 0);
    !all_ports || numbered(&state.config.frontends, client.dst, client.dst_port, client) == Some(number)
}

fn adopt(
    state: &mut State,
    input: &Input,
    segment: &Segment,
    client: Key,
    (number, chosen): (u32, u32),
    (known, ack_floor): (u16, u32),
) -> Decision {
    let (Some((service, _)), Some(backend)) = (state.config.services.get(&number), state.config.backends.get(&chosen))
    else {
        return refuse(state, Reason::NotReady, number);
    };
    let plan = Plan {
        key: client,
        service: *service,
        number,
        chosen,
        backend: *backend,
        now: input.precise,
        flags: flow_flag::ADOPTED | known,
        ack_floor,
    };
    if !claim_own(state, &plan, &plan.reply_key(client.src, client.src_port)) {
        state.hit(Point::AdoptTaken);
        return refuse(state, Reason::TwinTaken, number);
    }
    if open(state, &plan, client.src, client.src_port) {
        state.because(Reason::MidFlowAdopted, number);
        protect::half_opened(state, input, &client, number);
    }
    send(state, input, segment, Table::HalfOpen)
}

/// Tells the client that there is no such connection, unless that would answer a RST, or may not be known yet.
fn answer(state: &mut State, input: &Input, segment: &Segment, number: u32, service: &ServiceEntry) -> Decision {
    if segment.flags & RST != 0 || !state.config.answers {
        state.hit(Point::MidFlowSilent);
        return refuse(state, Reason::MidFlowSilent, number);
    }
    if !protect::lets_in(state, &segment.key, number, service) {
        return refuse(state, Reason::SourceDenied, number);
    }
    if service.flags & service_flag::DEDICATED != 0 {
        state.hit(Point::NoFlow);
        state.because(Reason::NoFlow, number);
        return Decision::PASS;
    }
    let to_many = input.frame[0] & 1 != 0 || input.frame[6] & 1 != 0;
    if segment.ip.header_len != wire::plain_header(segment.ip.v6) || to_many {
        state.hit(Point::MidFlowSilent);
        return refuse(state, Reason::MidFlowSilent, number);
    }
    if !input.was_sent {
        state.hit(Point::MidFlowLimited);
        return refuse(state, Reason::MidFlowLimited, number);
    }
    state.hit(Point::MidFlowReset);
    state.because(Reason::MidFlowReset, number);
    let action = if input.hook == Hook::Xdp { Action::Transmit } else { Action::Redirect };
    Decision { action, reset: true, ..Decision::PASS }
}

/// The RST that answers a segment: back the way it came, and taken by its sender.
///
/// # Errors
/// What is wrong with it.
pub fn judge_reset(input: &[u8], got: &[u8]) -> Result<(), String> {
    let (Some(asked), Some(sent)) = (wire::whole_segment(input), wire::whole_segment(got)) else {
        return Err(format!("no segment: {got:02x?}"));
    };
    let key = asked.key.reversed();
    let len = wire::ETHERNET + wire::plain_header(key.v6) + 20;
    let payload = asked.ip.total_len - asked.ip.header_len - usize::from(input[asked.l4 + 12] >> 4) * 4;
    let takes = payload + usize::from(asked.flags & SYN != 0) + usize::from(asked.flags & FIN != 0);
    let (flags, seq, ack) = match asked.flags & ACK {
        0 => (RST | ACK, 0, asked.seq.wrapping_add(takes as u32)),
        _ => (RST, asked.ack, 0),
    };
    let macs = [&input[6..12], &input[..6]].concat();
    if sent.key != key || (sent.flags, sent.seq, sent.ack) != (flags, seq, ack) || got[..12] != macs || got.len() != len
    {
        return Err(format!("no reset of this segment\n  segment {input:02x?}\n  got     {got:02x?}"));
    }
    if crate::datapath::frame::endpoints_if_valid(got).is_none() {
        return Err(format!("a reset with a wrong checksum: {got:02x?}"));
    }
    Ok(())
}
