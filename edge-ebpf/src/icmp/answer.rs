//! ICMP messages of our own, made from the packet as it came: the kernel would tell the edge itself, which rewrote it.
//! They go back the way the packet came, so that no route to its sender is needed.

use edge_common::{
    checksum::{add, fold},
    flow::TCP,
    icmp,
    maps::{OwnAddresses, Port},
    verdict::{Question, Reason, Verdict},
};
use network_types::eth::EthHdr;

use crate::{
    family::Family,
    maps,
    packet::Packet,
    parse::{IP, Parsed},
    stats::because,
    vlan,
};

const TCP_CHECK: usize = 16;
const UDP_CHECK: usize = 6;

/// Turns the packet into the message about it, unless nobody may be told (RFC 1812, 4.3.2.7; RFC 4443, 2.4 (e)); counts it
/// either way. Errors do not come here, and of later fragments only those of IPv6.
#[inline(never)]
pub fn send<A: Family, P: Packet>(packet: &mut P, parsed: &Parsed<A>, verdict: Verdict) -> Verdict {
    let Some((question, service, mtu)) = verdict.question() else {
        return Verdict::DROP;
    };
    let Some(own) = maps::own_addresses(vlan::ingress(packet, &mut Port::default())) else {
        return because(Reason::IcmpUnanswered, service);
    };
    if A::own(own) == A::default() || !parsed.key.src.is_host() {
        return because(Reason::IcmpUnanswered, service);
    }
    let Some(about) = about(packet, parsed) else {
        return because(Reason::IcmpUnanswered, service);
    };
    if !maps::may_send_icmp() {
        return because(Reason::IcmpLimited, service);
    }
    if !packet.quote(A::HEADER + icmp::HEADER, about.quote as usize)
        || !write(packet, parsed, own, &about, A::head(question, mtu))
    {
        return because(Reason::IcmpUnanswered, service);
    }
    let reason = match question {
        Question::TimeExceeded => Reason::TtlExpired,
        Question::TooBig => Reason::TooBig,
    };
    because(reason, service);
    Verdict::RETURN
}

/// What of the packet is needed once it has moved.
struct About {
    macs: [u16; 6],
    /// Bytes of it that are quoted, from the IP header on.
    quote: u32,
    /// Where its checksum is not finished yet: how many bytes of the quote it does not cover, and the sum of the others
    /// once it is. Else all of the quote, and 0.
    summed: u32,
    rest: u16,
}

/// `None` for the link's broadcast or multicast, about which nobody may be told.
#[inline(never)]
fn about<A: Family, P: Packet>(packet: &mut P, parsed: &Parsed<A>) -> Option<About> {
    let macs = *packet.header_anew::<[u16; 6]>(0)?;
    if macs[0] as u8 & 1 != 0 {
        return None;
    }
    let quote = icmp::quote_len(parsed.total_len as usize, A::QUOTE);
    let mut about = About { macs, quote: quote as u32, summed: quote as u32, rest: 0 };
    let check = parsed.l4() + if parsed.key.protocol == TCP { TCP_CHECK } else { UDP_CHECK };
    if packet.has_unfinished_checksum(check) {
        // Once finished, what the checksum covers adds up to the complement of what the field holds now.
        let field = packet.header_anew::<[u8; 2]>(check)?;
        about.rest = !u16::from_ne_bytes(*field);
        about.summed = u32::from(parsed.header_len);
    }
    Some(about)
}

/// The headers in front of the quote.
#[inline(always)]
fn write<A: Family, P: Packet>(
    packet: &mut P,
    parsed: &Parsed<A>,
    own: &OwnAddresses,
    about: &About,
    head: [u16; icmp::HEADER / 2],
) -> bool {
    let Some(eth) = packet.header_anew::<[u16; EthHdr::LEN / 2]>(0) else {
        return false;
    };
    let [a, b, c, d, e, f] = about.macs;
    *eth = [d, e, f, a, b, c, A::ETHER_TYPE];
    let len = (about.quote as u16).wrapping_add(icmp::HEADER as u16);
    let Some((pseudo, header)) = A::begin(packet, A::own(own), parsed.key.src, len) else {
        return false;
    };
    let Some(quoted) = sum_of::<A, P>(packet, IP + A::HEADER + icmp::HEADER, about.summed) else {
        return false;
    };
    let head_sum = add(head[0], add(head[2], head[3]));
    let check = !add(add(head_sum, pseudo), add(quoted, about.rest));
    let Some(field) = packet.header_anew::<[u16; icmp::HEADER / 2]>(IP + A::HEADER) else {
        return false;
    };
    *field = [head[0], check, head[2], head[3]];
    packet.add_to_sum(add(header, add(head_sum, check)));
    true
}

/// The ones'-complement sum of `len` bytes, a multiple of 4 and at most a quote.
#[inline(never)]
fn sum_of<A: Family, P: Packet>(packet: &mut P, offset: usize, len: u32) -> Option<u16> {
    let mut sum = 0;
    for word in 0..A::QUOTE as u32 / 4 {
        if word * 4 >= len {
            break;
        }
        let pair = packet.header_anew::<[u16; 2]>(offset + word as usize * 4)?;
        sum += u32::from(pair[0]) + u32::from(pair[1]);
    }
    Some(fold(sum))
}
