//! What goes into the state machine and what comes out of it.

use std::{net::Ipv4Addr, time::Duration};

use super::{
    super::wire::{Capability, Notification, Open},
    Negotiated,
};
use crate::model::bgp_session::Role;

/// The moment of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// Time since some fixed point; never goes back.
    pub time: Duration,
    /// A fresh random number, for jitter.
    pub random: u32,
}

/// What the configuration says about the peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Our AS number.
    pub local_asn: u32,
    /// Our BGP identifier.
    pub router_id: Ipv4Addr,
    /// The AS number that the peer must have.
    pub remote_asn: u32,
    /// Hold time we propose, seconds; 0: no keepalives.
    pub hold: u16,
    /// Keepalive interval we wish for.
    pub keepalive: Duration,
    /// Never dial.
    pub passive: bool,
    /// Longest wait between two attempts.
    pub longest_retry: Duration,
    /// Our role; `None`: the peer's is not looked at.
    pub role: Option<Role>,
    /// A peer without a role is refused.
    pub role_strict: bool,
    /// What we offer.
    pub capabilities: Vec<Capability>,
}

/// Which side opened a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Side {
    /// We dialled.
    Outgoing,
    /// The peer dialled.
    Incoming,
}

impl Side {
    /// The other side.
    pub const fn other(self) -> Self {
        match self {
            Self::Outgoing => Self::Incoming,
            Self::Incoming => Self::Outgoing,
        }
    }
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The peer was configured, or enabled again.
    ManualStart,
    /// The peer is being removed, or the daemon stops: say so with this NOTIFICATION.
    ManualStop(Notification),
    /// The idle hold timer ran out.
    IdleHoldTimerExpires,
    /// The connect retry timer ran out, between dials or during one.
    ConnectRetryTimerExpires,
    /// No message for a hold time.
    HoldTimerExpires(Side),
    /// It is time for a KEEPALIVE.
    KeepaliveTimerExpires(Side),
    /// What we have to say could not be sent for a send hold time (RFC 9687).
    SendHoldTimerExpires(Side),
    /// BFD says that the peer cannot be reached (RFC 5882 4.3.1).
    BfdDown(String),
    /// A connection is up.
    TcpConnectionConfirmed(Side),
    /// A dial failed, or a connection ended.
    TcpConnectionFails(Side, String),
    /// OPEN, decoded.
    BgpOpen(Side, Open),
    /// KEEPALIVE.
    KeepAliveMsg(Side),
    /// UPDATE, decoded (its content is the RIB's business), or ROUTE-REFRESH.
    UpdateMsg(Side),
    /// NOTIFICATION.
    NotifMsg(Side, Notification),
    /// BGPHeaderErr, BGPOpenMsgErr or UpdateMsgErr: what cannot be decoded, with the answer it deserves.
    MessageError(Side, Notification),
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Open a connection to the peer.
    Dial,
    /// Give up the dial that is under way.
    StopDial,
    /// Send an OPEN.
    SendOpen(Side, Open),
    /// Send a KEEPALIVE.
    SendKeepalive(Side),
    /// Send a NOTIFICATION.
    SendNotification(Side, Notification),
    /// Close a connection once what was sent is out.
    Close(Side),
    /// The session is established.
    Up(Side, Negotiated),
    /// The established session is gone.
    Down {
        /// Why, in words.
        reason: String,
        /// Graceful restart: its routes stay, as [`Negotiated::kept`] has it; else they are withdrawn.
        keep: bool,
    },
    /// An attempt that never was established failed; for the operator.
    Failed(String),
}

/// State of the peer as users see it (RFC 4271 8.2.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Name {
    /// Stopped, or resting after an error.
    Idle,
    /// Dialling.
    Connect,
    /// Waiting for the peer or for the next dial.
    Active,
    /// OPEN sent.
    OpenSent,
    /// OPEN received, waiting for its confirmation.
    OpenConfirm,
    /// Up.
    Established,
}

impl Name {
    /// The name in the RFC.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Idle => "Idle",
            Self::Connect => "Connect",
            Self::Active => "Active",
            Self::OpenSent => "OpenSent",
            Self::OpenConfirm => "OpenConfirm",
            Self::Established => "Established",
        }
    }
}
