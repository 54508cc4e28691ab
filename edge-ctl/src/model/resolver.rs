//! How a resolver is asked, and how far its answers are believed.

use std::time::Duration;

use super::RecordType;

/// Settings of `[resolver.NAME]` beside its servers; all of them are optional.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolverPolicy {
    /// How long NXDOMAIN or an empty answer must last before a pool becomes empty; `valid` where that is longer.
    pub hold: Duration,
    /// How long an answer must last that takes more of a pool than `shrink_limit` allows; zero: such answers count at once.
    pub shrink_hold: Duration,
    /// Most that one answer may take of a pool without being held, percent of its members.
    pub shrink_limit: u8,
    /// Domains appended to names in turn; empty: names are asked as they stand.
    pub search: Vec<String>,
    /// The service that the servers themselves belong to.
    pub follow: Option<Follow>,
}

/// A service whose endpoints are DNS servers: asked of the resolver itself, and followed like any pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Follow {
    /// Its name.
    pub name: String,
    /// Record type.
    pub record: RecordType,
    /// The servers' port, where the answer has none.
    pub port: u16,
}

impl Default for ResolverPolicy {
    fn default() -> Self {
        Self {
            hold: Duration::from_secs(10),
            shrink_hold: Duration::from_secs(10),
            shrink_limit: 50,
            search: Vec::new(),
            follow: None,
        }
    }
}
