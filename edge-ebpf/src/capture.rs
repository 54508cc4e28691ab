//! Copies of forwarded packets for `edge-ctl capture`, since tools on the host do not see what XDP forwards. Off, it costs
//! a branch on the control element, which every packet reads anyway.

use edge_common::{
    conntrack::ticks,
    maps::{Control, Flow, capture::CaptureHeader},
};

use crate::{family::Family, maps, packet::Packet};

/// Copies the packet of a flow, as it is now, where the capture in force asks for it. An order that nobody renews ends by
/// itself.
#[inline(never)]
pub fn copy<A: Family, P: Packet>(packet: &mut P, flow: &Flow<A>, side: u8) {
    let Some(control) = maps::control() else {
        return;
    };
    if !wanted(control, flow) {
        return;
    }
    let length = packet.frame_len() as u32;
    let limit = u32::from(control.capture_length);
    let header = CaptureHeader {
        time: maps::events::precise_now(),
        length,
        captured: if length < limit { length } else { limit },
        ifindex: packet.ingress(),
        service: flow.service,
        backend: flow.backend,
        side,
        direction: flow.direction,
        _pad: [0; 2],
    };
    packet.capture(&header);
}

#[inline(always)]
fn wanted<A: Family>(control: &Control, flow: &Flow<A>) -> bool {
    // The clock wraps after 52 days: the order is in force while its end lies less than half of that ahead.
    (control.capture_until.wrapping_sub(ticks(maps::now())) as i32) > 0
        && flow.service == u32::from(control.capture_service)
        && (control.capture_backend == 0 || control.capture_backend == flow.backend)
}
