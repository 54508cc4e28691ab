//! The decision function: what must happen to a packet, given the tables. The stages are in files of their own.

use edge_common::{address::Wide, verdict::Reason};

use super::{
    connections::{self, Tracked},
    coverage::Point,
    create,
    flow::Key,
    forward, fragments, icmp,
    state::{Config, State, Table},
    told::{Told, What},
    wire::{self, Ip, Segment, Walk},
};
use crate::datapath::rig::{Action, Hook};

/// A packet at a hook.
#[derive(Clone, Debug)]
pub struct Input<'a> {
    /// The whole frame.
    pub frame: &'a [u8],
    /// Interface it came in by.
    pub ingress: u32,
    /// Where.
    pub hook: Hook,
    /// TC: bytes of payload in each segment the kernel will cut it into; 0: it is one packet.
    pub gso_size: u32,
    /// Nanoseconds, coarse: what flows are aged by.
    pub now: u64,
    /// The same clock, as it was read for the windows of half-open flows: a tick may have come between.
    pub window: u64,
    /// The same clock, as it was read for the choice of a backend and for what is remembered of it.
    pub chosen: u64,
    /// Nanoseconds, to the moment: what new flows are made by. Up to a tick after `now`.
    pub precise: u64,
    /// The same clock before the program ran and after it had.
    pub ran: (u64, u64),
    /// The program sent something: whether a message to the sender is let through is its pace's choice.
    pub was_sent: bool,
    /// The IP ID that the packet left with: the program's choice where a fragmented packet gets a new source.
    pub id_after: u32,
}

/// Where a rewritten packet's headers differ from those it came with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rewrite {
    /// Source and destination address.
    pub addresses: (Wide, Wide),
    /// Source and destination port, network order.
    pub ports: (u16, u16),
    /// Destination and source MAC; `None`: the stack sets them.
    pub macs: Option<([u8; 6], [u8; 6])>,
    /// IP ID.
    pub id: u32,
    /// Where a lower MSS stands in the frame, and which.
    pub mss: Option<(usize, u16)>,
    /// The packet it was.
    pub segment: Original,
}

/// What of the packet the rewriting depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Original {
    /// Offset of its layer-4 header.
    pub l4: usize,
    /// UDP rather than TCP.
    pub udp: bool,
    /// A later fragment, of which only the IP header is known.
    pub later_fragment: bool,
    /// IPv6.
    pub v6: bool,
    /// Offset of the fragment header of an IPv6 fragment, else 0.
    pub fragment_at: usize,
}

/// What must happen to a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// The program's verdict.
    pub action: Action,
    /// How the packet must leave; `None`: byte for byte as it came, where it does not leave dropped.
    pub rewrite: Option<Rewrite>,
    /// It leaves as this ICMP message to its sender.
    pub told: Option<Told>,
    /// It is an ICMP error, and must leave like this.
    pub error: Option<icmp::Translated>,
    /// It leaves as a RST to its sender.
    pub reset: bool,
}

impl Decision {
    /// To the stack, untouched.
    pub const PASS: Self = Self { action: Action::Pass, rewrite: None, told: None, error: None, reset: false };
    /// Gone. What its bytes are does not matter.
    pub const DROP: Self = Self { action: Action::Drop, rewrite: None, told: None, error: None, reset: false };
}

/// What the program chose where it is free to: looked at after it ran, and judged by the model.
pub trait Choices {
    /// The forward entry that a new flow got, as (SNAT address, SNAT port); `None`: there is none.
    fn source(&self, key: &Key) -> Option<(Wide, u16)>;
    /// A backend's SNAT cursor now.
    fn cursor(&self, backend: u32) -> u32;
}

/// What must happen to the packet; `state` is what the tables must be afterwards.
///
/// # Errors
/// Where a choice of the program breaks a rule: says which.
pub fn decide(state: &mut State, input: &Input, choices: &dyn Choices) -> Result<Decision, String> {
    let Some(mut ip) = wire::ip(input.frame) else {
        state.hit(Point::NotIp);
        return Ok(Decision::PASS);
    };
    let to_us = state.config.destinations[Config::bit(ip.v6, &ip.dst)];
    let ours = to_us || state.config.sources[Config::bit(ip.v6, &ip.src)];
    if ip.protocol == icmp::number(ip.v6) {
        return Ok(icmp::relay(state, input, ip));
    }
    if !ours {
        state.hit(Point::NotOurs);
        return Ok(Decision::PASS);
    }
    match wire::upper(input.frame, &mut ip) {
        Walk::Upper if ip.protocol == wire::TCP || ip.protocol == wire::UDP => {
            state.coverage.hit_if(Point::Extensions, ip.v6 && ip.header_len != wire::plain_header(true));
            transport(state, input, ip, to_us, choices)
        }
        Walk::Upper if ip.v6 && ip.protocol == icmp::number(true) => Ok(icmp::relay(state, input, ip)),
        Walk::Upper => {
            state.hit(Point::OtherProtocol);
            Ok(Decision::PASS)
        }
        Walk::Fragment if ip.later_fragment => Ok(fragments::follow(state, input, ip)),
        Walk::Fragment => first_fragment(state, input, ip, to_us, choices),
        walk => Ok(no_headers(state, walk)),
    }
}

