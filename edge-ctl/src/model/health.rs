//! Health checks as the operator means them, what they find, and the order that an administrator gives. Plain data.

use std::{collections::BTreeMap, fmt, net::SocketAddr, path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

/// `health` of a service, validated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Health {
    /// What is sent and what must come back.
    pub check: Check,
    /// From one check of a backend to the next.
    pub interval: Duration,
    /// The same while the state is about to change: after the first result that contradicts it.
    pub fast_interval: Duration,
    /// Share of an interval by which checks are spread, percent: 10 means interval x 0.9 to 1.1.
    pub jitter: u8,
    /// How long one check may take from the connect to the last byte.
    pub timeout: Duration,
    /// Failures in a row that take a backend out of use.
    pub fall: u32,
    /// Passes in a row that bring it back.
    pub rise: u32,
    /// Port that is checked; `None`: the one that traffic uses.
    pub port: Option<u16>,
    /// A new backend is not eligible before its first pass.
    pub mandatory: bool,
    /// Below this share of healthy backends, percent, health is ignored and all are eligible; 0: never.
    pub panic: u8,
    /// What the dataplane sees of real traffic; `None`: not looked at.
    pub passive: Option<Passive>,
}

/// One kind of check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Check {
    /// TCP: connect; and where given, send and wait for an answer that holds `expect`.
    Tcp(Exchange),
    /// UDP: send, and wait for an answer that holds `expect`.
    Udp(Exchange),
    /// TCP and a TLS handshake.
    Tls(Tls),
    /// HTTP/1.1, over TLS where given.
    Http(Http, Option<Tls>),
    /// `grpc.health.v1.Health/Check` over HTTP/2, over TLS where given; SERVING passes.
    Grpc {
        /// The service asked for; empty: the server as a whole.
        service: String,
        /// TLS settings; `None`: HTTP/2 in the clear with prior knowledge (RFC 9113 section 3.3).
        tls: Option<Tls>,
    },
    /// Nothing is sent: only real traffic is looked at ([`Passive`]).
    None,
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp(_) => "tcp",
            Self::Udp(_) => "udp",
            Self::Tls(_) => "tls",
            Self::Http(_, None) => "http",
            Self::Http(_, Some(_)) => "https",
            Self::Grpc { .. } => "grpc",
            Self::None => "passive",
        })
    }
}

/// Bytes to send, bytes to find in the answer; either may be empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exchange {
    /// Sent as they stand.
    pub send: Vec<u8>,
    /// Must appear in what comes back; empty: any answer will do for UDP, none is waited for with TCP.
    pub expect: Vec<u8>,
}

/// A request and what answers it well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Http {
    /// `GET`, `HEAD`, ...
    pub method: String,
    /// With query, `/healthz`.
    pub path: String,
    /// Host header; `None`: the backend's address.
    pub host: Option<String>,
    /// Status codes that pass, as ranges with both ends.
    pub status: Vec<(u16, u16)>,
    /// Must appear in the body, within its first 64 KiB.
    pub body: Option<String>,
}

/// How TLS is spoken with a backend.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Tls {
    /// Name sent (SNI) and, with `ca`, required of the certificate; `None`: no SNI, and the address is required.
    pub server_name: Option<String>,
    /// PEM file of the authorities that must have signed; `None`: any certificate will do, since a pod's seldom names its
    /// address, and the check asks whether the backend serves and not who it is.
    pub ca: Option<PathBuf>,
}

/// Thresholds on what the dataplane sees of real traffic, per backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Passive {
    /// Signals of failure within `window` that eject: SYNs never answered and resets before the first byte.
    pub failures: u32,
    /// Least share of the new flows of the window that must have failed, percent.
    pub share: u8,
    /// Over what both are counted.
    pub window: Duration,
    /// How long the first ejection lasts; each further one in a row twice as long as the one before.
    pub eject: Duration,
    /// Longest ejection.
    pub eject_most: Duration,
    /// Most of a pool that may be ejected at once, percent.
    pub limit: u8,
}

/// What identifies a checked backend: the service, since each has its own checks, and the backend's address.
pub type HealthKey = (String, SocketAddr);

/// What checks say about a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It may have flows.
    Up,
    /// It failed `fall` checks in a row and has not passed `rise` since.
    Down,
    /// New, and `mandatory`: the first pass is awaited.
    Checking,
    /// Real traffic failed there.
    Ejected,
}

impl Verdict {
    /// True where it may have flows.
    pub fn is_healthy(self) -> bool {
        self == Self::Up
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Up => "up",
            Self::Down => "unhealthy",
            Self::Checking => "checking",
            Self::Ejected => "ejected",
        })
    }
}

/// What the dataplane counted for one backend since its maps exist. The source of [`Passive`]'s signals; whoever reads
/// the counters hands them over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PassiveCounters {
    /// New flows.
    pub opened: u64,
    /// Half-open flows that ended without a SYN-ACK.
    pub syn_unanswered: u64,
    /// Flows that the backend reset before it sent a byte.
    pub reset_before_data: u64,
}

/// Whoever can read [`PassiveCounters`] of every backend.
pub trait PassiveSignals {
    /// By service and backend address; backends without counters are absent.
    fn passive_counters(&self) -> BTreeMap<HealthKey, PassiveCounters>;
}

/// The order an administrator gave for one backend of one service at run time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdminOrder {
    /// Whether it may have new flows.
    #[serde(default)]
    pub state: AdminState,
    /// Instead of the source's weight.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<u16>,
    /// Connections at once, instead of the service's `max_connections`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u32>,
}

/// Whether an administrator lets a backend have new flows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AdminState {
    /// It may.
    #[default]
    Up,
    /// None; the end of the last one is awaited and told.
    Drain,
    /// None.
    Down,
}

/// What to change about one backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackendVerb {
    /// No new flows.
    Down,
    /// New flows again.
    Up,
    /// No new flows, and tell when the last has ended.
    Drain,
    /// Take [`BackendVerb::Drain`] back; a backend that is down stays down.
    Undrain,
    /// Another weight; `None`: the source's.
    Weight(Option<u16>),
    /// Another limit of connections; `None`: the service's.
    Limit(Option<u32>),
}

impl AdminOrder {
    /// The order after `verb`.
    pub fn after(self, verb: BackendVerb) -> Self {
        match verb {
            BackendVerb::Down => Self { state: AdminState::Down, ..self },
            BackendVerb::Up => Self { state: AdminState::Up, ..self },
            BackendVerb::Drain => Self { state: AdminState::Drain, ..self },
            BackendVerb::Undrain if self.state == AdminState::Drain => Self { state: AdminState::Up, ..self },
            BackendVerb::Undrain => self,
            BackendVerb::Weight(weight) => Self { weight, ..self },
            BackendVerb::Limit(limit) => Self { limit, ..self },
        }
    }
}

/// Orders by service and backend; those that change nothing are left out.
pub type AdminOrders = BTreeMap<HealthKey, AdminOrder>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn undrain_takes_back_a_drain_and_nothing_else_and_weights_are_kept_apart() {
        let order = AdminOrder::default().after(BackendVerb::Weight(Some(3))).after(BackendVerb::Drain);
        assert_eq!(order, AdminOrder { state: AdminState::Drain, weight: Some(3), limit: None });
        assert_eq!(order.after(BackendVerb::Undrain).state, AdminState::Up);
        assert_eq!(order.after(BackendVerb::Down).after(BackendVerb::Undrain).state, AdminState::Down);
        assert_eq!(order.after(BackendVerb::Weight(None)).after(BackendVerb::Up), AdminOrder::default());
    }
}
