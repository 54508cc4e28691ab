//! How a resolver is asked, and how far its answers are believed.

use std::time::Duration;

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
}

impl Default for ResolverPolicy {
    fn default() -> Self {
        Self {
            hold: Duration::from_secs(10),
            shrink_hold: Duration::from_secs(10),
            shrink_limit: 50,
            search: Vec::new(),
        }
    }
}
