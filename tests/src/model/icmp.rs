//! ICMP errors (RFC 792, RFC 4443) about packets of flows: they travel the way of the flow that would answer the quoted packet, with
//! the quote as its sender sent it.

use edge_common::{address::Wide, maps::mode, verdict::Reason};

use super::{
    checksum,
    choose::agreed,
    coverage::Point,
    create::{numbered, port_of},
    decide::{Decision, Input, refuse},
    flow::{Flow, Key},
    forward::{Onward, onward},
    midflow,
    state::{Config, Route, State, TABLES, Table, is_link_local, twin_key},
    wire::{self, Ip, TCP, UDP, Walk},
};

/// The IP protocol number of ICMP or ICMPv6.
pub fn number(v6: bool) -> u8 {
    if v6 { 58 } else { 1 }
}

/// Bytes of an ICMP header.
pub const HEADER: usize = 8;
/// Unreachable, time exceeded, parameter problem: the messages about a packet.
const ERRORS: [u8; 3] = [3, 11, 12];
/// Unreachable, packet too big, time exceeded, parameter problem.
const ERRORS_V6: [u8; 4] = [1, 2, 3, 4];

/// How an error must leave: who is told by whom, and what its quote becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translated {
    /// Source and destination of the error.
    pub outside: (Wide, Wide),
    /// Source and destination of the quoted packet.
    pub inside: (Wide, Wide),
    /// Its ports, network order.
    pub ports: (u16, u16),
    /// Destination and source MAC; `None`: the stack sets them.
    pub macs: Option<([u8; 6], [u8; 6])>,
    /// What was read of the error.
    pub quote: Quote,
}

/// A quoted packet: offsets in the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quote {
    /// Its tuple.
    pub key: Key,
    /// Of the ICMP header.
    pub icmp: usize,
    /// Of the quoted IP header.
    pub ip: usize,
    /// Of the quoted layer-4 header.
    pub l4: usize,
    /// Of the end of the packet.
    pub end: usize,
    /// UDP rather than TCP.
    pub udp: bool,
}

impl Quote {
    /// The offset of the quoted layer-4 checksum, as far as it was quoted.
    pub fn check(&self) -> Option<usize> {
        let at = self.l4 + checksum::offset(self.udp);
        (at + 2 <= self.end).then_some(at)
    }
}

/// An ICMP packet, to whomever.
pub fn relay(state: &mut State, input: &Input, ip: Ip) -> Decision {
    let Some(quote) = read(input.frame, ip) else {
        state.hit(Point::OtherProtocol);
        return Decision::PASS;
    };
    let key = quote.key.reversed();
    let config = &state.config;
    if !config.destinations[Config::bit(key.v6, &key.dst)] && !config.sources[Config::bit(key.v6, &key.src)] {
        state.hit(Point::NotOurs);
        return Decision::PASS;
    }
    let known = TABLES.into_iter().find_map(|table| Some((table, *state.flow(table, &key)?)));
    match known {
        Some((table, flow)) => along(state, input, ip, quote, (table, &flow)),
        None => assume(state, input, ip, quote),
    }
}

/// The quote of a whole error; at least 8 bytes of a TCP or UDP packet beyond its IP header.
fn read(frame: &[u8], ip: Ip) -> Option<Quote> {
    let end = wire::ETHERNET + ip.total_len;
    let icmp = wire::ETHERNET + ip.header_len;
    if ip.fragment || ip.header_len < 20 || end > frame.len() {
        return None;
    }
    let kind = frame.get(icmp)?;
    if !(if ip.v6 { &ERRORS_V6[..] } else { &ERRORS[..] }).contains(kind) {
        return None;
    }
    let at = icmp + HEADER;
    // As if it had a link-layer header in front of it.
    let quoted = frame.get(at - wire::ETHERNET..)?;
    let mut inner = wire::header(quoted, ip.v6)?;
    let mut walk = wire::upper(quoted, &mut inner);
    if walk == Walk::Fragment && !inner.later_fragment {
        walk = wire::inside_first(quoted, &mut inner);
    }
    let l4 = at + inner.header_len;
    let known = walk == Walk::Upper && [TCP, UDP].contains(&inner.protocol);
    if !known || inner.later_fragment || inner.header_len < 20 || l4 + 8 > end {
        return None;
    }
    let port = |at: usize| wire::word(frame, at).map(u16::to_be);
    let (v6, src, dst, protocol) = (inner.v6, inner.src, inner.dst, inner.protocol);
    let key = Key { v6, src, dst, src_port: port(l4)?, dst_port: port(l4 + 2)?, protocol };
    Some(Quote { key, icmp, ip: at, l4, end, udp: protocol == UDP })
}

