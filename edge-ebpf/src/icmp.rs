//! ICMP errors: those about packets of flows are translated and sent on, and messages of our own are made. Everything else
//! of ICMP, ping and neighbour discovery above all, is the kernel's.

pub mod answer;
pub mod assume;
pub mod message;
pub mod quote;
pub mod relay;

use edge_common::verdict::{Reason, Verdict};

use crate::{
    family::Family,
    maps::{self, Table},
    packet::Packet,
    pipeline::prefilter,
    stats::because,
};
use quote::Quote;

/// An ICMP error, to whomever: one from a router between a dnat backend and its client has neither of our addresses outside.
#[inline(never)]
pub fn error<A: Family, P: Packet>(packet: &mut P, quote: &Quote<A>) -> Verdict {
    let key = quote.key.reversed();
    if prefilter(key.src, key.dst).is_none() {
        return Verdict::PASS;
    }
    // The error travels the way of the flow that would answer the quoted packet.
    for table in [Table::Established, Table::HalfOpen, Table::Closing] {
        if let Some(flow) = maps::flow(table, &key) {
            return relay::along(packet, quote, flow);
        }
    }
    assume::relay(packet, quote)
}

/// Nothing of ours: given to the stack as it is.
#[inline(always)]
fn unmatched() -> Verdict {
    because(Reason::IcmpUnmatched, 0)
}
