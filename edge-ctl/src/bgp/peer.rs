//! What the actor keeps for each configured peer.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use ipnet::IpNet;
use tokio::task::AbortHandle;

use super::{
    advertise::AdjRibOut,
    bfd,
    fsm::{self, Negotiated, Side},
    graceful::Helper,
    history::History,
    password::{self, Password},
    policy::{Local, Policy},
    rib::Route,
    session::{Link, LinkId},
    wire::{AddPath, Context, Family, Recent},
};
use crate::config::valid;

/// A peer.
#[derive(Debug)]
pub struct Peer {
    /// Its configuration.
    pub config: valid::Peer,
    /// Its state machine.
    pub fsm: fsm::State,
    /// Its prefix lists.
    pub policy: Policy,
    /// Its connections.
    pub outgoing: Option<Link>,
    /// As above.
    pub incoming: Option<Link>,
    /// The dial under way.
    pub dial: Option<(LinkId, AbortHandle)>,
    /// Its established session.
    pub session: Option<Session>,
    /// Messages by type and direction, `open_sent` and so on, over all sessions.
    pub messages: BTreeMap<&'static str, u64>,
    /// UPDATEs with malformed parts, by what was done about them (RFC 7606).
    pub malformed: BTreeMap<&'static str, u64>,
    /// Why the last session ended.
    pub last_reset: Option<String>,
    /// Why the last attempt since then failed.
    pub last_failure: Option<String>,
    /// Sessions so far.
    pub established_count: u64,
    /// When the session came up or went down; `None`: never up.
    pub changed: Option<Duration>,
    /// What of it outlives its session.
    pub helper: Helper,
    /// What happened to it.
    pub history: History,
    /// Its TCP MD5 password, or why there is none although one is configured.
    pub password: Result<Password, String>,
    /// The kernel's signature counters when the last dial began.
    pub signatures: password::Counters,
    /// Shut down by an administrator, with this message.
    pub shutdown: Option<String>,
    /// Why it is a peer.
    pub admitted: Admitted,
    /// It had too many prefixes; it may come back at this time, or not by itself.
    pub limited: Option<Option<Duration>>,
    /// What watches it.
    pub bfd: Option<Watched>,
    /// A warning that its prefixes come near the limit was given.
    pub warned: bool,
}

/// Why somebody is a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admitted {
    /// Its address is configured.
    Configured,
    /// It connected from a `listen_range`: it is forgotten once it is gone.
    Range,
    /// It was found on a link of ours, and stays until another one is found there in its place: `challenged` since then,
    /// without having been heard again.
    Link {
        /// When another router was heard on the link; `None`: not since this one was.
        challenged: Option<Duration>,
    },
}

/// A peer that BFD watches, from its first session on.
#[derive(Debug)]
pub struct Watched {
    /// How.
    pub target: bfd::Target,
    /// How it stands; or why it is not watched.
    pub status: Result<bfd::Status, String>,
    /// Packets.
    pub counters: Arc<bfd::Counters>,
    /// When its state changed last.
    pub changed: Duration,
    /// Times it left Up.
    pub downs: u64,
}

/// An established session.
#[derive(Debug)]
pub struct Session {
    /// Its connection.
    pub side: Side,
    /// What the OPENs settled.
    pub negotiated: Negotiated,
    /// What the peer was told.
    pub out: AdjRibOut,
    /// Families whose End-of-RIB came.
    pub end_of_rib: BTreeSet<Family>,
    /// When the last UPDATE came, or the session was established.
    pub last_update: Duration,
    /// Sets of attributes that it has sent, and what the RIB made of them; without effect on what is decoded.
    pub recent: Recent<Arc<Route>>,
    /// We have restarted, and have not announced everything yet: the End-of-RIB is still to come.
    pub owes_end_of_rib: bool,
}

impl Session {
    /// True once its initial table is here, or it has been silent for so long that it is taken to be.
    pub fn converged(&self, now: Duration, silence: Duration) -> bool {
        let complete = self.negotiated.families.iter().all(|family| self.end_of_rib.contains(family));
        complete || now.saturating_sub(self.last_update) >= silence
    }
}

