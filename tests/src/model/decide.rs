//! The decision function: what must happen to a packet, given the tables. The stages are in files of their own.

use edge_common::verdict::Reason;

use super::{
    connections::{self, Tracked},
    coverage::Point,
    create, forward,
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
    /// Nanoseconds, coarse.
    pub now: u64,
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
}

/// What must happen to a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// The program's verdict.
    pub action: Action,
    /// How the packet must leave; `None`: byte for byte as it came, where it does not leave dropped.
    pub rewrite: Option<Rewrite>,
}

impl Decision {
    /// To the stack, untouched.
    pub const PASS: Self = Self { action: Action::Pass, rewrite: None };
    /// Gone. What its bytes are does not matter.
    pub const DROP: Self = Self { action: Action::Drop, rewrite: None };
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
    if ip.fragment {
        state.hit(Point::Fragment);
        state.because(Reason::Fragment, 0);
        return Ok(Decision::PASS);
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
    state.because(reason, service);
    Decision::DROP
}

/// Sends the packet on by an entry.
pub fn send(state: &mut State, input: &Input, segment: &Segment, table: Table) -> Decision {
    forward::send(state, input, segment, table)
}
