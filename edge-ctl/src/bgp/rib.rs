//! Adj-RIB-In of every peer and the Loc-RIB, in one table by prefix.
//!
//! Received paths are kept before policy, together with the reason why one is refused, so that a policy change is a
//! re-evaluation and "why is it not used" has an answer. A path takes part in selection while policy lets it in and its
//! next hop can be reached. Changes of the gateways are collected and coalesced until [`Rib::take_changes`].
//!
//! A full table is a million prefixes: what they have in common (attributes, gateways, peers) is shared, not copied.

mod path;
mod reach;
mod show;
mod stale;
mod table;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
    time::Duration,
};

use ipnet::IpNet;
use smallvec::SmallVec;

use self::{
    path::{Judged, Outcome, Paths},
    reach::Reach,
    table::{Prefixes, Table},
};
use super::{
    bestpath::{self, Candidate, Reason},
    policy::{self, Local, Policy, Rejection},
    wire::{Attributes, Community, Family, Nlri, Update},
};
use crate::model::RouteUpdate;

pub use path::Path;
pub use show::Standing;

/// At most so many changes are taken at a time, so that a full table never stands in memory twice.
const CHANGES: usize = 4096;

/// What an UPDATE says of its prefixes, shared by all of them.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Route {
    /// Its attributes.
    pub attributes: Attributes,
    /// Next hop.
    pub next_hop: IpAddr,
}

/// A peer that has, or had, a session.
#[derive(Clone, Debug)]
struct Source {
    peer: IpAddr,
    policy: Policy,
    router_id: Ipv4Addr,
    up: bool,
    received: u64,
    accepted: u64,
}

/// Where packets to a prefix go.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Hops {
    gateways: Vec<IpAddr>,
    internal: bool,
}

#[derive(Clone, Debug, Default)]
struct Entry {
    /// By source and path identifier.
    paths: Paths,
    /// What the last change said.
    installed: Option<Arc<Hops>>,
    /// We originate the prefix: our own path is preferred over any learnt one and needs no next hop.
    originated: bool,
}

/// All routes.
#[derive(Clone, Debug)]
pub struct Rib {
    local: Local,
    ids: BTreeMap<IpAddr, u32>,
    sources: Vec<Source>,
    table: Table<Entry>,
    routes: Interner,
    reach: Reach,
    originated: BTreeSet<IpNet>,
    changes: Prefixes,
    /// Prefixes whose best path may have changed; `None`: nobody is told.
    moved: Option<BTreeSet<IpNet>>,
}

/// The best path, for announcing it again.
#[derive(Clone, Copy, Debug)]
pub struct Best<'a> {
    /// The path after import policy.
    pub route: &'a Arc<Route>,
    /// Who it came from.
    pub peer: IpAddr,
    /// That peer is in our AS.
    pub internal: bool,
}

impl Rib {
    /// An empty table.
    pub fn new(local: Local) -> Self {
        Self {
            local,
            ids: BTreeMap::new(),
            sources: Vec::new(),
            table: Table::default(),
            routes: Interner::default(),
            reach: Reach::default(),
            originated: BTreeSet::new(),
            changes: Prefixes::default(),
            moved: None,
        }
    }

    /// A session came up. Paths kept from the last one stay stale until [`Rib::sweep`].
    pub fn peer_up(&mut self, peer: IpAddr, policy: Policy, router_id: Ipv4Addr) {
        match self.ids.get(&peer).map(|id| *id as usize) {
            Some(index) => {
                let source = &mut self.sources[index];
                let changed = source.policy != policy;
                source.policy = policy;
                source.router_id = router_id;
                source.up = true;
                if changed {
                    self.evaluate(peer);
                }
            }
            None => {
                let id = u32::try_from(self.sources.len()).unwrap_or(u32::MAX);
                self.ids.insert(peer, id);
                self.sources.push(Source { peer, policy, router_id, up: true, received: 0, accepted: 0 });
            }
        }
    }

