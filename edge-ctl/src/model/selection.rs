//! What decides which backend gets a new flow, beside the method.

use std::{net::SocketAddr, time::Duration};

use super::Balance;

/// Most connections at once that a backend can be limited to.
pub const MOST_CONNECTIONS: u32 = 10_000_000;

/// Settings of a service; all of them are optional.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// How long a client stays with its backend after it last started a flow; `None`: no affinity.
    pub affinity: Option<Duration>,
    /// Connections that each backend may have at once; `None`: no limit.
    pub max_connections: Option<u32>,
    /// How long a backend that becomes eligible takes to its full weight; `None`: no time.
    pub slow_start: Option<Duration>,
    /// Slots of the Maglev table, a prime; `None`: by the size of the pool.
    pub maglev_size: Option<u32>,
}

/// When a member of a pool is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tier {
    /// Always.
    #[default]
    Primary,
    /// While no primary member can take a flow.
    Backup,
}

/// A backend written into the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StaticBackend {
    /// Address and port; [`super::ANY_PORT`]: the one that the client asked for.
    pub address: SocketAddr,
    /// Relative weight, at least 1.
    pub weight: u16,
    /// When it is used.
    pub tier: Tier,
}

impl StaticBackend {
    /// A primary backend of weight 1.
    pub const fn new(address: SocketAddr) -> Self {
        Self { address, weight: 1, tier: Tier::Primary }
    }
}

/// What a selection table is made for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct TableShape {
    /// The method.
    pub balance: Balance,
    /// Slots of a Maglev table; `None`: by the size of the pool.
    pub maglev_size: Option<u32>,
}
