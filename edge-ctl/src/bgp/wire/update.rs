//! UPDATE messages: decoding by RFC 7606, encoding of what we originate.

use std::net::IpAddr;

use bytes::Bytes;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use rustbgpd_wire as codec;

use super::{Attributes, Context, EncodeError, Family, MAX_MESSAGE, Notification};

/// A prefix and which of several paths to it is meant (RFC 7911 3); 0 where the session has no ADD-PATH.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Nlri {
    /// The prefix.
    pub prefix: IpNet,
    /// Path identifier.
    pub path: u32,
}

impl From<IpNet> for Nlri {
    fn from(prefix: IpNet) -> Self {
        Self { prefix, path: 0 }
    }
}

impl std::str::FromStr for Nlri {
    type Err = ipnet::AddrParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse::<IpNet>().map(Self::from)
    }
}

/// Prefixes announced towards one next hop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Announcement {
    /// The next hop, unchecked.
    pub next_hop: IpAddr,
    /// The prefixes.
    pub prefixes: Vec<Nlri>,
}

/// A malformed part of an UPDATE that did not cost the session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Attribute type code; 0: none in particular.
    pub attribute: u8,
    /// True: its routes count as withdrawn; false: the attribute was discarded (RFC 7606 2).
    pub withdraws: bool,
    /// What was wrong.
    pub detail: String,
}

/// A decoded UPDATE.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Update {
    /// Withdrawn prefixes, those under treat-as-withdraw included.
    pub withdrawn: Vec<Nlri>,
    /// Announced prefixes.
    pub announced: Vec<Announcement>,
    /// Attributes of everything announced.
    pub attributes: Attributes,
    /// The family whose initial table is complete (RFC 4724 2).
    pub end_of_rib: Option<Family>,
    /// What was malformed.
    pub problems: Vec<Problem>,
}

impl Update {
    pub(super) fn from_codec(message: &codec::UpdateMessage, context: Context) -> Result<Self, Notification> {
        let parsed = message
            .parse_revised(
                context.four_octet_as,
                context.internal,
                context.add_path.contains(Family::Ipv4),
                context.add_path.codec(),
            )
            .map_err(|error| Notification::from_decode(&error))?;
        let mut problems: Vec<Problem> = parsed.malformed.iter().map(problem).collect();
        if let Some(reset) =
            parsed.malformed.iter().find(|malformed| malformed.disposition == codec::ErrorDisposition::SessionReset)
        {
            return Err(Notification::from_decode(&reset.error));
        }
        let parsed = parsed.update;
        let mut update = Self {
            attributes: Attributes::from_codec(&parsed.attributes, context.internal),
            end_of_rib: end_of_rib(message, &parsed.attributes),
            ..Self::default()
        };
        update.withdrawn.extend(parsed.withdrawn.iter().map(body_nlri));
        let body: Vec<Nlri> = parsed.announced.iter().map(body_nlri).collect();
        let mut next_hop = None;
        for attribute in &parsed.attributes {
            match attribute {
                codec::PathAttribute::NextHop(address) => next_hop = Some(IpAddr::V4(*address)),
                codec::PathAttribute::MpUnreachNlri(unreach) if unicast(unreach.afi, unreach.safi) => {
                    update.withdrawn.extend(unreach.withdrawn.iter().map(prefix));
                }
                codec::PathAttribute::MpReachNlri(reach) if unicast(reach.afi, reach.safi) => {
                    update.announced.push(Announcement {
                        next_hop: next_hop_of(reach),
                        prefixes: reach.announced.iter().map(prefix).collect(),
                    });
                }
                _ => {}
            }
        }
        let absent = missing(&parsed.attributes, !body.is_empty(), !update.announced.is_empty());
        problems.extend(empty_segment(&parsed.attributes));
        // A malformed attribute was dropped by the codec; it is not missing as well.
        let reported: Vec<u8> = problems.iter().map(|problem| problem.attribute).collect();
        problems.extend(absent.into_iter().filter(|problem| !reported.contains(&problem.attribute)));
        // `missing` complained where the body has prefixes without a next hop; they are withdrawn below.
        let next_hop = next_hop.unwrap_or(IpAddr::from([0, 0, 0, 0]));
        if !body.is_empty() {
            update.announced.push(Announcement { next_hop, prefixes: body });
        }
        if problems.iter().any(|problem| problem.withdraws) {
            let announced = std::mem::take(&mut update.announced);
            update.withdrawn.extend(announced.into_iter().flat_map(|announcement| announcement.prefixes));
        }
        // The codec has dropped what was malformed: what is left may look like the end of a table and is none.
        if !problems.is_empty() {
            update.end_of_rib = None;
        }
        update.problems = problems;
        Ok(update)
    }
}

