//! Packets without a flow: a frontend's, a dnat backend's, or somebody else's.

use edge_common::{
    conntrack::opens,
    flow::UDP,
    maps::ServiceKeyV4,
    verdict::{Reason, Verdict},
};

use crate::{conntrack::Past, fib, maps, packet::Packet, parse::Parsed, pipeline::Side, stats::because};

/// The packet starts a flow of the service noted in [`Past`].
pub const NEW_FLOW: Verdict = Verdict::UNDECIDED;

/// [`NEW_FLOW`] for a packet that starts a flow of a frontend; else passes the packet untouched, or drops what must not leave as it is.
#[inline(never)]
pub fn untracked<P: Packet>(packet: &mut P, parsed: &Parsed, side: Side, past: &mut Past) -> Verdict {
    let key = &parsed.key;
    let frontend = ServiceKeyV4 { address: key.dst, port: key.dst_port, protocol: key.protocol, _pad: 0 };
    if let Some(service) = maps::frontend(&frontend) {
        return if key.protocol == UDP || opens(parsed.flags) {
            past.service = service;
            NEW_FLOW
        } else {
            because(Reason::NoFlow, service)
        };
    }
    let source = ServiceKeyV4 { address: key.src, port: key.src_port, protocol: key.protocol, _pad: 0 };
    match maps::dnat_backend(&source) {
        Some(backend) if fib::leads_away(packet, parsed) => {
            because(Reason::ReplyWithoutFlow, maps::backend(backend).map_or(0, |backend| backend.service))
        }
        Some(_) => Verdict::PASS,
        None if side == Side::ToUs => because(Reason::NoFrontend, 0),
        None => Verdict::PASS,
    }
}
