//! New flows: backend, SNAT port, and the two half-open entries.

use edge_common::{
    conntrack::{self, Direction, State},
    flow::FlowKeyV4,
    hash::spread,
    maps::{BackendEntry, FlowV4, SNAT_ADDRESSES, ServiceEntry, mode},
    verdict::{Reason, Verdict},
};

use crate::{
    forward,
    maps::{self, EEXIST, Table},
    packet::Packet,
    parse::Parsed,
    select,
    stats::{because, count_half_opened},
};

/// SNAT candidates tried for one flow. With a share `p` of the ports taken at random all fail with probability
/// `p^16`: 50 % full 0.0015 %, 75 % full 1 %, 90 % full 19 %.
const PROBES: u32 = 16;

/// The past flow of the same client tuple, whose SNAT port the new flow should have.
pub struct Reuse {
    /// Its backend; 0: there was none.
    pub backend: u32,
    /// Its SNAT address, network order.
    pub address: u32,
    /// Its SNAT port, network order.
    pub port: u16,
    /// There is such a flow.
    pub closing: bool,
}

impl Reuse {
    /// A tuple seen for the first time.
    pub const NONE: Self = Self { backend: 0, address: 0, port: 0, closing: false };
}

/// Starts a flow for the client's packet and sends it on its way.
#[inline(never)]
pub fn flow<P: Packet>(packet: &mut P, parsed: &Parsed, service_number: u32, reuse: &Reuse) -> Verdict {
    if parsed.ip.ttl <= 1 {
        return because(Reason::TtlExpired, service_number);
    }
    let Some(service) = maps::service(service_number) else {
        return because(Reason::NotReady, service_number);
    };
    let Some(backend_number) = select::backend(service.selection, &parsed.key) else {
        return because(Reason::NoBackend, service_number);
    };
    let backend_number = backend_number.get();
    let Some(backend) = maps::backend(backend_number) else {
        return because(Reason::NotReady, service_number);
    };
    let failed = open(&parsed.key, &Choice { service: service_number, backend: backend_number }, service, backend, reuse);
    if failed != OPENED {
        return match failed {
            NO_SNAT_ADDRESS => because(Reason::NoSnatAddress, service_number),
            TAKEN => because(Reason::TwinTaken, service_number),
            EXHAUSTED => because(Reason::SnatExhausted, service_number),
            _ => because(Reason::HalfOpenFull, service_number),
        };
    }
    count_half_opened(service_number, backend_number);
    match maps::flow(Table::HalfOpen, &parsed.key) {
        Some(flow) => forward::any(packet, parsed, flow),
        None => because(Reason::HalfOpenFull, service_number),
    }
}

const OPENED: u32 = 0;
const NO_SNAT_ADDRESS: u32 = 1;
const TAKEN: u32 = 2;
const EXHAUSTED: u32 = 3;
const FULL: u32 = 4;

/// The numbers of what was chosen.
struct Choice {
    service: u32,
    backend: u32,
}

/// Makes both entries, the reply's first.
#[inline(never)]
fn open(
    key: &FlowKeyV4,
    choice: &Choice,
    service: &ServiceEntry,
    backend: &BackendEntry,
    reuse: &Reuse,
) -> u32 {
    let now = maps::now();
    let mut forward = FlowV4 {
        key: *key,
        new_src: key.src,
        new_dst: backend.address,
        new_src_port: key.src_port,
        new_dst_port: backend.port,
        service: choice.service,
        backend: choice.backend,
        sequence: 1,
        state: State::HalfOpen as u8,
        direction: Direction::Forward as u8,
        created: now,
        last_seen: now,
        ..FlowV4::default()
    };
    let claimed = if service.mode == mode::DNAT {
        claim(&mut forward, service, true)
    } else {
        claim_snat(&mut forward, service, backend, reuse)
    };
    if claimed != OPENED {
        return claimed;
    }
    match maps::add_flow(Table::HalfOpen, &forward) {
        Ok(()) => OPENED,
        Err(errno) => {
            maps::remove_flow(Table::HalfOpen, &forward.twin());
            // Another CPU opened this flow just now: its entry serves this packet too.
            if errno == EEXIST { OPENED } else { FULL }
        }
    }
}