fn unmatched(state: &mut State) -> Decision {
    state.hit(Point::IcmpUnmatched);
    state.because(Reason::IcmpUnmatched, 0);
    Decision::PASS
}

/// Translates the error as packets of the flow are; the flow does not notice.
fn along(state: &mut State, input: &Input, ip: Ip, quote: Quote, (table, flow): (Table, &Flow)) -> Decision {
    // A router tells the sender of what it quotes; another's error is not about this flow.
    if ip.dst != flow.key.dst {
        return unmatched(state);
    }
    if ip.ttl <= 1 {
        state.hit(Point::IcmpExpired);
        return refuse(state, Reason::IcmpUndeliverable, flow.service);
    }
    state.hit(Point::IcmpTranslated);
    state.because(Reason::IcmpTranslated, flow.service);
    // A router keeps its name, but for a full-nat backend, which sees the edge only.
    let to_full_nat_backend = flow.direction == 0 && flow.new_src != flow.key.src;
    // What no router may pass on (RFC 4291, 2.5.6) means nothing beyond its link.
    let link_local = ip.v6 && is_link_local(&ip.src);
    state.coverage.hit_if(Point::IcmpLinkLocal, link_local);
    let own_name = to_full_nat_backend || ip.src == flow.key.src || link_local;
    let src = if own_name { flow.new_src } else { ip.src };
    let translated = |macs| Translated {
        outside: (src, flow.new_dst),
        inside: (flow.new_dst, flow.new_src),
        ports: (flow.new_dst_port, flow.new_src_port),
        macs,
        quote,
    };
    match onward(state, input, &ip, HEADER, (table, flow)) {
        Onward::Nowhere(reason) => refuse(state, reason, flow.service),
        Onward::TooBig(_) => {
            state.hit(Point::IcmpTooBig);
            refuse(state, Reason::IcmpUndeliverable, flow.service)
        }
        Onward::Stack(reason) => {
            state.because(reason, flow.service);
            Decision { error: Some(translated(None)), ..Decision::PASS }
        }
        Onward::Out(action, macs) => Decision { action, error: Some(translated(Some(macs))), ..Decision::PASS },
    }
}

/// An error about no flow that is known here: in dnat mode every edge knows which one it must be.
fn assume(state: &mut State, input: &Input, ip: Ip, quote: Quote) -> Decision {
    let quoted = quote.key;
    let config = state.config.clone();
    // About a backend's reply, which went to the client as the VIP's; or about a client's packet on its way to a backend.
    let (number, named) = match numbered(&config.frontends, quoted.src, quoted.src_port, &quoted) {
        Some(number) => (number, None),
        None => match numbered(&config.dnat_backends, quoted.dst, quoted.dst_port, &quoted) {
            Some(named) => (config.backends.get(&named).map_or(0, |backend| backend.service), Some(named)),
            None => return unmatched(state),
        },
    };
    let Some((service, _)) = config.services.get(&number).filter(|(service, _)| service.mode == mode::DNAT) else {
        return unmatched(state);
    };
    let client = match named {
        None => quoted.reversed(),
        Some(_) => Key { dst: service.address, dst_port: midflow::port_asked(service, quoted.dst_port), ..quoted },
    };
    let strangers = named.is_some() && !midflow::is_of(state, number, &client);
    state.coverage.hit_if(Point::PortOfAnother, strangers);
    let chosen = agreed(state, input, number, &client, 0).filter(|_| !strangers);
    let backend = match (chosen, named) {
        (Some(chosen), None) => chosen,
        (Some(chosen), Some(named)) if chosen == named => chosen,
        (_, None) => return unmatched(state),
        // Somebody else's choice, of which the client knows nothing.
        _ if config.route(ip.v6, &ip.src, &ip.dst) != Route::NotForwarded => {
            state.hit(Point::IcmpOtherChoice);
            return refuse(state, Reason::ReplyWithoutFlow, number);
        }
        _ => return unmatched(state),
    };
    let Some(backend) = config.backends.get(&backend) else { return unmatched(state) };
    state.hit(Point::IcmpAssumed);
    let mut flow = Flow {
        key: client,
        new_src: client.src,
        new_src_port: client.src_port,
        new_dst: backend.address,
        new_dst_port: port_of(backend, client.dst_port),
        service: number,
        ..Flow::default()
    };
    if named.is_some() {
        flow = Flow {
            key: twin_key(&flow),
            new_src: client.dst,
            new_src_port: client.dst_port,
            new_dst: client.src,
            new_dst_port: client.src_port,
            direction: 1,
            ..flow
        };
    }
    // In no table: what is asked of one finds nothing.
    along(state, input, ip, quote, (Table::HalfOpen, &flow))
}