/// Of a global and a link-local next hop (RFC 2545 3) the global one, unless that is none.
fn next_hop_of(reach: &codec::MpReachNlri) -> IpAddr {
    let global = match reach.next_hop {
        IpAddr::V6(address) => !address.is_unspecified() && !address.is_unicast_link_local(),
        IpAddr::V4(_) => true,
    };
    match reach.link_local_next_hop {
        Some(address) if !global => IpAddr::from(address),
        _ => reach.next_hop,
    }
}

fn unicast(afi: codec::Afi, safi: codec::Safi) -> bool {
    Family::from_codec(afi, safi).is_some()
}

fn problem(malformed: &codec::MalformedAttribute) -> Problem {
    Problem {
        attribute: malformed.type_code,
        withdraws: malformed.disposition != codec::ErrorDisposition::AttributeDiscard,
        detail: malformed.error.to_string(),
    }
}

/// Well-known attributes that announced prefixes need and do not have, and well-known attributes nobody knows: both
/// are treat-as-withdraw (RFC 7606 3 (d) and 3 (c)). LOCAL_PREF from an internal peer defaults to 100 instead.
fn missing(attributes: &[codec::PathAttribute], body: bool, multiprotocol: bool) -> Vec<Problem> {
    let has = |code: u8| attributes.iter().any(|attribute| attribute.type_code() == code);
    let mut problems = Vec::new();
    let mut withdraw = |attribute: u8, detail: String| problems.push(Problem { attribute, withdraws: true, detail });
    if body || multiprotocol {
        for (code, name) in [(1, "ORIGIN"), (2, "AS_PATH")] {
            if !has(code) {
                withdraw(code, format!("{name} is missing"));
            }
        }
    }
    if body && !has(3) {
        withdraw(3, "NEXT_HOP is missing".to_owned());
    }
    for attribute in attributes {
        if let codec::PathAttribute::Unknown(raw) = attribute
            && raw.flags & 0x80 == 0
        {
            withdraw(raw.type_code, format!("well-known attribute {} is unknown", raw.type_code));
        }
    }
    problems
}

/// A segment of no AS numbers makes AS_PATH malformed (RFC 7606 7.2); the codec lets it pass.
fn empty_segment(attributes: &[codec::PathAttribute]) -> Option<Problem> {
    let is_empty = |segment: &codec::AsPathSegment| match segment {
        codec::AsPathSegment::AsSequence(numbers) | codec::AsPathSegment::AsSet(numbers) => numbers.is_empty(),
    };
    let empty = attributes.iter().any(|attribute| match attribute {
        codec::PathAttribute::AsPath(path) => path.segments.iter().any(is_empty),
        _ => false,
    });
    empty.then(|| Problem { attribute: 2, withdraws: true, detail: "AS_PATH has a segment without numbers".to_owned() })
}

/// An UPDATE with nothing in it ends IPv4's initial table; one with an empty MP_UNREACH_NLRI alone ends its family's.
fn end_of_rib(message: &codec::UpdateMessage, attributes: &[codec::PathAttribute]) -> Option<Family> {
    if !message.withdrawn_routes.is_empty() || !message.nlri.is_empty() {
        return None;
    }
    if message.path_attributes.is_empty() {
        return Some(Family::Ipv4);
    }
    match attributes {
        [codec::PathAttribute::MpUnreachNlri(unreach)] if unreach.withdrawn.is_empty() => {
            Family::from_codec(unreach.afi, unreach.safi)
        }
        _ => None,
    }
}

fn ipv4(prefix: codec::Ipv4Prefix) -> IpNet {
    IpNet::V4(Ipv4Net::new(prefix.addr, prefix.len).unwrap_or_default())
}

fn body_nlri(entry: &codec::Ipv4NlriEntry) -> Nlri {
    Nlri { prefix: ipv4(entry.prefix), path: entry.path_id }
}

fn prefix(entry: &codec::NlriEntry) -> Nlri {
    let prefix = match entry.prefix {
        codec::Prefix::V4(prefix) => ipv4(prefix),
        codec::Prefix::V6(prefix) => IpNet::V6(Ipv6Net::new(prefix.addr, prefix.len).unwrap_or_default()),
    };
    Nlri { prefix, path: entry.path_id }
}

fn entry(prefix: &IpNet) -> codec::NlriEntry {
    codec::NlriEntry {
        path_id: 0,
        prefix: match prefix {
            IpNet::V4(net) => codec::Prefix::V4(codec::Ipv4Prefix::new(net.network(), net.prefix_len())),
            IpNet::V6(net) => codec::Prefix::V6(codec::Ipv6Prefix::new(net.network(), net.prefix_len())),
        },
    }
}

fn ipv4_entries(prefixes: &[IpNet]) -> Vec<codec::Ipv4NlriEntry> {
    prefixes
        .iter()
        .filter_map(|prefix| match prefix {
            IpNet::V4(net) => Some(codec::Ipv4NlriEntry {
                path_id: 0,
                prefix: codec::Ipv4Prefix::new(net.network(), net.prefix_len()),
            }),
            IpNet::V6(_) => None,
        })
        .collect()
}

