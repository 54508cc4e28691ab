//! Counters: per reason, per service, per backend.

use edge_common::{
    conntrack::Direction,
    maps::{Flow, ServiceStats, Slot, events::is_sampled, notice, slot_flag},
    verdict::{REASONS, Reason, Verdict},
};

use crate::{events, family::Family, maps, parse::Parsed};

/// Counts `reason` for a service (0: none) and gives the verdict that goes with it.
#[inline(always)]
pub fn because(reason: Reason, service: u32) -> Verdict {
    let mut report = false;
    if let Some(count) = maps::reason_counter(service * REASONS + reason as u32) {
        *count += 1;
        report = is_sampled(*count);
    }
    if reason == Reason::NotReady {
        maps::raise(notice::NOT_READY);
    }
    if reason.is_drop() { Verdict::dropped(reason, service, report) } else { Verdict::PASS }
}

/// Counts a packet of a flow, and notes the backend's first payload.
#[inline(always)]
pub fn count_packet<A: Family>(flow: &mut Flow<A>, parsed: &Parsed<A>) {
    let bytes = u64::from(parsed.total_len);
    flow.packets += 1;
    flow.bytes += bytes;
    let (service, backend) = (flow.service, flow.backend);
    if flow.direction == Direction::Forward as u8 {
        update(service, backend, |stats| {
            stats.packets_in += 1;
            stats.bytes_in += bytes;
        });
    } else {
        if flow.first_byte_after == 0 && parsed.has_payload() {
            events::first_byte(flow);
        }
        update(service, backend, |stats| {
            stats.packets_out += 1;
            stats.bytes_out += bytes;
        });
    }
}

/// Counts a packet that a slot served.
#[inline(always)]
pub fn count_cached<A: Family>(slot: &mut Slot<A>, parsed: &Parsed<A>) {
    slot.packets += 1;
    slot.bytes += parsed.total_len;
    let bytes = u64::from(parsed.total_len);
    let (service, backend) = (u32::from(slot.service & slot_flag::SERVICE), u32::from(slot.backend));
    if slot.service & slot_flag::REPLY == 0 {
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

/// Counts a flow whose client half entered the established table.
#[inline(always)]
pub fn count_opened(service: u32, backend: u32) {
    maps::backend_live(backend, 1);
    update(service, backend, |stats| stats.opened += 1);
}

/// Counts a flow whose client half left the established table.
#[inline(always)]
pub fn count_closed(service: u32, backend: u32) {
    maps::backend_live(backend, u32::MAX);
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