impl Peer {
    /// A peer that is not started.
    pub fn new(bgp: &valid::Bgp, config: &valid::Peer) -> Self {
        Self {
            fsm: fsm::State::new(settings(bgp, config)),
            policy: policy(bgp, config),
            config: config.clone(),
            outgoing: None,
            incoming: None,
            dial: None,
            session: None,
            messages: BTreeMap::new(),
            malformed: BTreeMap::new(),
            last_reset: None,
            last_failure: None,
            established_count: 0,
            changed: None,
            helper: Helper::default(),
            history: History::default(),
            password: config.session.password.as_ref().map_or_else(|| Ok(Password::default()), password::read),
            signatures: password::Counters::default(),
            shutdown: None,
            admitted: Admitted::Configured,
            limited: None,
            bfd: None,
            warned: false,
        }
    }

    /// The connection of one side.
    pub const fn link(&self, side: Side) -> Option<&Link> {
        match side {
            Side::Outgoing => self.outgoing.as_ref(),
            Side::Incoming => self.incoming.as_ref(),
        }
    }

    /// As [`Peer::link`], to change it.
    pub const fn link_mut(&mut self, side: Side) -> &mut Option<Link> {
        match side {
            Side::Outgoing => &mut self.outgoing,
            Side::Incoming => &mut self.incoming,
        }
    }

    /// The side of a connection that is still ours.
    pub fn side_of(&self, id: LinkId) -> Option<Side> {
        [Side::Outgoing, Side::Incoming].into_iter().find(|side| self.link(*side).is_some_and(|link| link.id == id))
    }

    /// How the bytes of a connection are to be read; before the OPEN nothing depends on it.
    pub fn context(&self) -> Context {
        let session = self.session.as_ref();
        Context {
            four_octet_as: session.is_none_or(|session| session.negotiated.four_octet_as),
            internal: self.policy.internal,
            // The session's task has cut the messages to length: it takes long ones only where both sides do.
            extended: true,
            add_path: session.map_or(AddPath::None, |session| session.out.terms.context.add_path),
        }
    }

    /// Counts one message.
    pub fn count(&mut self, name: &'static str) {
        *self.messages.entry(name).or_default() += 1;
    }
}

/// The state machine's part of the configuration.
pub fn settings(bgp: &valid::Bgp, peer: &valid::Peer) -> fsm::Settings {
    fsm::Settings {
        local_asn: bgp.asn,
        router_id: bgp.router_id,
        remote_asn: peer.remote_asn,
        hold: u16::try_from(peer.hold.as_secs()).unwrap_or(u16::MAX),
        keepalive: peer.keepalive,
        passive: peer.passive,
        longest_retry: peer.session.connect_retry,
        role: peer.session.role,
        role_strict: peer.session.role_strict,
        capabilities: Vec::new(),
    }
}

/// The policy's part of the configuration.
pub fn policy(bgp: &valid::Bgp, peer: &valid::Peer) -> Policy {
    let list = |terms: &Option<Vec<valid::Term>>| terms.clone().map(std::sync::Arc::new);
    let internal = peer.remote_asn == bgp.asn;
    let role = peer.session.role.filter(|_| !internal).map(|role| (role, peer.remote_asn));
    Policy {
        internal,
        import: list(&peer.import),
        export: list(&peer.export),
        client_networks: peer.client_networks.iter().map(IpNet::trunc).collect(),
        role,
    }
}

/// What makes us refuse a path, as far as the configuration says it.
pub fn local(bgp: &valid::Bgp) -> Local {
    Local {
        asn: bgp.asn,
        router_id: Some(bgp.router_id),
        addresses: bgp.peers.values().filter_map(|peer| peer.local_address).collect(),
        pod_networks: bgp.guard.pod_networks.clone(),
        vips: bgp.guard.vips.clone(),
        connected: BTreeSet::new(),
    }
}

/// Families of the addresses of peers, of the networks that peers may connect from, and of neighbours that are found.
pub fn families(bgp: &valid::Bgp) -> BTreeSet<Family> {
    let ranges = bgp.ranges.iter().map(|range| Family::of(&range.network));
    let links = bgp.links.values().map(|_| Family::Ipv6);
    bgp.peers.keys().map(|address: &IpAddr| Family::of_address(*address)).chain(ranges).chain(links).collect()
}
