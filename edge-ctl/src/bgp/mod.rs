//! The BGP speaker: learns the pod networks, announces what we serve.
//!
//! Pure parts decide: `wire` (messages), `fsm` (one peer), `policy`, `bestpath`, `rib`, `advertise`. One actor owns them
//! all and acts through `session` and `listener`, so there are no locks and every decision sees one consistent state.
//! What is learnt is announced again only with `transit` (see `advertise`). Graceful restart is spoken on both sides
//! (`graceful`, and `actor::sessions` for our own).

mod actor;
pub mod advertise;
pub mod bestpath;
pub mod bfd;
mod discovery;
pub mod fsm;
pub mod graceful;
mod history;
mod listener;
pub mod nexthop;
pub mod offer;
mod password;
mod peer;
pub mod policy;
mod policy_test;
pub mod rib;
mod session;
mod show;
mod socket;
pub mod wire;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::Duration,
};

use ipnet::IpNet;
use tokio::sync::{mpsc, oneshot};

use crate::{
    config::valid,
    model::{
        PathAttributes, RouteUpdate,
        bgp_session::{OrderError, PeerOrder},
        query::PolicyQuestion,
        view::{BgpMessageRow, BgpPeerRow, BgpRouteRow, PolicyRow},
    },
};

use crate::model::bgp_session::Order;

pub use listener::BgpError;

/// [`BgpEvent::Converged`] comes at the latest this long after the start.
pub const CONVERGENCE_TIMEOUT: Duration = Duration::from_secs(30);
/// A peer that sends no End-of-RIB counts as converged after this much silence.
pub const CONVERGENCE_SILENCE: Duration = Duration::from_secs(3);

/// What the speaker tells the daemon. Route changes are coalesced while the daemon is busy, never dropped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BgpEvent {
    /// Changed prefixes; no next hops: the prefix is gone.
    Routes(Vec<RouteUpdate>),
    /// A session was established.
    PeerUp {
        /// The peer.
        address: IpAddr,
    },
    /// An established session ended; its routes are withdrawn in the [`BgpEvent::Routes`] that comes with it.
    PeerDown {
        /// The peer.
        address: IpAddr,
        /// In words.
        reason: String,
        /// The peer is another edge of this group.
        peer_edge: bool,
    },
    /// Once: every configured peer is established and has sent its table, or [`CONVERGENCE_TIMEOUT`] passed.
    Converged,
}

/// Steps of a planned end, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leaving {
    /// What we originate carries GRACEFUL_SHUTDOWN (RFC 8326): peers look for another way.
    Ask,
    /// It is withdrawn.
    Withdraw,
}

#[derive(Debug)]
enum Command {
    Announce(IpNet, PathAttributes, oneshot::Sender<()>),
    Withdraw(IpNet, oneshot::Sender<()>),
    Summary(oneshot::Sender<Vec<BgpPeerRow>>),
    Routes(oneshot::Sender<Vec<BgpRouteRow>>),
    Received(IpAddr, oneshot::Sender<Vec<BgpRouteRow>>),
    Advertised(IpAddr, oneshot::Sender<Vec<BgpRouteRow>>),
    Messages(IpAddr, oneshot::Sender<Vec<BgpMessageRow>>),
    Order(PeerOrder, oneshot::Sender<Result<(), OrderError>>),
    Restarted(oneshot::Sender<()>),
    Originated(oneshot::Sender<BTreeSet<IpNet>>),
    Kernel(Vec<(IpNet, Option<IpAddr>)>, oneshot::Sender<()>),
    Leave(Leaving, oneshot::Sender<()>),
    Policy(Box<PolicyQuestion>, oneshot::Sender<Option<PolicyRow>>),
    Reload(Box<valid::Bgp>, oneshot::Sender<Result<(), BgpError>>),
    Shutdown(oneshot::Sender<()>),
}

/// A speaker that holds its port but does not speak yet.
pub struct Speaker {
    actor: actor::Actor,
    commands: mpsc::Sender<Command>,
}

impl Speaker {
    /// Binds the listeners in the current network namespace. Who connects waits until [`Speaker::start`].
    ///
    /// # Errors
    /// [`BgpError::Listen`] where the port cannot be bound; it names address, port and remedy.
    pub fn bind(config: valid::Bgp, events: mpsc::Sender<BgpEvent>) -> Result<Self, BgpError> {
        let (commands, inbox) = mpsc::channel(64);
        Ok(Self { actor: actor::Actor::new(config, events, inbox)?, commands })
    }

    /// The daemon has restarted, and what its earlier life forwarded has been forwarded since: peers that kept our
    /// routes are told so (RFC 4724 4.1), and [`BgpHandle::restarted`] is owed to them.
    #[must_use]
    pub fn restarting(mut self) -> Self {
        self.actor.restarting();
        self
    }

    /// These peers stay shut down, with these messages.
    #[must_use]
    pub fn shut_down(mut self, peers: &BTreeMap<IpAddr, String>) -> Self {
        self.actor.shut_at_start(peers);
        self
    }

