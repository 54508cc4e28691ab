//! What sources may do with a service.

use std::{collections::BTreeMap, fmt};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// What becomes of new flows from a source range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RangeAction {
    /// They may start.
    Allow,
    /// They are dropped.
    Deny,
}

impl fmt::Display for RangeAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
        })
    }
}

/// Source ranges of a service; the longest that holds a source decides.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SourceRanges {
    /// Ranges of both families.
    pub ranges: BTreeMap<IpNet, RangeAction>,
    /// A source in none of them is refused: the configuration allows some, so nobody else.
    pub refuse_others: bool,
}

/// Limits for each source of a service: an IPv4 address, or the first 64 bits of an IPv6 address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// New flows a second.
    pub new_flows: Option<Rate>,
    /// Packets a second.
    pub packets: Option<Rate>,
    /// Half-open flows at a time.
    pub half_open: Option<u32>,
}

/// A token bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Tokens a second, at least 1.
    pub per_second: u32,
    /// Tokens that are saved up at most, at least 1.
    pub burst: u32,
}

/// Everything about the sources of a service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Protection {
    /// Who may use it.
    pub source_ranges: SourceRanges,
    /// How much.
    pub limits: Limits,
    /// Largest MSS let through in SYNs, bytes.
    pub mss: Option<u16>,
}
