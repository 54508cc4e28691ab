//! Adj-RIB-In of every peer and the Loc-RIB, in one table by prefix.
//!
//! Received paths are kept before policy, together with the reason why one is refused, so that a policy change is a
//! re-evaluation and "why is it not used" has an answer. Changes of the next hops are collected and coalesced until
//! [`Rib::take_changes`].

mod stale;

use std::{
    collections::{BTreeMap, BTreeSet},
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

pub use stale::Staleness;

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
    /// Whether the peer still stands by it.
    pub stale: Staleness,
}

/// A peer whose session is established, or whose paths are kept until it is back.
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
    originated: BTreeSet<IpNet>,
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
        Self {
            local,
            sources: BTreeMap::new(),
            table: BTreeMap::new(),
            originated: BTreeSet::new(),
            changes: BTreeMap::new(),
        }
    }

    /// A session came up. Paths kept from the one before stay.
    pub fn peer_up(&mut self, peer: IpAddr, policy: Policy, router_id: Ipv4Addr) {
        let (received, accepted) = self.counts(peer);
        self.sources.insert(peer, Source { policy, router_id, received, accepted });
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
                let attributes = Arc::clone(&attributes);
                let path = Path { peer, attributes, next_hop, learnt: now, rejection, stale: Staleness::Fresh };
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

    /// We originate these prefixes and no others.
    pub fn originate(&mut self, wanted: BTreeSet<IpNet>) {
        let before = std::mem::replace(&mut self.originated, wanted);
        for prefix in before.symmetric_difference(&self.originated.clone()) {
            let originated = self.originated.contains(prefix);
            self.edit(*prefix, |entry| entry.originated = originated);
        }
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
        let accepted = stale::usable(&entry.paths);
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

    /// Every prefix that a peer has announced, with the standing of its path.
    pub fn received(&self, peer: IpAddr) -> impl Iterator<Item = (&IpNet, Standing<'_>)> {
        let of_peer = move |standing: &Standing<'_>| standing.path.peer == peer;
        self.table
            .iter()
            .filter(move |(_, entry)| entry.paths.iter().any(|path| path.peer == peer))
            .filter_map(move |(prefix, entry)| Some((prefix, self.standings(entry).into_iter().find(of_peer)?)))
    }

    /// Every prefix with its paths' standing and whether we originate it.
    pub fn iter(&self) -> impl Iterator<Item = (&IpNet, bool, Vec<Standing<'_>>)> {
        self.table.iter().map(|(prefix, entry)| (prefix, entry.originated, self.standings(entry)))
    }

    fn standings<'a>(&'a self, entry: &'a Entry) -> Vec<Standing<'a>> {
        let accepted = stale::usable(&entry.paths);
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
                if !accepted.iter().any(|usable| std::ptr::eq(*usable, path)) {
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{
        super::wire::{Announcement, AsPath, Segment},
        *,
    };
    use crate::config::valid::PrefixRule;

    const NOW: Duration = Duration::from_secs(1);

    fn address(host: u8) -> IpAddr {
        IpAddr::from([172, 16, 1, host])
    }

    /// Internal peers 172.16.1.HOST, established.
    fn rib(hosts: &[u8]) -> Rib {
        let local = Local { asn: 64512, router_id: Ipv4Addr::new(172, 16, 1, 88), addresses: [address(88)].into() };
        let mut rib = Rib::new(local);
        for host in hosts {
            let policy = Policy { internal: true, ..Policy::default() };
            rib.peer_up(address(*host), policy, Ipv4Addr::new(172, 16, 1, *host));
        }
        rib
    }

    fn announce(prefixes: &[&str], next_hop: IpAddr) -> Update {
        announce_with(prefixes, next_hop, Attributes::default())
    }

    fn announce_with(prefixes: &[&str], next_hop: IpAddr, attributes: Attributes) -> Update {
        let prefixes = prefixes.iter().map(|prefix| prefix.parse().unwrap()).collect();
        Update { announced: vec![Announcement { next_hop, prefixes }], attributes, ..Update::default() }
    }

    fn withdraw(prefixes: &[&str]) -> Update {
        Update { withdrawn: prefixes.iter().map(|prefix| prefix.parse().unwrap()).collect(), ..Update::default() }
    }

    fn change(prefix: &str, hosts: &[u8]) -> RouteUpdate {
        RouteUpdate { prefix: prefix.parse().unwrap(), next_hops: hosts.iter().map(|host| address(*host)).collect() }
    }

    #[test]
    fn a_withdrawal_says_that_the_prefix_is_gone_and_leaves_no_entry() {
        let mut rib = rib(&[80]);
        rib.update(address(80), &announce(&["10.1.0.0/24"], address(80)), NOW);
        assert_eq!(rib.take_changes(), [change("10.1.0.0/24", &[80])]);
        rib.update(address(80), &withdraw(&["10.1.0.0/24", "10.9.0.0/24"]), NOW);
        assert_eq!(rib.take_changes(), [change("10.1.0.0/24", &[])]);
        assert_eq!(rib.iter().count(), 0);
        assert_eq!(rib.counts(address(80)), (0, 0));
    }

    #[test]
    fn equal_paths_share_the_load_sorted_and_without_duplicates() {
        let mut rib = rib(&[82, 81, 80]);
        rib.update(address(82), &announce(&["10.1.0.0/24"], address(82)), NOW);
        rib.update(address(81), &announce(&["10.1.0.0/24"], address(81)), NOW);
        rib.update(address(80), &announce(&["10.1.0.0/24"], address(82)), NOW);
        assert_eq!(rib.take_changes(), [change("10.1.0.0/24", &[81, 82])]);
    }

    #[test]
    fn a_session_that_goes_down_takes_its_paths_and_leaves_the_others() {
        let mut rib = rib(&[80, 81]);
        rib.update(address(80), &announce(&["10.1.0.0/24", "10.1.1.0/24"], address(80)), NOW);
        rib.update(address(81), &announce(&["10.1.0.0/24"], address(81)), NOW);
        rib.take_changes();
        rib.peer_down(address(80));
        assert_eq!(rib.take_changes(), [change("10.1.0.0/24", &[81]), change("10.1.1.0/24", &[])]);
        assert_eq!(rib.counts(address(80)), (0, 0));
        rib.peer_down(address(80));
        assert!(!rib.has_changes());
    }

    #[test]
    fn a_better_path_replaces_the_group_and_its_loss_restores_it() {
        let mut rib = rib(&[80, 81]);
        rib.update(address(80), &announce(&["10.1.0.0/24"], address(80)), NOW);
        let preferred = Attributes { local_pref: Some(200), ..Attributes::default() };
        rib.update(address(81), &announce_with(&["10.1.0.0/24"], address(81), preferred), NOW);
        assert_eq!(rib.take_changes(), [change("10.1.0.0/24", &[81])]);
        rib.update(address(81), &withdraw(&["10.1.0.0/24"]), NOW);
        assert_eq!(rib.take_changes(), [change("10.1.0.0/24", &[80])]);
    }

    #[test]
    fn the_same_announcement_again_changes_nothing() {
        let mut rib = rib(&[80]);
        let update = announce(&["10.1.0.0/24"], address(80));
        rib.update(address(80), &update, NOW);
        rib.take_changes();
        rib.update(address(80), &update, NOW);
        assert!(!rib.has_changes());
        assert_eq!(rib.counts(address(80)), (1, 1));
    }

    #[test]
    fn a_prefix_both_withdrawn_and_announced_is_announced() {
        let mut rib = rib(&[80]);
        let update =
            Update { withdrawn: withdraw(&["10.1.0.0/24"]).withdrawn, ..announce(&["10.1.0.0/24"], address(80)) };
        rib.update(address(80), &update, NOW);
        assert_eq!(rib.take_changes(), [change("10.1.0.0/24", &[80])]);
    }

    #[test]
    fn a_refused_path_is_kept_with_its_reason_and_replaces_the_accepted_one() {
        let mut rib = rib(&[80]);
        rib.update(address(80), &announce(&["10.1.0.0/24"], address(80)), NOW);
        rib.take_changes();
        let looped = Attributes { as_path: AsPath(vec![Segment::Sequence(vec![64512])]), ..Attributes::default() };
        rib.update(address(80), &announce_with(&["10.1.0.0/24"], address(80), looped), NOW);
        assert_eq!(rib.take_changes(), [change("10.1.0.0/24", &[])]);
        let (_, _, standings) = rib.iter().next().unwrap();
        assert_eq!(standings[0].path.rejection, Some(Rejection::OwnAs(64512)));
        assert_eq!(rib.counts(address(80)), (1, 0));
    }

    #[test]
    fn a_changed_policy_is_applied_to_what_was_received() {
        let mut rib = rib(&[80]);
        rib.update(address(80), &announce(&["10.1.0.0/24", "10.2.0.0/24"], address(80)), NOW);
        rib.take_changes();
        let only = PrefixRule { prefix: "10.1.0.0/16".parse().unwrap(), min_length: 16, max_length: 32 };
        let policy = Policy { internal: true, import: Some(vec![only]), export: None };
        rib.set_policy(address(80), policy);
        assert_eq!(rib.take_changes(), [change("10.2.0.0/24", &[])]);
        assert_eq!(rib.counts(address(80)), (2, 1));
        rib.set_policy(address(80), Policy { internal: true, ..Policy::default() });
        assert_eq!(rib.take_changes(), [change("10.2.0.0/24", &[80])]);
    }

    #[test]
    fn an_address_that_turns_out_to_be_ours_is_no_next_hop_any_more() {
        let mut rib = rib(&[80]);
        rib.update(address(80), &announce(&["10.1.0.0/24"], address(99)), NOW);
        rib.take_changes();
        rib.local_address(address(99));
        assert_eq!(rib.take_changes(), [change("10.1.0.0/24", &[])]);
    }

    #[test]
    fn a_prefix_of_our_own_needs_no_route_even_where_a_peer_offers_one() {
        let mut rib = rib(&[80]);
        rib.originate(["10.9.0.1/32".parse().unwrap()].into());
        rib.update(address(80), &announce(&["10.9.0.1/32"], address(80)), NOW);
        assert!(!rib.has_changes());
        let (_, own, standings) = rib.iter().next().unwrap();
        assert!(own);
        assert_eq!(standings[0].reason, Some(Reason::Local));
        drop(standings);
        rib.originate(BTreeSet::new());
        assert_eq!(rib.take_changes(), [change("10.9.0.1/32", &[80])]);
    }

    #[test]
    fn updates_of_a_peer_that_is_not_up_are_ignored() {
        let mut rib = rib(&[]);
        rib.update(address(80), &announce(&["10.1.0.0/24"], address(80)), NOW);
        assert!(!rib.has_changes());
        assert_eq!(rib.iter().count(), 0);
    }

    #[test]
    fn standings_name_the_best_its_equals_and_why_the_rest_lost() {
        let mut rib = rib(&[80, 81, 82, 83]);
        rib.update(address(80), &announce(&["10.1.0.0/24"], address(88)), NOW);
        rib.update(address(81), &announce(&["10.1.0.0/24"], address(81)), NOW);
        rib.update(address(82), &announce(&["10.1.0.0/24"], address(82)), NOW);
        let worse = Attributes { local_pref: Some(50), ..Attributes::default() };
        rib.update(address(83), &announce_with(&["10.1.0.0/24"], address(83), worse), NOW);
        let (_, _, standings) = rib.iter().next().unwrap();
        let shown: Vec<_> = standings.iter().map(|s| (s.best, s.multipath, s.reason)).collect();
        let router_id = Reason::RouterId(Ipv4Addr::new(172, 16, 1, 81));
        assert_eq!(
            shown,
            [
                (false, false, None),
                (true, true, None),
                (false, true, Some(router_id)),
                (false, false, Some(Reason::LocalPref(100)))
            ]
        );
        assert_eq!(standings[0].path.rejection, Some(Rejection::OwnNextHop(address(88))));
    }

    /// What may happen to the RIB in the property below.
    #[derive(Clone, Debug)]
    enum Step {
        Announce { peer: u8, prefix: u8, hop: u8, local_pref: u32 },
        Withdraw { peer: u8, prefix: u8 },
        Down { peer: u8 },
    }

    fn steps() -> impl Strategy<Value = Step> {
        let (peer, prefix) = (80u8..84, 0u8..4);
        prop_oneof![
            4 => (peer.clone(), prefix.clone(), 90u8..93, 100u32..102)
                .prop_map(|(peer, prefix, hop, local_pref)| Step::Announce { peer, prefix, hop, local_pref }),
            2 => (peer.clone(), prefix).prop_map(|(peer, prefix)| Step::Withdraw { peer, prefix }),
            1 => peer.prop_map(|peer| Step::Down { peer }),
        ]
    }

    proptest! {
        #[test]
        fn the_changes_added_up_are_always_the_next_hops_of_the_best_paths(
            list in prop::collection::vec(steps(), 1..60),
            take_every in 1usize..5,
        ) {
            let mut rib = rib(&[80, 81, 82, 83]);
            let mut paths: BTreeMap<(String, u8), (u8, u32)> = BTreeMap::new();
            let mut installed = crate::model::RouteSet::default();
            for (number, step) in list.into_iter().enumerate() {
                match step {
                    Step::Announce { peer, prefix, hop, local_pref } => {
                        let prefix = format!("10.{prefix}.0.0/16");
                        let attributes = Attributes { local_pref: Some(local_pref), ..Attributes::default() };
                        rib.update(address(peer), &announce_with(&[&prefix], address(hop), attributes), NOW);
                        paths.insert((prefix, peer), (hop, local_pref));
                    }
                    Step::Withdraw { peer, prefix } => {
                        let prefix = format!("10.{prefix}.0.0/16");
                        rib.update(address(peer), &withdraw(&[&prefix]), NOW);
                        paths.remove(&(prefix, peer));
                    }
                    Step::Down { peer } => {
                        rib.peer_down(address(peer));
                        let policy = Policy { internal: true, ..Policy::default() };
                        rib.peer_up(address(peer), policy, Ipv4Addr::new(172, 16, 1, peer));
                        paths.retain(|(_, from), _| *from != peer);
                    }
                }
                if number % take_every == 0 {
                    rib.take_changes().into_iter().for_each(|change| {
                        installed.apply(change);
                    });
                }
            }
            rib.take_changes().into_iter().for_each(|change| {
                        installed.apply(change);
                    });
            let mut expected = crate::model::RouteSet::default();
            for prefix in (0..4).map(|number| format!("10.{number}.0.0/16")) {
                let of: Vec<_> = paths.iter().filter(|((p, _), _)| *p == prefix).map(|(_, path)| *path).collect();
                let best = of.iter().map(|(_, local_pref)| *local_pref).max();
                let hops: std::collections::BTreeSet<u8> =
                    of.iter().filter(|(_, local_pref)| Some(*local_pref) == best).map(|(hop, _)| *hop).collect();
                expected.apply(change(&prefix, &hops.into_iter().collect::<Vec<_>>()));
            }
            prop_assert_eq!(&installed, &expected);
            for peer in 80..84 {
                let count = paths.keys().filter(|(_, from)| *from == peer).count() as u64;
                prop_assert_eq!(rib.counts(address(peer)), (count, count));
            }
        }
    }
}
