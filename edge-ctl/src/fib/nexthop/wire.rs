//! Messages of the kernel about next-hop objects (`linux/nexthop.h`), which rtnetlink does not know.

use std::net::IpAddr;

use super::{
    super::plan::{NextHop, PROTOCOL_BGP},
    Kind, Object,
};

/// `RTM_NEWNEXTHOP`.
pub(in super::super) const NEW: u16 = 104;
/// `RTM_DELNEXTHOP`.
pub(in super::super) const DELETE: u16 = 105;
const GET: u16 = 106;
/// `RTNLGRP_NEXTHOP`.
pub(in super::super) const GROUP: u32 = 32;

/// Octets of `struct nlmsghdr` and `struct nhmsg`.
const HEADER: usize = 16;
const NHMSG: usize = 8;

const AF_UNSPEC: u8 = 0;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

const NHA_ID: u16 = 1;
const NHA_GROUP: u16 = 2;
const NHA_GROUP_TYPE: u16 = 3;
const NHA_BLACKHOLE: u16 = 4;
const NHA_OIF: u16 = 5;
const NHA_GATEWAY: u16 = 6;
const NHA_ENCAP: u16 = 8;
const NHA_FDB: u16 = 11;
const NHA_RES_GROUP: u16 = 12;
const NHA_RES_GROUP_BUCKETS: u16 = 1;
const GROUP_TYPE_RESILIENT: u16 = 1;
/// `NLA_F_NESTED`, and the bits of a type that are flags.
const NESTED: u16 = 0x8000;
const TYPE: u16 = 0x3fff;
/// Octets of `struct nexthop_grp`.
const MEMBER: usize = 8;
/// Of a resilient group. How evenly it spreads is a matter of these; the kernel's own choice for as many members as nodes.
const BUCKETS: u16 = 128;

/// A request that makes an object.
pub(in super::super) fn make(id: u32, kind: &Kind, flags: u16, sequence: u32) -> Vec<u8> {
    let family = match kind {
        Kind::Hop(NextHop { gateway: Some(IpAddr::V4(_)), .. }) => AF_INET,
        Kind::Hop(_) => AF_INET6,
        Kind::Group { .. } | Kind::Other => AF_UNSPEC,
    };
    let mut message = begin(NEW, family, PROTOCOL_BGP, flags, sequence);
    attribute(&mut message, NHA_ID, &id.to_ne_bytes());
    match kind {
        Kind::Hop(NextHop { gateway, ifindex }) => {
            attribute(&mut message, NHA_OIF, &ifindex.to_ne_bytes());
            match gateway {
                Some(IpAddr::V4(gateway)) => attribute(&mut message, NHA_GATEWAY, &gateway.octets()),
                Some(IpAddr::V6(gateway)) => attribute(&mut message, NHA_GATEWAY, &gateway.octets()),
                None => {}
            }
        }
        Kind::Group { members, resilient } => {
            // Number, weight less one, reserved.
            let all: Vec<u8> = members.iter().flat_map(|id| [id.to_ne_bytes(), [0; 4]].concat()).collect();
            attribute(&mut message, NHA_GROUP, &all);
            if *resilient {
                attribute(&mut message, NHA_GROUP_TYPE, &GROUP_TYPE_RESILIENT.to_ne_bytes());
                let mut nested = Vec::new();
                attribute(&mut nested, NHA_RES_GROUP_BUCKETS, &BUCKETS.to_ne_bytes());
                attribute(&mut message, NHA_RES_GROUP | NESTED, &nested);
            }
        }
        Kind::Other => {}
    }
    end(message)
}

/// A request that deletes an object.
pub(in super::super) fn delete(id: u32, flags: u16, sequence: u32) -> Vec<u8> {
    let mut message = begin(DELETE, AF_UNSPEC, 0, flags, sequence);
    attribute(&mut message, NHA_ID, &id.to_ne_bytes());
    end(message)
}

/// A request for all objects.
pub(in super::super) fn dump(flags: u16, sequence: u32) -> Vec<u8> {
    end(begin(GET, AF_UNSPEC, 0, flags, sequence))
}

fn begin(kind: u16, family: u8, protocol: u8, flags: u16, sequence: u32) -> Vec<u8> {
    let mut message = vec![0; 4];
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend(sequence.to_ne_bytes());
    message.extend([0; 4]);
    message.extend([family, 0, protocol, 0, 0, 0, 0, 0]);
    message
}

fn end(mut message: Vec<u8>) -> Vec<u8> {
    let length = u32::try_from(message.len()).unwrap_or(u32::MAX).to_ne_bytes();
    message.splice(..4, length);
    message
}

fn attribute(message: &mut Vec<u8>, kind: u16, value: &[u8]) {
    message.extend(u16::try_from(4 + value.len()).unwrap_or(u16::MAX).to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(value);
    message.resize(message.len().next_multiple_of(4), 0);
}

/// The object that a message of type [`NEW`] is about, from its header on.
pub(in super::super) fn object(message: &[u8]) -> Option<Object> {
    let protocol = *message.get(HEADER + 2)?;
    let mut rest = message.get(HEADER + NHMSG..)?;
    let (mut id, mut gateway, mut oif, mut members, mut resilient, mut other) = (None, None, None, None, false, false);
    while let Some(header) = rest.first_chunk::<4>() {
        let [length, kind] = [[header[0], header[1]], [header[2], header[3]]].map(u16::from_ne_bytes);
        let length = usize::from(length);
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        match kind & TYPE {
            NHA_ID => id = word(value),
            NHA_OIF => oif = word(value),
            NHA_GATEWAY => gateway = address(value),
            NHA_GROUP => members = Some(value.chunks_exact(MEMBER).filter_map(word).collect::<Vec<u32>>()),
            NHA_GROUP_TYPE => resilient = value == GROUP_TYPE_RESILIENT.to_ne_bytes(),
            NHA_BLACKHOLE | NHA_ENCAP | NHA_FDB => other = true,
            _ => {}
        }
    }
    let kind = match (members, oif) {
        _ if other => Kind::Other,
        (Some(mut members), _) => {
            members.sort_unstable();
            Kind::Group { members, resilient }
        }
        (None, Some(ifindex)) => Kind::Hop(NextHop { gateway, ifindex }),
        (None, None) => Kind::Other,
    };
    Some(Object::new(id?, protocol, kind))
}

fn word(value: &[u8]) -> Option<u32> {
    value.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))
}

fn address(value: &[u8]) -> Option<IpAddr> {
    match value.len() {
        4 => value.first_chunk::<4>().map(|octets| IpAddr::from(*octets)),
        16 => value.first_chunk::<16>().map(|octets| IpAddr::from(*octets)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_is_what_would_be_read_and_a_cut_message_is_none() {
        let hop = |gateway: &str| Kind::Hop(NextHop { gateway: Some(gateway.parse().unwrap()), ifindex: 7 });
        let group = |resilient| Kind::Group { members: vec![1, 2, 3], resilient };
        for kind in [hop("172.16.1.80"), hop("fe80::2"), group(false), group(true)] {
            let message = make(super::super::FIRST, &kind, 0, 1);
            assert_eq!(message.len() % 4, 0);
            assert_eq!(object(&message), Some(Object { id: super::super::FIRST, ours: true, kind }));
            for length in 0..HEADER + NHMSG + 4 {
                assert_eq!(object(&message[..length]), None, "{length}");
            }
        }
    }
}
