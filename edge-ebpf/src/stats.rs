//! Counters: per reason, per service, per backend.

use edge_common::{
    conntrack::Direction,
    maps::{Flow, ServiceStats, notice},
    verdict::{REASONS, Reason, Verdict},
};

use crate::{family::Family, maps};

/// Counts `reason` for a service (0: none) and gives the verdict that goes with it.
#[inline(always)]
pub fn because(reason: Reason, service: u32) -> Verdict {
    if let Some(count) = maps::reason_counter(service * REASONS + reason as u32) {
        *count += 1;
    }
    if reason == Reason::NotReady {
        maps::raise(notice::NOT_READY);
    }
    if reason.is_drop() { Verdict::DROP } else { Verdict::PASS }
}

/// Counts a packet of `bytes` (from the IP header on) of a flow.
#[inline(always)]
pub fn count_packet<A: Family>(flow: &mut Flow<A>, bytes: u64) {
    flow.packets += 1;
    flow.bytes += bytes;
    let (service, backend) = (flow.service, flow.backend);
    if flow.direction == Direction::Forward as u8 {
        update(service, backend, |stats| {
            stats.packets_in += 1;
            stats.bytes_in += bytes;
        });
    } else {
        update(service, backend, |stats| {
            stats.packets_out += 1;
            stats.bytes_out += bytes;
        });
    }
}

/// Counts a flow that entered half-open.
#[inline(always)]
pub fn count_half_opened(service: u32, backend: u32) {
    update(service, backend, |stats| stats.half_opened += 1);
}

/// Counts a flow that was promoted.
#[inline(always)]
pub fn count_opened(service: u32, backend: u32) {
    update(service, backend, |stats| stats.opened += 1);
}

/// Counts an established flow that ended.
#[inline(always)]
pub fn count_closed(service: u32, backend: u32) {
    update(service, backend, |stats| stats.closed += 1);
}

#[inline(always)]
fn update(service: u32, backend: u32, change: impl Fn(&mut ServiceStats)) {
    if let Some(stats) = maps::service_stats(service) {
        change(stats);
    }
    if let Some(stats) = maps::backend_stats(backend) {
        change(stats);
    }
}
