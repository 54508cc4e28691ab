//! What a BGP session is configured to be, beyond addresses and timers. Plain data.

use std::{fmt, net::IpAddr, path::PathBuf, time::Duration};

/// Our role on an external session (RFC 9234 4.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// We sell transit to the peer.
    Provider,
    /// We are a route server.
    RouteServer,
    /// The peer is our route server.
    RouteServerClient,
    /// We buy transit from the peer.
    Customer,
    /// Neither pays.
    Peer,
}

impl Role {
    /// All of them, in the order of their numbers on the wire.
    pub const ALL: [Self; 5] = [Self::Provider, Self::RouteServer, Self::RouteServerClient, Self::Customer, Self::Peer];

    /// The name in configuration and views.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Provider => "provider",
            Self::RouteServer => "rs-server",
            Self::RouteServerClient => "rs-client",
            Self::Customer => "customer",
            Self::Peer => "peer",
        }
    }

    /// The only role that the other side may have (RFC 9234 4.2, table 2).
    pub const fn counterpart(self) -> Self {
        match self {
            Self::Provider => Self::Customer,
            Self::RouteServer => Self::RouteServerClient,
            Self::RouteServerClient => Self::RouteServer,
            Self::Customer => Self::Provider,
            Self::Peer => Self::Peer,
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Where a TCP MD5 password (RFC 2385) comes from. The password itself is never part of the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PasswordSource {
    /// A file; a newline at its end does not count.
    File(PathBuf),
    /// A systemd credential: a file in `$CREDENTIALS_DIRECTORY`.
    Credential(String),
    /// A variable of the daemon's environment.
    Environment(String),
}

impl fmt::Display for PasswordSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "file {}", path.display()),
            Self::Credential(name) => write!(f, "systemd credential {name}"),
            Self::Environment(name) => write!(f, "environment variable {name}"),
        }
    }
}

/// `graceful_restart` of a peer (RFC 4724).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GracefulRestart {
    /// How long the peer shall keep our routes while we are away; at most 4095 s on the wire.
    pub time: Duration,
    /// Restart also after NOTIFICATIONs and hold time expiry, where the peer does so too (RFC 8538).
    pub notification: bool,
    /// Longest time to keep stale routes of a peer that is back and has not finished its table.
    pub stale: Duration,
    /// Longest time to keep long-lived stale routes (RFC 9494); zero: not offered.
    pub long_lived: Duration,
}

impl Default for GracefulRestart {
    fn default() -> Self {
        Self {
            time: Duration::from_secs(120),
            notification: false,
            stale: Duration::from_secs(360),
            long_lived: Duration::ZERO,
        }
    }
}

/// `bfd` of a peer (RFC 5880 to 5883).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bfd {
    /// Interval of our packets, and the shortest of the peer's that we ask for.
    pub interval: Duration,
    /// The peer takes us for gone after so many intervals of silence.
    pub multiplier: u8,
    /// The peer is routers away (RFC 5883); else a neighbour on the wire.
    pub multihop: bool,
}

impl Bfd {
    /// As FRR's bfdd has it.
    pub const INTERVAL: Duration = Duration::from_millis(300);
    /// As above.
    pub const MULTIPLIER: u8 = 3;
}

/// Settings of a session that may stand in a group as on a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionSettings {
    /// TCP MD5 password.
    pub password: Option<PasswordSource>,
    /// Hops that the peer may be away (RFC 5082); `None`: no check.
    pub ttl_security: Option<u8>,
    /// Longest time that a write may make no progress (RFC 9687); `None`: 8 min, or twice the hold time.
    pub send_hold: Option<Duration>,
    /// Longest wait between two attempts to connect.
    pub connect_retry: Duration,
    /// IPv4 unicast is offered.
    pub ipv4: bool,
    /// IPv6 unicast is offered.
    pub ipv6: bool,
    /// Our role; `None`: not told, and the peer's is ignored.
    pub role: Option<Role>,
    /// A peer that tells no role is refused.
    pub role_strict: bool,
    /// IPv4 prefixes with IPv6 next hops (RFC 8950).
    pub extended_next_hop: bool,
    /// `None`: neither offered nor honoured.
    pub graceful_restart: Option<GracefulRestart>,
    /// `None`: not watched by BFD.
    pub bfd: Option<Bfd>,
}

impl Default for SessionSettings {
    fn default() -> Self {
        Self {
            password: None,
            ttl_security: None,
            send_hold: None,
            connect_retry: Self::CONNECT_RETRY,
            ipv4: true,
            ipv6: true,
            role: None,
            role_strict: false,
            extended_next_hop: false,
            graceful_restart: Some(GracefulRestart::default()),
            bfd: None,
        }
    }
}

impl SessionSettings {
    /// Nodes come back in seconds: RFC 4271's 120 s would keep their pods unreachable.
    pub const CONNECT_RETRY: Duration = Duration::from_secs(30);
}

/// What an administrator may order for a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Order {
    /// End it; it comes back at once.
    Clear,
    /// Tell and ask for all routes again; it stays.
    Refresh,
    /// End it with this message, until it is enabled (RFC 9003).
    Shutdown(String),
    /// Let it come up again.
    Enable,
}

impl Order {
    /// The word for it in the API.
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Clear => "clear",
            Self::Refresh => "refresh",
            Self::Shutdown(_) => "shutdown",
            Self::Enable => "enable",
        }
    }
}

/// An order for one peer, or for all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerOrder {
    /// `None`: all of them.
    pub peer: Option<IpAddr>,
    /// What to do.
    pub what: Order,
}

/// Why an order was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OrderError {
    /// It is not a peer.
    #[error("there is no BGP peer {0}; `edge-ctl bgp summary` lists them")]
    Unknown(IpAddr),
    /// The speaker is gone.
    #[error("the BGP speaker has ended")]
    Ended,
}
