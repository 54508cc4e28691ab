//! Path attributes that route selection looks at or users see.

use std::{fmt, net::Ipv4Addr};

use bytes::Bytes;
use rustbgpd_wire as codec;

pub use crate::model::Community;

/// Flags of an attribute that everybody passes on.
const OPTIONAL_TRANSITIVE: u8 = 0xc0;
/// Flag of one that somebody passed on without knowing it.
const PARTIAL: u8 = 0x20;

/// ORIGIN (RFC 4271 5.1.1); the order is the order of preference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Origin {
    /// `i`.
    Igp,
    /// `e`.
    Egp,
    /// `?`.
    Incomplete,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Igp => "i",
            Self::Egp => "e",
            Self::Incomplete => "?",
        })
    }
}

/// One segment of an AS path.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Segment {
    /// AS_SEQUENCE.
    Sequence(Vec<u32>),
    /// AS_SET.
    Set(Vec<u32>),
}

/// AS_PATH, always with 4-octet numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AsPath(pub Vec<Segment>);

impl AsPath {
    /// Length for route selection: a set counts as one (RFC 4271 9.1.2.2).
    pub fn length(&self) -> usize {
        self.0
            .iter()
            .map(|segment| match segment {
                Segment::Sequence(numbers) => numbers.len(),
                Segment::Set(_) => 1,
            })
            .sum()
    }

    /// True where `asn` appears anywhere in the path.
    pub fn contains(&self, asn: u32) -> bool {
        self.0.iter().any(|segment| match segment {
            Segment::Sequence(numbers) | Segment::Set(numbers) => numbers.contains(&asn),
        })
    }

    /// Puts `asn` in front, `times` times (RFC 4271 5.1.2). A segment holds at most 255 numbers.
    pub fn prepend(&mut self, asn: u32, times: usize) {
        for _ in 0..times {
            match self.0.first_mut() {
                Some(Segment::Sequence(numbers)) if numbers.len() < 255 => numbers.insert(0, asn),
                _ => self.0.insert(0, Segment::Sequence(vec![asn])),
            }
        }
    }

    /// The neighbouring AS: the first of a leading sequence.
    pub fn first(&self) -> Option<u32> {
        match self.0.first()? {
            Segment::Sequence(numbers) => numbers.first().copied(),
            Segment::Set(_) => None,
        }
    }
}

impl fmt::Display for AsPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let segments: Vec<String> = self
            .0
            .iter()
            .map(|segment| {
                let join = |numbers: &[u32], between: &str| {
                    numbers.iter().map(u32::to_string).collect::<Vec<_>>().join(between)
                };
                match segment {
                    Segment::Sequence(numbers) => join(numbers, " "),
                    Segment::Set(numbers) => format!("{{{}}}", join(numbers, ",")),
                }
            })
            .collect();
        f.write_str(&segments.join(" "))
    }
}

/// An attribute that we do not know and pass on: optional and transitive (RFC 4271 5).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Opaque {
    /// Type code.
    pub code: u8,
    /// Its bytes, as received.
    pub value: Bytes,
}

/// Attributes of a path, received or to be sent: what we use, show, or have to pass on (RFC 4271 5).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Attributes {
    /// ORIGIN.
    pub origin: Origin,
    /// AS_PATH.
    pub as_path: AsPath,
    /// MULTI_EXIT_DISC.
    pub med: Option<u32>,
    /// LOCAL_PREF; only internal peers send it.
    pub local_pref: Option<u32>,
    /// RFC 1997 communities.
    pub communities: Vec<u32>,
    /// RFC 4360 extended communities.
    pub extended: Vec<u64>,
    /// RFC 8092 large communities.
    pub large: Vec<(u32, u32, u32)>,
    /// ATOMIC_AGGREGATE.
    pub atomic_aggregate: bool,
    /// AGGREGATOR: AS number and BGP identifier.
    pub aggregator: Option<(u32, Ipv4Addr)>,
    /// ONLY_TO_CUSTOMER (RFC 9234 5).
    pub only_to_customer: Option<u32>,
    /// Unknown optional transitive attributes.
    pub opaque: Vec<Opaque>,
    /// ORIGINATOR_ID (RFC 4456).
    pub originator_id: Option<Ipv4Addr>,
    /// Length of CLUSTER_LIST (RFC 4456).
    pub cluster_list_length: usize,
}

