//! Adj-RIB-In of every peer and the Loc-RIB, in one table by prefix.
//!
//! Received paths are kept before policy, together with the reason why one is refused, so that a policy change is a
//! re-evaluation and "why is it not used" has an answer. Changes of the next hops are collected and coalesced until
//! [`Rib::take_changes`].

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
    time::Duration,
};

use ipnet::IpNet;

use super::{
    bestpath::{self, Candidate, Reason, Selection},
    policy::{Local, Policy, Rejection},
    wire::{Attributes, Update},
};
use crate::model::RouteUpdate;

/// A path learnt from a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Path {
    /// The peer.
    pub peer: IpAddr,
    /// Its attributes, shared by all prefixes of one UPDATE.
    pub attributes: Arc<Attributes>,
    /// Next hop.
    pub next_hop: IpAddr,
    /// When it was learnt, on the actor's clock.
    pub learnt: Duration,
    /// Why it does not take part in route selection.
    pub rejection: Option<Rejection>,
}

/// A peer whose session is established.
#[derive(Clone, Debug)]
struct Source {
    policy: Policy,
    router_id: Ipv4Addr,
    received: u64,
    accepted: u64,
}

#[derive(Clone, Debug, Default)]
struct Entry {
    /// One path at most from each peer, by peer address.
    paths: Vec<Path>,
    /// We originate the prefix: our own path is preferred over any learnt one and needs no next hop.
    originated: bool,
    /// What the last change said.
    next_hops: Vec<IpAddr>,
}

/// All routes.
#[derive(Clone, Debug)]
pub struct Rib {
    local: Local,
    sources: BTreeMap<IpAddr, Source>,
    table: BTreeMap<IpNet, Entry>,
    changes: BTreeMap<IpNet, Vec<IpAddr>>,
}

/// A path and its standing, for users.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing<'a> {
    /// The path.
    pub path: &'a Path,
    /// It is the best one.
    pub best: bool,
    /// It carries traffic, alone or with its equals.
    pub multipath: bool,
    /// Learnt inside our AS.
    pub internal: bool,
    /// Why it is not the best, where it is accepted.
    pub reason: Option<Reason>,
}

impl Rib {
    /// An empty table.
    pub const fn new(local: Local) -> Self {
        Self { local, sources: BTreeMap::new(), table: BTreeMap::new(), changes: BTreeMap::new() }
    }

    /// A session came up.
    pub fn peer_up(&mut self, peer: IpAddr, policy: Policy, router_id: Ipv4Addr) {
        self.sources.insert(peer, Source { policy, router_id, received: 0, accepted: 0 });
    }

    /// A session went down: its paths are gone at once.
    pub fn peer_down(&mut self, peer: IpAddr) {
        if self.sources.remove(&peer).is_none() {
            return;
        }
        for prefix in self.prefixes_of(peer) {
            self.edit(prefix, |entry| entry.paths.retain(|path| path.peer != peer));
        }
    }

    /// Our AS number or router id changed; paths are judged by them from now on.
    pub fn identify(&mut self, asn: u32, router_id: Ipv4Addr) {
        if (self.local.asn, self.local.router_id) != (asn, router_id) {
            (self.local.asn, self.local.router_id) = (asn, router_id);
            self.evaluate_all();
        }
    }

    /// One of our own addresses has become known; paths that point at it are refused from now on.
    pub fn local_address(&mut self, address: IpAddr) {
        if self.local.addresses.insert(address) {
            self.evaluate_all();
        }
    }

    /// The policy of a peer changed.
    pub fn set_policy(&mut self, peer: IpAddr, policy: Policy) {
        if let Some(source) = self.sources.get_mut(&peer) {
            source.policy = policy;
            self.evaluate(peer);
        }
    }

    fn evaluate_all(&mut self) {
        let peers: Vec<IpAddr> = self.sources.keys().copied().collect();
        peers.into_iter().for_each(|peer| self.evaluate(peer));
    }

    fn evaluate(&mut self, peer: IpAddr) {
        let Some(policy) = self.sources.get(&peer).map(|source| source.policy.clone()) else { return };
        let local = self.local.clone();
        let mut accepted = 0;
        for prefix in self.prefixes_of(peer) {
            self.edit(prefix, |entry| {
                for path in entry.paths.iter_mut().filter(|path| path.peer == peer) {
                    path.rejection = policy.import(&local, &prefix, &path.attributes, path.next_hop).err();
                    accepted += u64::from(path.rejection.is_none());
                }
            });
        }
        if let Some(source) = self.sources.get_mut(&peer) {
            source.accepted = accepted;
        }
    }

    /// An UPDATE of an established peer.
    pub fn update(&mut self, peer: IpAddr, update: &Update, now: Duration) {
        let Some(mut source) = self.sources.remove(&peer) else { return };
        for prefix in &update.withdrawn {
            self.put(peer, *prefix, None, &mut source);
        }
        let attributes = Arc::new(update.attributes.clone());
        for announcement in &update.announced {
            let next_hop = announcement.next_hop;
            for prefix in &announcement.prefixes {
                let rejection = source.policy.import(&self.local, prefix, &attributes, next_hop).err();
                let path = Path { peer, attributes: Arc::clone(&attributes), next_hop, learnt: now, rejection };
                self.put(peer, *prefix, Some(path), &mut source);
            }
        }
        // Selection needs the source; `put` only marks, the prefixes are decided once it is back in its place.
        self.sources.insert(peer, source);
        for prefix in &update.withdrawn {
            self.decide(*prefix);
        }
        for prefix in update.announced.iter().flat_map(|announcement| &announcement.prefixes) {
            self.decide(*prefix);
        }
    }

