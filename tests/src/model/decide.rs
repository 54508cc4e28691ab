//! The decision function: what must happen to a packet, given the tables. The stages are in files of their own.

use edge_common::verdict::Reason;

use super::{
    connections::{self, Tracked},
    coverage::Point,
    create, forward, fragments, icmp,
    state::{Config, State, Table},
    wire::{self, Ip, Segment},
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
    /// Nanoseconds, to the moment: what new flows are made by. Up to a tick after `now`.
    pub precise: u64,
    /// The same clock before the program ran and after it had.
    pub ran: (u64, u64),
    /// The program sent something: whether a message to the sender is let through is its pace's choice.
    pub was_sent: bool,
    /// The IP ID that the packet left with: the program's choice where a fragmented packet gets a new source.
    pub id_after: u16,
}

/// Where a rewritten packet's headers differ from those it came with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rewrite {
    /// Source and destination address, network order.
    pub addresses: (u32, u32),
    /// Source and destination port, network order.
    pub ports: (u16, u16),
    /// Destination and source MAC; `None`: the stack sets them.
    pub macs: Option<([u8; 6], [u8; 6])>,
    /// IP ID.
    pub id: u16,
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
}

/// What must happen to a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// The program's verdict.
    pub action: Action,
    /// How the packet must leave; `None`: byte for byte as it came, where it does not leave dropped.
    pub rewrite: Option<Rewrite>,
    /// It leaves as an ICMP message to its sender.
    pub message: bool,
    /// It is an ICMP error, and must leave like this.
    pub error: Option<icmp::Translated>,
    /// It leaves as a RST to its sender.
    pub reset: bool,
}

impl Decision {
    /// To the stack, untouched.
    pub const PASS: Self = Self { action: Action::Pass, rewrite: None, message: false, error: None, reset: false };
    /// Gone. What its bytes are does not matter.
    pub const DROP: Self = Self { action: Action::Drop, rewrite: None, message: false, error: None, reset: false };
}

/// What the program chose where it is free to: looked at after it ran, and judged by the model.
pub trait Choices {
    /// The forward entry that a new flow got, as (SNAT address, SNAT port), network order; `None`: there is none.
    fn source(&self, key: &edge_common::flow::FlowKeyV4) -> Option<(u32, u16)>;
    /// A backend's SNAT cursor now.
    fn cursor(&self, backend: u32) -> u32;
}

/// What must happen to the packet; `state` is what the tables must be afterwards.
///
/// # Errors
/// Where a choice of the program breaks a rule: says which.
pub fn decide(state: &mut State, input: &Input, choices: &dyn Choices) -> Result<Decision, String> {
    let Some(ip) = wire::ipv4(input.frame) else {
        state.hit(Point::NotIpv4);
        return Ok(Decision::PASS);
    };
    if ip.protocol == icmp::ICMP {
        return Ok(icmp::relay(state, input, ip));
    }
    let to_us = state.config.destinations[Config::bit(ip.dst)];
    if !to_us && !state.config.sources[Config::bit(ip.src)] {
        state.hit(Point::NotOurs);
        return Ok(Decision::PASS);
    }
    if ip.protocol != wire::TCP && ip.protocol != wire::UDP {
        state.hit(Point::OtherProtocol);
        return Ok(Decision::PASS);
    }
    transport(state, input, ip, to_us, choices)
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
    if matches!(reason, Reason::SourceFlowRate | Reason::SourcePacketRate | Reason::SourceHalfOpen) {
        state.refused = Some((service, reason));
    }
    state.because(reason, service);
    Decision::DROP
}

/// Tells the sender why the packet went no further, as far as it may be told (RFC 1812, 4.3.2.7).
pub fn answer(state: &mut State, input: &Input, reason: Reason, service: u32) -> Decision {
    let sender = input.frame.get(wire::ETHERNET + 12).copied().unwrap_or(0);
    let to_many = input.frame.first().is_none_or(|byte| byte & 1 != 0);
    if !state.config.own.contains_key(&input.ingress) || to_many || matches!(sender, 0 | 127 | 224..) {
        state.hit(Point::Unanswered);
        return refuse(state, Reason::IcmpUnanswered, service);
    }
    if !input.was_sent {
        state.hit(Point::AnswerLimited);
        return refuse(state, Reason::IcmpLimited, service);
    }
    state.hit(Point::Answered);
    state.because(reason, service);
    let action = if input.hook == Hook::Xdp { Action::Transmit } else { Action::Redirect };
    Decision { action, message: true, ..Decision::PASS }
}

/// Sends the packet on by an entry.
pub fn send(state: &mut State, input: &Input, segment: &Segment, table: Table) -> Decision {
    forward::send(state, input, segment, table)
}