fn unreach(family: Family, prefixes: &[IpNet]) -> codec::PathAttribute {
    codec::PathAttribute::MpUnreachNlri(Box::new(codec::MpUnreachNlri {
        afi: family.afi(),
        safi: codec::Safi::Unicast,
        withdrawn: prefixes.iter().map(entry).collect(),
        flowspec_withdrawn: Vec::new(),
        evpn_withdrawn: Vec::new(),
        bgpls_withdrawn: Vec::new(),
        vpn_withdrawn: Vec::new(),
        labeled_withdrawn: Vec::new(),
        rtc_withdrawn: Vec::new(),
    }))
}

/// IPv4 prefixes with an IPv6 next hop go there too (RFC 8950 3).
fn reach(prefixes: &[IpNet], next_hop: IpAddr) -> codec::PathAttribute {
    codec::PathAttribute::MpReachNlri(Box::new(codec::MpReachNlri {
        afi: prefixes.first().map_or(codec::Afi::Ipv6, |prefix| Family::of(prefix).afi()),
        safi: codec::Safi::Unicast,
        next_hop,
        link_local_next_hop: None,
        announced: prefixes.iter().map(entry).collect(),
        flowspec_announced: Vec::new(),
        evpn_announced: Vec::new(),
        bgpls_announced: Vec::new(),
        vpn_announced: Vec::new(),
        labeled_announced: Vec::new(),
        rtc_announced: Vec::new(),
    }))
}

/// UPDATEs that announce `prefixes` (of one family) with one set of attributes, as many as the message size needs.
/// The attributes are those that the receiver is to see: our AS number is in the path already.
///
/// # Errors
/// Attributes that alone do not fit a message.
pub fn encode_announcements(
    prefixes: &[IpNet],
    attributes: &Attributes,
    next_hop: IpAddr,
    context: Context,
) -> Result<Vec<Bytes>, EncodeError> {
    let base = attributes.to_codec(context.internal);
    in_chunks(prefixes, |chunk| {
        let mut list = base.clone();
        let body = match next_hop {
            IpAddr::V4(address) => {
                list.push(codec::PathAttribute::NextHop(address));
                ipv4_entries(chunk)
            }
            IpAddr::V6(_) => {
                list.push(reach(chunk, next_hop));
                Vec::new()
            }
        };
        build(&body, &[], &list, context.four_octet_as)
    })
}

/// UPDATEs that withdraw `prefixes` (of one family).
///
/// # Errors
/// None in practice; the codec's signature has one.
pub fn encode_withdrawals(prefixes: &[IpNet]) -> Result<Vec<Bytes>, EncodeError> {
    in_chunks(prefixes, |chunk| {
        let attributes = match chunk.first().map(Family::of) {
            Some(Family::Ipv6) => vec![unreach(Family::Ipv6, chunk)],
            _ => Vec::new(),
        };
        build(&[], &ipv4_entries(chunk), &attributes, true)
    })
}

/// The End-of-RIB marker of a family (RFC 4724 2).
///
/// # Errors
/// None in practice; the codec's signature has one.
pub fn encode_end_of_rib(family: Family) -> Result<Bytes, EncodeError> {
    let attributes = match family {
        Family::Ipv4 => Vec::new(),
        Family::Ipv6 => vec![unreach(family, &[])],
    };
    build(&[], &[], &attributes, true)
}

fn build(
    announced: &[codec::Ipv4NlriEntry],
    withdrawn: &[codec::Ipv4NlriEntry],
    attributes: &[codec::PathAttribute],
    four_octet_as: bool,
) -> Result<Bytes, EncodeError> {
    let update = codec::UpdateMessage::try_build(
        announced,
        withdrawn,
        attributes,
        four_octet_as,
        false,
        codec::Ipv4UnicastMode::Body,
    )?;
    super::encode(&codec::Message::Update(update))
}

/// Splits `prefixes` so that each message fits; a chunk that is too long is halved.
fn in_chunks(
    prefixes: &[IpNet],
    mut encode: impl FnMut(&[IpNet]) -> Result<Bytes, EncodeError>,
) -> Result<Vec<Bytes>, EncodeError> {
    // 17 octets are the longest prefix on the wire, and half a message is left to the attributes.
    let per_message = usize::from(MAX_MESSAGE) / 2 / 17;
    let mut messages = Vec::new();
    let mut pending: Vec<&[IpNet]> = prefixes.chunks(per_message).rev().collect();
    while let Some(chunk) = pending.pop() {
        match encode(chunk) {
            Ok(message) => messages.push(message),
            Err(error) if chunk.len() < 2 => return Err(error),
            Err(_) => {
                let (head, tail) = chunk.split_at(chunk.len() / 2);
                pending.extend([tail, head]);
            }
        }
    }
    Ok(messages)
}