/// The first fragment of an IPv6 packet: all headers are in it (RFC 7112).
fn first_fragment(
    state: &mut State,
    input: &Input,
    mut ip: Ip,
    to_us: bool,
    choices: &dyn Choices,
) -> Result<Decision, String> {
    match wire::inside_first(input.frame, &mut ip) {
        Walk::Upper if ip.protocol == wire::TCP || ip.protocol == wire::UDP => {
            transport(state, input, ip, to_us, choices)
        }
        Walk::Upper => {
            state.hit(Point::OtherProtocol);
            Ok(Decision::PASS)
        }
        walk => Ok(no_headers(state, walk)),
    }
}

/// A walk over extension headers that led nowhere.
fn no_headers(state: &mut State, walk: Walk) -> Decision {
    if walk == Walk::Short {
        state.hit(Point::ExtensionsCutShort);
        return refuse(state, Reason::Malformed, 0);
    }
    state.hit(Point::ExtensionsForStack);
    state.because(Reason::ExtensionHeaders, 0);
    Decision::PASS
}

fn transport(state: &mut State, input: &Input, ip: Ip, to_us: bool, choices: &dyn Choices) -> Result<Decision, String> {
    if ip.later_fragment {
        return Ok(fragments::follow(state, input, ip));
    }
    let Some(segment) = wire::segment(input.frame, ip) else {
        state.hit(Point::Malformed);
        return Ok(refuse(state, Reason::Malformed, 0));
    };
    match connections::track(state, input, &segment) {
        Tracked::Decided(decision) => Ok(decision),
        Tracked::NoFlow(past) => create::untracked(state, input, &segment, to_us, past, choices),
    }
}

/// Counts a reason and drops.
pub fn refuse(state: &mut State, reason: Reason, service: u32) -> Decision {
    let limits = [Reason::SourceFlowRate, Reason::SourcePacketRate, Reason::SourceHalfOpen];
    if [Reason::NoBackend, Reason::BackendsFull].contains(&reason) || limits.contains(&reason) {
        state.refused = Some((service, reason));
    }
    state.because(reason, service);
    Decision::DROP
}

/// Tells the sender why the packet went no further, as far as it may be told (RFC 1812, 4.3.2.7; RFC 4443, 2.4 (e)).
pub fn answer(state: &mut State, input: &Input, what: What, service: u32) -> Decision {
    let to_many = input.frame.first().is_none_or(|byte| byte & 1 != 0);
    let own = state.config.own.get(&input.ingress);
    let sender = wire::ip(input.frame).filter(|ip| is_host(ip.v6, &ip.src));
    let own = sender.and_then(|ip| own.map(|own| if ip.v6 { own.v6 } else { own.v4 }));
    let Some(own) = own.filter(|own| *own != [0; 4] && !to_many) else {
        state.hit(Point::Unanswered);
        return refuse(state, Reason::IcmpUnanswered, service);
    };
    if !input.was_sent {
        state.hit(Point::AnswerLimited);
        return refuse(state, Reason::IcmpLimited, service);
    }
    state.hit(Point::Answered);
    let reason = match what {
        What::Expired => Reason::TtlExpired,
        What::TooBig(_) => Reason::TooBig,
    };
    state.because(reason, service);
    let action = if input.hook == Hook::Xdp { Action::Transmit } else { Action::Redirect };
    Decision { action, told: Some(Told { what, own }), ..Decision::PASS }
}

/// True for an address of a single host that others can reach: no network's own, loopback, or multicast one.
fn is_host(v6: bool, address: &Wide) -> bool {
    let first = |word: usize| address[word].to_ne_bytes()[0];
    if v6 { first(0) != 0xff && address[..3] != [0; 3] } else { !matches!(first(3), 0 | 127 | 224..) }
}

/// Sends the packet on by an entry.
pub fn send(state: &mut State, input: &Input, segment: &Segment, table: Table) -> Decision {
    forward::send(state, input, segment, table)
}