    /// A session went down: its paths are gone at once.
    pub fn peer_down(&mut self, peer: IpAddr) {
        let Some(id) = self.id(peer) else { return };
        for prefix in self.prefixes_of(id) {
            self.edit(prefix, |entry| entry.paths.retain(|path| path.source != id));
        }
        let source = &mut self.sources[id as usize];
        (source.up, source.received, source.accepted) = (false, 0, 0);
        self.settle();
    }

    /// A session went down under graceful restart: its paths of these families stay, stale but valid (RFC 4724 4.2).
    pub fn peer_restarts(&mut self, peer: IpAddr, families: &BTreeSet<Family>) {
        let Some(id) = self.id(peer) else { return };
        self.sources[id as usize].up = false;
        for prefix in self.prefixes_of(id) {
            let keep = families.contains(&Family::of(&prefix));
            let gone = self.take(prefix, id, |path| {
                path.stale = true;
                keep
            });
            self.count_out(id, &gone);
        }
        self.settle();
    }

    /// Stale paths of a peer go: its End-of-RIB came, or its time is up. `None`: of all families.
    pub fn sweep(&mut self, peer: IpAddr, family: Option<Family>) {
        let Some(id) = self.id(peer) else { return };
        for prefix in self.prefixes_of(id) {
            if family.is_none_or(|family| family == Family::of(&prefix)) {
                let gone = self.take(prefix, id, |path| !path.stale);
                self.count_out(id, &gone);
            }
        }
        self.settle();
    }

    /// Keeps of a source's paths to `prefix` those that `keep` says; returns the others.
    fn take(&mut self, prefix: IpNet, id: u32, mut keep: impl FnMut(&mut Path) -> bool) -> Vec<Path> {
        let mut gone = Vec::new();
        self.edit(prefix, |entry| {
            entry.paths.retain(|path| {
                let keep = path.source != id || keep(path);
                if !keep {
                    gone.push(path.clone());
                }
                keep
            });
        });
        gone
    }

    fn count_out(&mut self, id: u32, gone: &[Path]) {
        let source = &mut self.sources[id as usize];
        source.received -= gone.len() as u64;
        source.accepted -= gone.iter().filter(|path| path.rejection().is_none()).count() as u64;
    }

