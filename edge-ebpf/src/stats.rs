//! Counters: per reason, per service, per backend.

use edge_common::{
    conntrack::Direction,
    maps::FlowV4,
    verdict::{REASONS, Reason, Verdict},
};

use crate::maps;

/// Counts `reason` for a service (0: none) and gives the verdict that goes with it.
#[inline(always)]
pub fn because(reason: Reason, service: u32) -> Verdict {
    if let Some(count) = maps::reason_counter(service * REASONS + reason as u32) {
        *count += 1;
    }
    if reason.is_drop() { Verdict::DROP } else { Verdict::PASS }
}

/// Counts a packet of `bytes` (from the IP header on) of a flow.
#[inline(always)]
pub fn count_packet(flow: &mut FlowV4, bytes: u64) {
    flow.packets += 1;
    flow.bytes += bytes;
    let forward = flow.direction == Direction::Forward as u8;
    for stats in [maps::service_stats(flow.service), maps::backend_stats(flow.backend)].into_iter().flatten() {
        if forward {
            stats.packets_in += 1;
            stats.bytes_in += bytes;
        } else {
            stats.packets_out += 1;
            stats.bytes_out += bytes;
        }
    }
}

/// Counts a flow that entered half-open.
#[inline(always)]
pub fn count_half_opened(service: u32, backend: u32) {
    for stats in [maps::service_stats(service), maps::backend_stats(backend)].into_iter().flatten() {
        stats.half_opened += 1;
    }
}

/// Counts a flow that was promoted.
#[inline(always)]
pub fn count_opened(service: u32, backend: u32) {
    for stats in [maps::service_stats(service), maps::backend_stats(backend)].into_iter().flatten() {
        stats.opened += 1;
    }
}

/// Counts an established flow that ended.
#[inline(always)]
pub fn count_closed(service: u32, backend: u32) {
    for stats in [maps::service_stats(service), maps::backend_stats(backend)].into_iter().flatten() {
        stats.closed += 1;
    }
}
