//! ICMP errors: those about packets of flows are translated and sent on, and messages of our own are made. Everything else
//! of ICMP, ping above all, is the kernel's.

pub mod answer;
pub mod assume;
pub mod quote;
pub mod relay;

use edge_common::verdict::{Reason, Verdict};

use crate::{
    maps::{self, Table},
    packet::Packet,
    parse::Ip,
    pipeline::prefilter,
    stats::because,
};
use quote::Quote;

/// An unfragmented ICMP packet, to whomever, read into `quote`: an error from a router between a dnat backend and its client has
/// neither of our addresses outside.
#[inline(never)]
pub fn error<P: Packet>(packet: &mut P, ip: &Ip<u32>, quote: &mut Quote) -> Verdict {
    if !quote::read(packet, ip, quote) {
        return Verdict::PASS;
    }
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