    /// What makes us refuse a path has changed, our addresses aside: those that sessions have shown stay known.
    pub fn identify(&mut self, local: Local) {
        let connected = std::mem::take(&mut self.local.connected);
        let mut addresses = std::mem::take(&mut self.local.addresses);
        addresses.extend(local.addresses.iter().copied());
        let new = Local { addresses, connected, ..local };
        let before = std::mem::replace(&mut self.local, new);
        let same = (self.local.asn, self.local.router_id) == (before.asn, before.router_id)
            && self.local.pod_networks == before.pod_networks
            && self.local.vips == before.vips;
        if !same {
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
        if let Some(id) = self.id(peer) {
            self.sources[id as usize].policy = policy;
            self.evaluate(peer);
        }
    }

    /// From now on [`Rib::take_moved`] tells whose best path may have changed; or no longer.
    pub fn watch_best(&mut self, on: bool) {
        match (on, self.moved.is_some()) {
            (true, false) => self.moved = Some(self.table.iter().map(|(prefix, _)| prefix).collect()),
            (false, true) => self.moved = None,
            _ => {}
        }
    }

    fn id(&self, peer: IpAddr) -> Option<u32> {
        self.ids.get(&peer).copied()
    }

    fn evaluate_all(&mut self) {
        let peers: Vec<IpAddr> = self.ids.keys().copied().collect();
        peers.into_iter().for_each(|peer| self.evaluate(peer));
    }

    fn evaluate(&mut self, peer: IpAddr) {
        let Some(id) = self.id(peer) else { return };
        let policy = self.sources[id as usize].policy.clone();
        let mut accepted = 0;
        for prefix in self.prefixes_of(id) {
            let Some(entry) = self.table.get(&prefix) else { continue };
            let received: SmallVec<[Arc<Route>; 1]> =
                entry.paths.iter().filter(|path| path.source == id).map(|path| Arc::clone(&path.received)).collect();
            let judged: SmallVec<[Judged; 1]> =
                received.iter().map(|route| self.judge(peer, &policy, &prefix, route, &mut Vec::new())).collect();
            let rejected = |judged: &Judged| matches!(judged.as_deref(), Some(Outcome::Rejected(_)));
            accepted += judged.iter().filter(|judged| !rejected(judged)).count() as u64;
            judged.iter().for_each(|judged| self.track(judged, &received));
            self.edit(prefix, |entry| {
                let paths = entry.paths.as_mut_slice().iter_mut().filter(|path| path.source == id);
                paths.zip(judged).for_each(|(path, judged)| path.judged = judged);
            });
        }
        self.sources[id as usize].accepted = accepted;
        self.settle();
    }

    fn track(&mut self, judged: &Judged, received: &[Arc<Route>]) {
        let hops: SmallVec<[IpAddr; 1]> = match judged.as_deref() {
            Some(Outcome::Changed(route)) => SmallVec::from_slice(&[route.next_hop]),
            None => received.iter().map(|route| route.next_hop).collect(),
            Some(Outcome::Rejected(_)) => SmallVec::new(),
        };
        hops.into_iter().for_each(|hop| self.know(hop));
    }

    /// What policy says of a path; `changed` remembers what each term made of `route`.
    fn judge(
        &mut self,
        peer: IpAddr,
        policy: &Policy,
        prefix: &IpNet,
        route: &Arc<Route>,
        changed: &mut Vec<(Option<usize>, Arc<Route>)>,
    ) -> Judged {
        let permit = match policy.import(&self.local, prefix, &route.attributes, route.next_hop) {
            Ok(permit) => permit,
            Err(why) => return Some(Box::new(Outcome::Rejected(why))),
        };
        // RFC 8326 4.1: the sender is about to go; whoever else has the route is preferred.
        let leaves = !policy.internal && route.attributes.has_community(Community::GRACEFUL_SHUTDOWN);
        let mark = policy.mark_received(&route.attributes);
        if permit.changes.is_none() && !leaves && mark.is_none() {
            return None;
        }
        if let Some((_, known)) = changed.iter().find(|(term, _)| *term == permit.term) {
            return Some(Box::new(Outcome::Changed(Arc::clone(known))));
        }
        let mut new = Route::clone(route);
        if leaves {
            new.attributes.local_pref = Some(0);
        }
        new.attributes.only_to_customer = new.attributes.only_to_customer.or(mark);
        if let Some(changes) = permit.changes {
            policy::apply(changes, &mut new.attributes, &mut new.next_hop, peer, self.local.asn);
        }
        let new = self.routes.share(new);
        changed.push((permit.term, Arc::clone(&new)));
        Some(Box::new(Outcome::Changed(new)))
    }

    /// An UPDATE of an established peer. Where it announces towards one next hop, the route that it made of that, for
    /// [`Rib::repeat`].
    pub fn update(&mut self, peer: IpAddr, update: &Update, now: Duration) -> Option<Arc<Route>> {
        let id = self.id(peer).filter(|id| self.sources[*id as usize].up)?;
        for nlri in &update.withdrawn {
            self.withdraw(id, *nlri);
        }
        let mut made = None;
        for announcement in &update.announced {
            let route =
                self.routes.share(Route { attributes: update.attributes.clone(), next_hop: announcement.next_hop });
            self.announce(id, &route, &announcement.prefixes, now);
            made = Some(route);
        }
        self.settle();
        made.filter(|_| update.announced.len() == 1)
    }

    /// An UPDATE whose attributes are those of an earlier one of the same session, from which [`Rib::update`] made
    /// `route`.
    pub fn repeat(&mut self, peer: IpAddr, route: &Arc<Route>, withdrawn: &[Nlri], announced: &[Nlri], now: Duration) {
        let Some(id) = self.id(peer).filter(|id| self.sources[*id as usize].up) else { return };
        withdrawn.iter().for_each(|nlri| self.withdraw(id, *nlri));
        self.announce(id, route, announced, now);
        self.settle();
    }

    fn announce(&mut self, id: u32, route: &Arc<Route>, prefixes: &[Nlri], now: Duration) {
        let Source { peer, policy, .. } = self.sources[id as usize].clone();
        let learnt = u32::try_from(now.as_secs()).unwrap_or(u32::MAX);
        let mut changed = Vec::new();
        self.know(route.next_hop);
        for nlri in prefixes {
            let known = changed.len();
            let judged = self.judge(peer, &policy, &nlri.prefix, route, &mut changed);
            changed.get(known..).unwrap_or_default().iter().for_each(|(_, route)| self.know(route.next_hop));
            let path = Path { source: id, id: nlri.path, received: Arc::clone(route), judged, learnt, stale: false };
            self.put(nlri.prefix, path);
        }
    }

    fn put(&mut self, prefix: IpNet, mut path: Path) {
        let Self { table, sources, reach, .. } = self;
        let source = &mut sources[path.source as usize];
        source.received += 1;
        source.accepted += u64::from(path.rejection().is_none());
        let entry = table.at(prefix);
        if let Some(old) = entry.paths.iter().find(|old| old.key() == path.key()) {
            source.received -= 1;
            source.accepted -= u64::from(old.rejection().is_none());
            // Said again unchanged, a path keeps its age.
            if old.received == path.received {
                path.learnt = old.learnt;
            }
        }
        entry.paths.put(path);
        if decide(entry, sources, reach) {
            self.changes.insert(prefix);
            self.reach.route_changed(&prefix);
        }
        if let Some(moved) = &mut self.moved {
            moved.insert(prefix);
        }
    }

    fn withdraw(&mut self, id: u32, nlri: Nlri) {
        if self.table.get(&nlri.prefix).is_some() {
            let gone = self.take(nlri.prefix, id, |path| path.id != nlri.path);
            self.count_out(id, &gone);
        }
    }

    /// We originate these prefixes and no others.
    pub fn originate(&mut self, wanted: BTreeSet<IpNet>) {
        let before = std::mem::replace(&mut self.originated, wanted);
        let differ: Vec<IpNet> = before.symmetric_difference(&self.originated).copied().collect();
        for prefix in differ {
            let originated = self.originated.contains(&prefix);
            self.edit(prefix, |entry| entry.originated = originated);
        }
        self.settle();
    }

    fn edit(&mut self, prefix: IpNet, change: impl FnOnce(&mut Entry)) {
        change(self.table.at(prefix));
        self.decide(prefix);
    }

    fn decide(&mut self, prefix: IpNet) {
        if self.table.get(&prefix).is_none() {
            return;
        }
        let entry = self.table.at(prefix);
        let empty = entry.paths.is_empty() && !entry.originated;
        let changed = decide(entry, &self.sources, &self.reach);
        if let Some(moved) = &mut self.moved {
            moved.insert(prefix);
        }
        if changed {
            self.changes.insert(prefix);
            self.reach.route_changed(&prefix);
        }
        if empty {
            self.table.remove(&prefix);
        }
    }

    fn usable(&self, path: &Path) -> bool {
        usable(path, &self.reach)
    }

    fn candidates<'a>(&'a self, usable: &[&'a Path]) -> Vec<Candidate<'a>> {
        candidates(usable, &self.sources, &self.reach)
    }

    fn prefixes_of(&self, id: u32) -> Vec<IpNet> {
        let has = |entry: &Entry| entry.paths.iter().any(|path| path.source == id);
        self.table.iter().filter(|(_, entry)| has(entry)).map(|(prefix, _)| prefix).collect()
    }

    /// The changes since the last call, one for each prefix, in the order of prefixes; a part of them where there are
    /// very many.
    pub fn take_changes(&mut self) -> Vec<RouteUpdate> {
        let mut list = Vec::new();
        while list.len() < CHANGES
            && let Some(prefix) = self.changes.pop_first()
        {
            let hops = self.table.get(&prefix).and_then(|entry| entry.installed.as_ref());
            let next_hops = hops.map(|hops| hops.gateways.clone()).unwrap_or_default();
            let internal = hops.is_some_and(|hops| hops.internal);
            list.push(RouteUpdate { prefix, next_hops, internal });
        }
        list
    }

    /// True where [`Rib::take_changes`] has something.
    pub fn has_changes(&self) -> bool {
        !self.changes.is_empty()
    }

    /// Prefixes whose best path may have changed since the last call, where [`Rib::watch_best`] asked for them.
    pub fn take_moved(&mut self) -> BTreeSet<IpNet> {
        self.moved.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// The best learnt path to `prefix`; `None` where we originate it ourselves.
    pub fn best(&self, prefix: &IpNet) -> Option<Best<'_>> {
        let entry = self.table.get(prefix).filter(|entry| !entry.originated)?;
        let usable: SmallVec<[&Path; 4]> = entry.paths.iter().filter(|path| self.usable(path)).collect();
        let best = *usable.get(bestpath::select(&self.candidates(&usable)).best?)?;
        let source = &self.sources[best.source as usize];
        Some(Best { route: best.used(), peer: source.peer, internal: source.policy.internal })
    }

    /// Every prefix with a learnt path.
    pub fn prefixes(&self) -> impl Iterator<Item = IpNet> {
        self.table.iter().filter(|(_, entry)| !entry.paths.is_empty()).map(|(prefix, _)| prefix)
    }

    /// Prefixes received from a peer, and those of them that were accepted.
    pub fn counts(&self, peer: IpAddr) -> (u64, u64) {
        let source = self.id(peer).map(|id| &self.sources[id as usize]);
        source.map_or((0, 0), |source| (source.received, source.accepted))
    }

    /// What makes us refuse paths.
    pub const fn local(&self) -> &Local {
        &self.local
    }
}

/// Brings what an entry says up to date; true where that is another thing now.
fn decide(entry: &mut Entry, sources: &[Source], reach: &Reach) -> bool {
    let hops = hops(entry, sources, reach);
    let changed = entry.installed != hops;
    if changed {
        entry.installed = hops;
    }
    changed
}

fn hops(entry: &Entry, sources: &[Source], reach: &Reach) -> Option<Arc<Hops>> {
    if entry.originated {
        return None;
    }
    let internal = |path: &Path| sources[path.source as usize].policy.internal;
    // Almost every prefix of a full table has a path by itself.
    if let Paths::One(only) = &entry.paths {
        return only.rejection().is_none().then(|| reach.alone(only.used().next_hop, internal(only))).flatten();
    }
    let usable: SmallVec<[&Path; 4]> = entry.paths.iter().filter(|path| usable(path, reach)).collect();
    match usable.as_slice() {
        [] => None,
        [only] => reach.alone(only.used().next_hop, internal(only)),
        several => {
            let selection = bestpath::select(&candidates(several, sources, reach));
            let chosen = || selection.multipath.iter().map(|&index| several[index]);
            let mut gateways: Vec<IpAddr> = chosen().flat_map(|path| reach.gateways(path.used().next_hop)).collect();
            gateways.sort_unstable();
            gateways.dedup();
            let internal = chosen().next().is_some_and(internal);
            Some(Arc::new(Hops { gateways, internal }))
        }
    }
}

fn usable(path: &Path, reach: &Reach) -> bool {
    path.rejection().is_none() && reach.reachable(path.used().next_hop)
}

fn candidates<'a>(usable: &[&'a Path], sources: &[Source], reach: &Reach) -> Vec<Candidate<'a>> {
    let candidate = |path: &&'a Path| {
        let source = &sources[path.source as usize];
        Candidate {
            attributes: &path.used().attributes,
            internal: source.policy.internal,
            router_id: source.router_id,
            peer: source.peer,
            cost: reach.cost(path.used().next_hop),
            path: path.id,
        }
    };
    usable.iter().map(candidate).collect()
}

/// Routes by content, so that the same attributes in many UPDATEs are kept once.
#[derive(Clone, Debug, Default)]
struct Interner {
    known: HashSet<Arc<Route>>,
    clean_at: usize,
}

impl Interner {
    fn share(&mut self, route: Route) -> Arc<Route> {
        if let Some(known) = self.known.get(&route) {
            return Arc::clone(known);
        }
        if self.known.len() >= self.clean_at {
            self.known.retain(|route| Arc::strong_count(route) > 1);
            self.clean_at = (self.known.len() * 2).max(1024);
        }
        let route = Arc::new(route);
        self.known.insert(Arc::clone(&route));
        route
    }
}
