//! BFD (RFC 5880 to 5883): whether a peer can be reached, told in milliseconds where BGP's hold time takes seconds.
//!
//! [`session`] decides and [`packet`] reads and writes; one thread of its own ([`driver`]) sends and listens, so that a
//! full table on its way through the speaker makes no session late. The actor tells it whom to watch and hears of every
//! change of state.

mod driver;
pub mod packet;
pub mod session;
mod socket;

use std::{
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::sync::mpsc;

use self::packet::{Diagnostic, Name};
use crate::model::bgp_session::Bfd;

/// Whom to watch, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The peer as the configuration has it.
    pub peer: IpAddr,
    /// Our address; its port does not count.
    pub local: SocketAddr,
    /// The peer's; its port does not count.
    pub remote: SocketAddr,
    /// As configured.
    pub settings: Bfd,
}

/// How a session stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// Its state.
    pub state: Name,
    /// Why it last left Up.
    pub diagnostic: Diagnostic,
    /// The peer's state, as it last told.
    pub remote_state: Name,
    /// Why the peer says that it last left Up.
    pub remote_diagnostic: Diagnostic,
    /// C of the peer: its BFD does not share fate with its BGP.
    pub independent: bool,
    /// Interval of our packets; `None`: the peer wants none.
    pub transmit: Option<Duration>,
    /// Silence of this length is taken for an end.
    pub detection: Duration,
}

/// How a session stands has changed, or it cannot be had.
#[derive(Clone, Debug)]
pub struct Report {
    /// Which.
    pub peer: IpAddr,
    /// How it stands now; or why there is none.
    pub status: Result<Status, String>,
}

/// Packets of one session.
#[derive(Debug, Default)]
pub struct Counters {
    sent: AtomicU64,
    received: AtomicU64,
}

impl Counters {
    /// Sent and received.
    pub fn read(&self) -> (u64, u64) {
        (self.sent.load(Ordering::Relaxed), self.received.load(Ordering::Relaxed))
    }
}

enum Command {
    Watch(Target, Arc<Counters>),
    Forget(IpAddr),
}

/// The way to the thread, which says AdminDown for every session and ends with it.
#[derive(Debug)]
pub struct Handle {
    commands: mpsc::UnboundedSender<Command>,
}

impl Handle {
    /// Starts the thread in the network namespace of the caller's.
    ///
    /// # Errors
    /// There is no thread, or no event queue, to be had.
    pub fn start(reports: mpsc::UnboundedSender<Report>) -> std::io::Result<Self> {
        let (commands, inbox) = mpsc::unbounded_channel();
        driver::start(inbox, reports)?;
        Ok(Self { commands })
    }

    /// Watches a peer, in place of what was watched of it.
    pub fn watch(&self, target: Target, counters: Arc<Counters>) {
        // The thread ends with this handle and not before.
        let _ = self.commands.send(Command::Watch(target, counters));
    }

    /// Watches it no longer.
    pub fn forget(&self, peer: IpAddr) {
        let _ = self.commands.send(Command::Forget(peer));
    }
}
