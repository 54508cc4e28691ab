//! VLAN tags (802.1Q and 802.1ad, two at most). A tagged frame of a VLAN that this host is in loses its tags before the
//! pipeline sees it, which so knows of none, and is given them back where it goes to the stack or returns to its sender.
//! A packet whose next hop is in a VLAN gets that one's tags once everything else has been done to it.

use edge_common::{
    maps::{Port, is_priority_only, is_tag, without_priority},
    verdict::{Action, Verdict},
};
use network_types::eth::EthHdr;

use crate::{
    maps::{self, Received},
    packet::Packet,
};

/// Bytes of two tags.
pub const LEN: usize = 8;

/// [`take`]: the frame has no tag, or belongs to a VLAN that this host is not in, and is as it came.
pub const NONE: u32 = 0;
/// [`take`]: the frame has no tags any more.
pub const TAKEN: u32 = 1;
/// [`take`]: the kernel would not, and the frame may be half done.
const BROKEN: u32 = 2;

/// Offset of the first tag that the frame shows.
const SHOWN: usize = EthHdr::LEN - 2;

/// True where this Ethernet type, as loaded from the packet, says that a tag follows.
#[inline(always)]
pub fn follows(ether_type: u16) -> bool {
    is_tag(u16::from_be(ether_type))
}

/// Takes the frame's tags off and notes them.
#[inline(never)]
pub fn take<P: Packet>(packet: &mut P) -> u32 {
    let Some([first, second]) = shown(packet) else {
        return NONE;
    };
    let hidden = packet.hidden_tag();
    let tags = if hidden != 0 { [hidden, first] } else { [first, second] };
    let ifindex = packet.ingress();
    let device = if is_priority_only(tags[0]) && tags[1] == 0 { Some(ifindex) } else { device(ifindex, tags) };
    let (Some(device), Some(received)) = (device, maps::received(P::HOOK)) else {
        return NONE;
    };
    if tags[0] == 0 {
        return NONE;
    }
    if !packet.pop_tags(tags[1] != 0) {
        return BROKEN;
    }
    *received = Received { tags, ifindex: device };
    TAKEN
}

/// The two tags that stand in the frame, 0 where there is none.
#[inline(always)]
fn shown<P: Packet>(packet: &mut P) -> Option<[u32; 2]> {
    let [kind, control, next_kind, next_control] = *packet.header_anew::<[u16; 4]>(SHOWN)?;
    if !follows(kind) {
        return Some([0, 0]);
    }
    let tag = |kind: u16, control: u16| u32::from(u16::from_be(kind)) << 16 | u32::from(u16::from_be(control));
    Some([tag(kind, control), if follows(next_kind) { tag(next_kind, next_control) } else { 0 }])
}

#[inline(always)]
fn device(ifindex: u32, tags: [u32; 2]) -> Option<u32> {
    let port = Port { ifindex, tags: tags.map(without_priority) };
    maps::other_side(&port).map(|device| device.ifindex)
}

/// The interface that the packet is received by in the eyes of the stack: the VLAN device of its tags, the bond of its port.
/// `port` is room for the question.
#[inline(always)]
pub fn ingress<P: Packet>(packet: &P, port: &mut Port) -> u32 {
    match maps::received(P::HOOK) {
        Some(received) if received.tags[0] != 0 => return received.ifindex,
        _ => {}
    }
    let ifindex = packet.ingress();
    *port = Port::untagged(ifindex);
    maps::other_side(port).map_or(ifindex, |bond| bond.ifindex)
}

/// What is owed to a packet that came with tags, at the end of a program that such packets pass through.
#[inline(always)]
pub fn settle<P: Packet>(packet: &mut P, verdict: Verdict) -> Verdict {
    match maps::received(P::HOOK) {
        Some(received) if received.tags[0] != 0 => restore(packet, received, verdict),
        _ => verdict,
    }
}

#[inline(never)]
fn restore<P: Packet>(packet: &mut P, received: &mut Received, verdict: Verdict) -> Verdict {
    let tags = received.tags;
    received.tags = [0; 2];
    match verdict.action() {
        Action::Pass | Action::Return if !packet.push_tags(tags) => Verdict::DROP,
        _ => verdict,
    }
}

/// Puts the tags of a next hop on a packet that is to leave; the interface it leaves by, 0 where it cannot.
#[inline(never)]
pub fn leave<P: Packet>(packet: &mut P, next_hop: u32) -> u32 {
    match maps::next_hop(next_hop) {
        Some(hop) if packet.push_tags(hop.tags) => hop.ifindex,
        _ => 0,
    }
}