    /// What is asked through it waits until [`Speaker::start`].
    pub fn handle(&self) -> BgpHandle {
        BgpHandle { commands: self.commands.clone() }
    }

    /// Dials and accepts.
    pub fn start(self) -> BgpHandle {
        let handle = self.handle();
        tokio::spawn(self.actor.run());
        handle
    }
}

/// Starts the speaker in the current network namespace: binds its listeners, then dials and accepts.
///
/// # Errors
/// As [`Speaker::bind`].
pub async fn spawn(config: valid::Bgp, events: mpsc::Sender<BgpEvent>) -> Result<BgpHandle, BgpError> {
    Ok(Speaker::bind(config, events)?.start())
}

/// The daemon's hold on the speaker. When the last clone is gone the speaker shuts down as by [`BgpHandle::shutdown`].
#[derive(Clone, Debug)]
pub struct BgpHandle {
    commands: mpsc::Sender<Command>,
}

impl BgpHandle {
    /// Announces a prefix to every peer whose export list has it, now and on later sessions; again with other
    /// attributes: changes it.
    pub async fn announce(&self, prefix: IpNet, attributes: PathAttributes) {
        self.ask(|reply| Command::Announce(prefix, attributes, reply)).await;
    }

    /// Withdraws an announced prefix. A configured network of the same prefix stays announced.
    pub async fn withdraw(&self, prefix: IpNet) {
        self.ask(|reply| Command::Withdraw(prefix, reply)).await;
    }

    /// One row for each configured peer, by address.
    pub async fn summary(&self) -> Vec<BgpPeerRow> {
        self.ask(Command::Summary).await.unwrap_or_default()
    }

    /// The Loc-RIB: every accepted path with its standing, and our own prefixes.
    pub async fn routes(&self) -> Vec<BgpRouteRow> {
        self.ask(Command::Routes).await.unwrap_or_default()
    }

    /// Adj-RIB-In of a peer, before policy, with the reason where a path was refused.
    pub async fn received(&self, peer: IpAddr) -> Vec<BgpRouteRow> {
        self.ask(|reply| Command::Received(peer, reply)).await.unwrap_or_default()
    }

    /// Adj-RIB-Out of a peer.
    pub async fn advertised(&self, peer: IpAddr) -> Vec<BgpRouteRow> {
        self.ask(|reply| Command::Advertised(peer, reply)).await.unwrap_or_default()
    }

    /// The last messages of a peer, oldest first.
    pub async fn messages(&self, peer: IpAddr) -> Vec<BgpMessageRow> {
        self.ask(|reply| Command::Messages(peer, reply)).await.unwrap_or_default()
    }

    /// Clears, refreshes, shuts down or enables a peer, or all of them.
    ///
    /// # Errors
    /// There is no such peer; the speaker has ended.
    pub async fn order(&self, order: PeerOrder) -> Result<(), OrderError> {
        self.ask(|reply| Command::Order(order, reply)).await.unwrap_or(Err(OrderError::Ended))
    }

    /// Prefixes that are announced now.
    pub async fn originated(&self) -> BTreeSet<IpNet> {
        self.ask(Command::Originated).await.unwrap_or_default()
    }

    /// After a restart: everything is announced that will be, so that peers may forget the rest.
    pub async fn restarted(&self) {
        self.ask(Command::Restarted).await;
    }

    /// The kernel's connected and static routes with their gateways, default routes aside: next hops are resolved by them
    /// from the first time that they are given.
    pub async fn kernel(&self, routes: Vec<(IpNet, Option<IpAddr>)>) {
        self.ask(|reply| Command::Kernel(routes, reply)).await;
    }

    /// One step of a planned end; [`BgpHandle::shutdown`] is the last.
    pub async fn leave(&self, step: Leaving) {
        self.ask(|reply| Command::Leave(step, reply)).await;
    }

    /// What a peer's policy says of a path; `None`: no such peer.
    pub async fn policy(&self, question: PolicyQuestion) -> Option<PolicyRow> {
        self.ask(|reply| Command::Policy(Box::new(question), reply)).await.flatten()
    }

    /// Applies a new configuration. Sessions whose settings did not change are untouched; changed prefix lists are
    /// applied to what was received, and the peer is asked for its routes again.
    ///
    /// # Errors
    /// [`BgpError::Listen`] where a new port cannot be bound, and nothing was changed; [`BgpError::Ended`].
    pub async fn reload(&self, config: valid::Bgp) -> Result<(), BgpError> {
        self.ask(|reply| Command::Reload(Box::new(config), reply)).await.unwrap_or(Err(BgpError::Ended))
    }

    /// Tells every peer that we shut down (Cease, Administrative Shutdown), closes the sessions, ends the speaker.
    pub async fn shutdown(&self) {
        self.ask(Command::Shutdown).await;
    }

    /// `None` where the speaker has ended.
    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.ok()?;
        answer.await.ok()
    }
}