    fn put(&mut self, peer: IpAddr, prefix: IpNet, path: Option<Path>, source: &mut Source) {
        let entry = self.table.entry(prefix).or_default();
        let place = entry.paths.binary_search_by_key(&peer, |path| path.peer);
        if let Ok(index) = place {
            source.received -= 1;
            source.accepted -= u64::from(entry.paths[index].rejection.is_none());
        }
        if let Some(path) = &path {
            source.received += 1;
            source.accepted += u64::from(path.rejection.is_none());
        }
        match (place, path) {
            (Ok(index), Some(path)) => entry.paths[index] = path,
            (Ok(index), None) => drop(entry.paths.remove(index)),
            (Err(index), Some(path)) => entry.paths.insert(index, path),
            (Err(_), None) => {}
        }
    }

    /// We begin or cease to originate a prefix.
    pub fn originate(&mut self, prefix: IpNet, originated: bool) {
        self.edit(prefix, |entry| entry.originated = originated);
    }

    fn edit(&mut self, prefix: IpNet, change: impl FnOnce(&mut Entry)) {
        change(self.table.entry(prefix).or_default());
        self.decide(prefix);
    }

    fn decide(&mut self, prefix: IpNet) {
        let Some(entry) = self.table.get(&prefix) else { return };
        let next_hops = self.next_hops(entry);
        let Some(entry) = self.table.get_mut(&prefix) else { return };
        if entry.next_hops != next_hops {
            entry.next_hops.clone_from(&next_hops);
            self.changes.insert(prefix, next_hops);
        }
        if entry.paths.is_empty() && !entry.originated {
            self.table.remove(&prefix);
        }
    }

    fn next_hops(&self, entry: &Entry) -> Vec<IpAddr> {
        if entry.originated {
            return Vec::new();
        }
        let accepted: Vec<&Path> = entry.paths.iter().filter(|path| path.rejection.is_none()).collect();
        if let [only] = accepted.as_slice() {
            return vec![only.next_hop];
        }
        let selection = self.select(&accepted);
        let mut next_hops: Vec<IpAddr> = selection.multipath.iter().map(|&index| accepted[index].next_hop).collect();
        next_hops.sort_unstable();
        next_hops.dedup();
        next_hops
    }

    fn select(&self, accepted: &[&Path]) -> Selection {
        let candidates: Vec<Candidate<'_>> = accepted
            .iter()
            .filter_map(|path| {
                let source = self.sources.get(&path.peer)?;
                Some(Candidate {
                    attributes: &path.attributes,
                    internal: source.policy.internal,
                    router_id: source.router_id,
                    peer: path.peer,
                })
            })
            .collect();
        bestpath::select(&candidates)
    }

    fn prefixes_of(&self, peer: IpAddr) -> Vec<IpNet> {
        let has = |entry: &Entry| entry.paths.iter().any(|path| path.peer == peer);
        self.table.iter().filter(|(_, entry)| has(entry)).map(|(prefix, _)| *prefix).collect()
    }

    /// The changes since the last call, one for each prefix, in the order of prefixes.
    pub fn take_changes(&mut self) -> Vec<RouteUpdate> {
        let changes = std::mem::take(&mut self.changes);
        changes.into_iter().map(|(prefix, next_hops)| RouteUpdate { prefix, next_hops }).collect()
    }

    /// True where [`Rib::take_changes`] has something.
    pub fn has_changes(&self) -> bool {
        !self.changes.is_empty()
    }

    /// Prefixes received from a peer, and those of them that were accepted.
    pub fn counts(&self, peer: IpAddr) -> (u64, u64) {
        self.sources.get(&peer).map_or((0, 0), |source| (source.received, source.accepted))
    }

    /// Every prefix with its paths' standing and whether we originate it.
    pub fn iter(&self) -> impl Iterator<Item = (&IpNet, bool, Vec<Standing<'_>>)> {
        self.table.iter().map(|(prefix, entry)| (prefix, entry.originated, self.standings(entry)))
    }

    fn standings<'a>(&'a self, entry: &'a Entry) -> Vec<Standing<'a>> {
        let accepted: Vec<&Path> = entry.paths.iter().filter(|path| path.rejection.is_none()).collect();
        let selection = self.select(&accepted);
        let mut position = 0;
        entry
            .paths
            .iter()
            .map(|path| {
                let internal = self.sources.get(&path.peer).is_some_and(|source| source.policy.internal);
                if path.rejection.is_some() {
                    return Standing { path, best: false, multipath: false, internal, reason: None };
                }
                let index = position;
                position += 1;
                if entry.originated {
                    return Standing { path, best: false, multipath: false, internal, reason: Some(Reason::Local) };
                }
                Standing {
                    path,
                    best: selection.best == Some(index),
                    multipath: selection.multipath.contains(&index),
                    internal,
                    reason: selection.reasons.get(index).copied().flatten(),
                }
            })
            .collect()
    }
}