impl Default for Attributes {
    fn default() -> Self {
        Self {
            origin: Origin::Igp,
            as_path: AsPath::default(),
            med: None,
            local_pref: None,
            communities: Vec::new(),
            extended: Vec::new(),
            large: Vec::new(),
            atomic_aggregate: false,
            aggregator: None,
            only_to_customer: None,
            opaque: Vec::new(),
            originator_id: None,
            cluster_list_length: 0,
        }
    }
}

impl Attributes {
    /// Keeps of the codec's list what we use. ATTRIBUTES that may not come from an external peer are ignored
    /// (RFC 4271 5.1.5, RFC 7606 7.9 and 7.10).
    pub(super) fn from_codec(list: &[codec::PathAttribute], internal: bool) -> Self {
        let mut attributes = Self::default();
        for attribute in list {
            match attribute {
                codec::PathAttribute::Origin(origin) => {
                    attributes.origin = match origin {
                        codec::Origin::Igp => Origin::Igp,
                        codec::Origin::Egp => Origin::Egp,
                        codec::Origin::Incomplete => Origin::Incomplete,
                    }
                }
                codec::PathAttribute::AsPath(path) => {
                    attributes.as_path = AsPath(
                        path.segments
                            .iter()
                            .map(|segment| match segment {
                                codec::AsPathSegment::AsSequence(numbers) => Segment::Sequence(numbers.clone()),
                                codec::AsPathSegment::AsSet(numbers) => Segment::Set(numbers.clone()),
                            })
                            .collect(),
                    )
                }
                codec::PathAttribute::Med(med) => attributes.med = Some(*med),
                codec::PathAttribute::LocalPref(preference) if internal => attributes.local_pref = Some(*preference),
                codec::PathAttribute::OriginatorId(id) if internal => attributes.originator_id = Some(*id),
                codec::PathAttribute::ClusterList(list) if internal => attributes.cluster_list_length = list.len(),
                codec::PathAttribute::AtomicAggregate => attributes.atomic_aggregate = true,
                codec::PathAttribute::Aggregator(aggregator) => {
                    attributes.aggregator = Some((aggregator.asn, aggregator.router_id));
                }
                codec::PathAttribute::ExtendedCommunities(list)
                | codec::PathAttribute::ExtendedCommunitiesPartial(list) => {
                    attributes.extended = list.iter().map(|community| community.as_u64()).collect();
                }
                codec::PathAttribute::LargeCommunities(list) | codec::PathAttribute::LargeCommunitiesPartial(list) => {
                    attributes.large = list.iter().map(|c| (c.global_admin, c.local_data1, c.local_data2)).collect();
                }
                codec::PathAttribute::OnlyToCustomer(asn) | codec::PathAttribute::OnlyToCustomerPartial(asn) => {
                    attributes.only_to_customer = Some(*asn);
                }
                codec::PathAttribute::Unknown(raw) if raw.flags & OPTIONAL_TRANSITIVE == OPTIONAL_TRANSITIVE => {
                    attributes.opaque.push(Opaque { code: raw.type_code, value: raw.data.clone() });
                }
                other => {
                    if let Some(communities) = other.communities() {
                        attributes.communities = communities.to_vec();
                    }
                }
            }
        }
        attributes
    }

