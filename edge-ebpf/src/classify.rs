//! Packets without a flow: a frontend's, a dnat backend's, or somebody else's.

use edge_common::{
    address::unmapped,
    conntrack::opens,
    flow::{FlowKey, UDP},
    maps::{ANY_PORT, ServiceKey},
    verdict::{Reason, Verdict},
};

use crate::{
    conntrack::Past, family::Family, fib, maps, packet::Packet, parse::Parsed, pipeline::Side, stats::because,
};

/// The packet starts a flow of the service noted in [`Past`].
pub const NEW_FLOW: Verdict = Verdict::UNDECIDED;

/// [`NEW_FLOW`] for a packet that starts a flow of a frontend, [`Verdict::MID_FLOW`] for one in the middle of a flow that is not
/// known, with its service or its backend noted; else passes the packet untouched, or drops what must not leave as it is.
#[inline(never)]
pub fn untracked<A: Family, P: Packet>(packet: &mut P, parsed: &Parsed<A>, side: Side, past: &mut Past<A>) -> Verdict {
    let key = &parsed.key;
    if let Some(service) = lookup(key.dst, key.dst_port, key.protocol, maps::frontend) {
        return if parsed.lacks_checksum || is_mapped(key.src) {
            because(Reason::Malformed, service)
        } else if key.protocol == UDP || opens(parsed.flags) {
            past.service = service;
            NEW_FLOW
        } else {
            past.service = service;
            Verdict::MID_FLOW
        };
    }
    match lookup(key.src, key.src_port, key.protocol, maps::dnat_backend) {
        Some(backend) if fib::leads_away(packet, parsed) => {
            (past.service, past.backend) = (0, backend);
            Verdict::MID_FLOW
        }
        Some(_) => Verdict::PASS,
        None if side == Side::ToUs => because(Reason::NoFrontend, 0),
        None => Verdict::PASS,
    }
}

/// True for a v4-mapped address in an IPv6 packet. As a source it would have an IPv4 host's source ranges and limits, and it can
/// be answered by nobody: Linux takes no such packet either.
#[inline(always)]
fn is_mapped<A: Family>(address: A) -> bool {
    A::V6 && unmapped(&address.wide()).is_some()
}

/// The number of an address and port in a map that holds both families, else that of all ports of the address. A v4-mapped
/// address in an IPv6 packet stands for nothing there: it would meet an IPv4 entry.
#[inline(always)]
pub fn lookup<A: Family>(
    address: A,
    port: u16,
    protocol: u8,
    number: impl Fn(&ServiceKey) -> Option<u32>,
) -> Option<u32> {
    if is_mapped(address) {
        return None;
    }
    // One key for both, since the stack is short.
    let mut key = ServiceKey { address: address.wide(), port, protocol, _pad: 0 };
    if let Some(exact) = number(&key) {
        return Some(exact);
    }
    key.port = ANY_PORT;
    number(&key)
}

/// True where a client's packet of this tuple is service `number`'s. What comes from a backend of all ports names its VIP's port
/// by its own, and that port may be another frontend's.
#[inline(never)]
pub fn is_of<A: Family>(client: &FlowKey<A>, number: u32) -> bool {
    lookup(client.dst, client.dst_port, client.protocol, maps::frontend) == Some(number)
}