/// Finds a SNAT address and port and claims the reply's key with them.
#[inline(always)]
fn claim_snat(forward: &mut FlowV4, service: &ServiceEntry, backend: &BackendEntry, reuse: &Reuse) -> u32 {
    if reuse.closing && reuse.backend == forward.backend && reuse.address != 0 {
        forward.new_src = reuse.address;
        forward.new_src_port = reuse.port;
        if claim(forward, service, true) == OPENED {
            return OPENED;
        }
    }
    let addresses = service.snat_count.min(SNAT_ADDRESSES as u32);
    if addresses == 0 && backend.snat_address == 0 {
        return NO_SNAT_ADDRESS;
    }
    if service.snat_port_max < service.snat_port_min {
        return EXHAUSTED;
    }
    let span = u32::from(service.snat_port_max) - u32::from(service.snat_port_min) + 1;
    for _ in 0..PROBES {
        let Some(candidate) = maps::next_candidate(forward.backend) else {
            return EXHAUSTED;
        };
        let (address, index) = if addresses == 0 {
            (backend.snat_address, candidate)
        } else {
            let which = candidate % addresses;
            (service.snat_addresses[(which as usize) & (SNAT_ADDRESSES - 1)], candidate / addresses)
        };
        let port = service.snat_port_min.wrapping_add(spread(index, span) as u16);
        if !maps::snat_port_allowed(port) {
            continue;
        }
        forward.new_src = address;
        forward.new_src_port = port.to_be();
        match claim(forward, service, false) {
            OPENED => return OPENED,
            FULL => return FULL,
            _ => {}
        }
    }
    EXHAUSTED
}

/// Puts the reply's entry into the half-open table, then makes sure that no other table knows its key, and takes it
/// out again where one does. `own`: a closing entry of the same client tuple is no conflict.
#[inline(never)]
fn claim(forward: &mut FlowV4, service: &ServiceEntry, own: bool) -> u32 {
    forward.set_deltas();
    let reply = forward.make_twin();
    if let Err(errno) = maps::add_flow(Table::HalfOpen, &reply) {
        if errno != EEXIST {
            return FULL;
        }
        // A half-open entry that timed out is no conflict either, where the tuple leaves no choice of port.
        let stale = maps::flow(Table::HalfOpen, &reply.key)
            .is_some_and(|flow| conntrack::expired(flow.last_seen, service.half_open_timeout, forward.created));
        if !own || !stale {
            return TAKEN;
        }
        maps::remove_flow(Table::HalfOpen, &reply.key);
        if maps::add_flow(Table::HalfOpen, &reply).is_err() {
            return TAKEN;
        }
    }
    if let Some(flow) = maps::flow(Table::Established, &reply.key) {
        let expired = conntrack::expired(flow.last_seen, service.established_timeout, forward.created);
        if !(own && expired) {
            maps::remove_flow(Table::HalfOpen, &reply.key);
            return TAKEN;
        }
        maps::remove_flow(Table::Established, &reply.key);
    }
    if let Some(flow) = maps::flow(Table::Closing, &reply.key) {
        let rest = conntrack::rest_seconds(reply.key.protocol, flow.flags, service.closing_timeout);
        let client = flow.twin();
        let rested = conntrack::expired(flow.last_seen, rest, forward.created);
        if !rested && !(own && client == forward.key) {
            maps::remove_flow(Table::HalfOpen, &reply.key);
            return TAKEN;
        }
        maps::remove_flow(Table::Closing, &reply.key);
        maps::remove_flow(Table::Closing, &client);
    }
    OPENED
}