    /// As the codec wants them, without next hop and prefixes. LOCAL_PREF goes to internal peers only, where it is
    /// mandatory (RFC 4271 5.1.5).
    pub(super) fn to_codec(&self, internal: bool) -> Vec<codec::PathAttribute> {
        let segments = self.as_path.0.iter().map(|segment| match segment {
            Segment::Sequence(numbers) => codec::AsPathSegment::AsSequence(numbers.clone()),
            Segment::Set(numbers) => codec::AsPathSegment::AsSet(numbers.clone()),
        });
        let mut list = vec![
            codec::PathAttribute::Origin(match self.origin {
                Origin::Igp => codec::Origin::Igp,
                Origin::Egp => codec::Origin::Egp,
                Origin::Incomplete => codec::Origin::Incomplete,
            }),
            codec::PathAttribute::AsPath(codec::AsPath { segments: segments.collect() }),
        ];
        list.extend(self.med.map(codec::PathAttribute::Med));
        if internal {
            list.push(codec::PathAttribute::LocalPref(self.local_pref.unwrap_or(100)));
        }
        if self.atomic_aggregate {
            list.push(codec::PathAttribute::AtomicAggregate);
        }
        list.extend(self.aggregator.map(|(asn, router_id)| {
            codec::PathAttribute::Aggregator(codec::Aggregator { asn, router_id, partial: false })
        }));
        if !self.communities.is_empty() {
            list.push(codec::PathAttribute::Communities(self.communities.clone()));
        }
        if !self.extended.is_empty() {
            let extended = self.extended.iter().map(|value| codec::ExtendedCommunity::new(*value)).collect();
            list.push(codec::PathAttribute::ExtendedCommunities(extended));
        }
        if !self.large.is_empty() {
            let large = self.large.iter().map(|(a, b, c)| codec::LargeCommunity::new(*a, *b, *c)).collect();
            list.push(codec::PathAttribute::LargeCommunities(large));
        }
        list.extend(self.only_to_customer.map(codec::PathAttribute::OnlyToCustomer));
        list.extend(self.opaque.iter().map(|opaque| {
            // Passed on by a speaker that does not know it: the Partial bit says so (RFC 4271 5).
            codec::PathAttribute::Unknown(codec::RawAttribute {
                flags: OPTIONAL_TRANSITIVE | PARTIAL,
                type_code: opaque.code,
                data: opaque.value.clone(),
            })
        }));
        list
    }

    /// Communities of all kinds as operators write them; well-known ones by name.
    pub fn community_texts(&self) -> Vec<String> {
        let standard = self.communities.iter().map(|value| Community::Standard(*value));
        let large = self.large.iter().map(|(a, b, c)| Community::Large(*a, *b, *c));
        let extended = self.extended.iter().map(|value| Community::Extended(*value));
        standard.chain(large).chain(extended).map(|community| community.to_string()).collect()
    }

    /// True where the path carries `community`.
    pub fn has_community(&self, community: Community) -> bool {
        match community {
            Community::Standard(value) => self.communities.contains(&value),
            Community::Large(a, b, c) => self.large.contains(&(a, b, c)),
            Community::Extended(value) => self.extended.contains(&value),
        }
    }

    /// Adds a community, once.
    pub fn add_community(&mut self, community: Community) {
        if self.has_community(community) {
            return;
        }
        match community {
            Community::Standard(value) => self.communities.push(value),
            Community::Large(a, b, c) => self.large.push((a, b, c)),
            Community::Extended(value) => self.extended.push(value),
        }
    }

    /// Removes a community wherever it stands.
    pub fn remove_community(&mut self, community: Community) {
        match community {
            Community::Standard(value) => self.communities.retain(|have| *have != value),
            Community::Large(a, b, c) => self.large.retain(|have| *have != (a, b, c)),
            Community::Extended(value) => self.extended.retain(|have| *have != value),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_as_set_counts_as_one_and_is_shown_in_braces() {
        let path = AsPath(vec![Segment::Sequence(vec![64512, 64513]), Segment::Set(vec![65001, 65002])]);
        assert_eq!(path.length(), 3);
        assert_eq!(path.to_string(), "64512 64513 {65001,65002}");
        assert!(path.contains(65002));
        assert_eq!(path.first(), Some(64512));
        assert_eq!(AsPath::default().to_string(), "");
    }
}
