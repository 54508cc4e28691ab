//! Path attributes that route selection looks at or users see.

use std::{fmt, net::Ipv4Addr};

use rustbgpd_wire as codec;

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
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Segment {
    /// AS_SEQUENCE.
    Sequence(Vec<u32>),
    /// AS_SET.
    Set(Vec<u32>),
}

/// AS_PATH, always with 4-octet numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
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

/// Attributes of a received path. What we neither use nor show is not kept: we re-advertise nothing that we learn.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
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
                other => {
                    if let Some(communities) = other.communities() {
                        attributes.communities = communities.to_vec();
                    }
                }
            }
        }
        attributes
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
