//! Paths of a peer that is away, or is telling its table anew: they count until it, or a timer, says otherwise.

use std::{net::IpAddr, sync::Arc};

use ipnet::IpNet;

use super::{Path, Rib};
use crate::bgp::wire::Family;

/// LLGR_STALE: the path is long-lived stale (RFC 9494 4.2).
const LLGR_STALE: u32 = 0xffff_0006;
/// NO_LLGR: the path must not become so.
const NO_LLGR: u32 = 0xffff_0007;

/// Whether a peer still stands by a path.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Staleness {
    /// It does.
    #[default]
    Fresh,
    /// It has not said so again since it restarted or began a refresh (RFC 4724 4.2, RFC 7313 4): counts as before.
    Stale,
    /// It has been away for longer than its restart time (RFC 9494 4.3): counts where there is no other path.
    LongLived,
}

impl Rib {
    /// What the peer has taught us of a family is stale from now on.
    pub fn mark_stale(&mut self, peer: IpAddr, family: Family) {
        self.each_path(peer, family, |path| path.stale = Staleness::Stale);
    }

    /// What is stale of a family is long-lived stale from now on, or gone where the path forbids that.
    pub fn degrade_stale(&mut self, peer: IpAddr, family: Family) {
        self.remove_where(peer, family, |path| {
            path.stale != Staleness::Fresh && path.attributes.communities.contains(&NO_LLGR)
        });
        self.each_path(peer, family, |path| {
            if path.stale != Staleness::Fresh {
                path.stale = Staleness::LongLived;
                Arc::make_mut(&mut path.attributes).communities.push(LLGR_STALE);
            }
        });
    }

    /// What is still stale of a family goes.
    pub fn sweep_stale(&mut self, peer: IpAddr, family: Family) {
        self.remove_where(peer, family, |path| path.stale != Staleness::Fresh);
    }

    /// Everything of a family goes.
    pub fn withdraw_family(&mut self, peer: IpAddr, family: Family) {
        self.remove_where(peer, family, |_| true);
    }

    /// Paths of a peer that are stale.
    pub fn stale_count(&self, peer: IpAddr) -> u64 {
        let paths = self.table.values().flat_map(|entry| &entry.paths);
        paths.filter(|path| path.peer == peer && path.stale != Staleness::Fresh).count() as u64
    }

    fn each_path(&mut self, peer: IpAddr, family: Family, change: impl Fn(&mut Path)) {
        for prefix in self.of_family(peer, family) {
            self.edit(prefix, |entry| entry.paths.iter_mut().filter(|path| path.peer == peer).for_each(&change));
        }
    }

    fn remove_where(&mut self, peer: IpAddr, family: Family, goes: impl Fn(&Path) -> bool) {
        let (mut received, mut accepted) = (0, 0);
        for prefix in self.of_family(peer, family) {
            self.edit(prefix, |entry| {
                entry.paths.retain(|path| {
                    let removed = path.peer == peer && goes(path);
                    received += u64::from(removed);
                    accepted += u64::from(removed && path.rejection.is_none());
                    !removed
                });
            });
        }
        if let Some(source) = self.sources.get_mut(&peer) {
            source.received = source.received.saturating_sub(received);
            source.accepted = source.accepted.saturating_sub(accepted);
        }
    }

    fn of_family(&self, peer: IpAddr, family: Family) -> Vec<IpNet> {
        let mut prefixes = self.prefixes_of(peer);
        prefixes.retain(|prefix| Family::of(prefix) == family);
        prefixes
    }
}

/// Paths that take part in route selection: accepted, and long-lived stale ones only where there is nothing better.
pub(super) fn usable(paths: &[Path]) -> Vec<&Path> {
    let accepted = || paths.iter().filter(|path| path.rejection.is_none());
    let better: Vec<&Path> = accepted().filter(|path| path.stale != Staleness::LongLived).collect();
    if better.is_empty() { accepted().collect() } else { better }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::bgp::{
        policy::{Local, Policy},
        wire::{Announcement, AsPath, Attributes, Origin, Update},
    };

    const A: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 2));
    const B: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 3));
    const PREFIX: &str = "10.1.2.0/26";

    fn rib() -> Rib {
        let local = Local { asn: 64512, router_id: [10, 0, 0, 1].into(), addresses: [].into() };
        let mut rib = Rib::new(local);
        for peer in [A, B] {
            let policy = Policy { internal: true, ..Policy::default() };
            rib.peer_up(peer, policy, [10, 0, 0, 9].into());
        }
        rib
    }

    fn announce(rib: &mut Rib, peer: IpAddr, communities: Vec<u32>) {
        let attributes = Attributes {
            origin: Origin::Igp,
            as_path: AsPath::default(),
            local_pref: Some(if peer == A { 200 } else { 100 }),
            communities,
            ..Attributes::default()
        };
        let announced = vec![Announcement { next_hop: peer, prefixes: vec![PREFIX.parse().unwrap()] }];
        rib.update(peer, &Update { announced, attributes, ..Update::default() }, Duration::ZERO);
    }

    fn next_hops(rib: &mut Rib) -> Option<Vec<IpAddr>> {
        rib.take_changes().pop().map(|change| change.next_hops)
    }

    #[test]
    fn a_stale_path_counts_as_before_and_goes_with_the_sweep_unless_it_was_said_again() {
        let mut rib = rib();
        announce(&mut rib, A, vec![]);
        assert_eq!(next_hops(&mut rib), Some(vec![A]));
        rib.mark_stale(A, Family::Ipv4);
        assert_eq!((next_hops(&mut rib), rib.stale_count(A), rib.counts(A)), (None, 1, (1, 1)));
        rib.sweep_stale(A, Family::Ipv6);
        assert_eq!(rib.stale_count(A), 1, "another family");
        announce(&mut rib, A, vec![]);
        rib.sweep_stale(A, Family::Ipv4);
        assert_eq!((next_hops(&mut rib), rib.counts(A)), (None, (1, 1)));
        rib.mark_stale(A, Family::Ipv4);
        rib.sweep_stale(A, Family::Ipv4);
        assert_eq!((next_hops(&mut rib), rib.counts(A)), (Some(vec![]), (0, 0)));
    }

    #[test]
    fn a_session_that_comes_back_finds_its_paths_counted() {
        let mut rib = rib();
        announce(&mut rib, A, vec![]);
        rib.mark_stale(A, Family::Ipv4);
        rib.peer_up(A, Policy { internal: true, ..Policy::default() }, [10, 0, 0, 9].into());
        assert_eq!(rib.counts(A), (1, 1));
        rib.withdraw_family(A, Family::Ipv4);
        assert_eq!(rib.counts(A), (0, 0));
    }

    #[test]
    fn a_long_lived_stale_path_counts_only_where_there_is_no_other() {
        let mut rib = rib();
        announce(&mut rib, A, vec![]);
        announce(&mut rib, B, vec![]);
        assert_eq!(next_hops(&mut rib), Some(vec![A]), "A is preferred");
        rib.mark_stale(A, Family::Ipv4);
        rib.degrade_stale(A, Family::Ipv4);
        assert_eq!(next_hops(&mut rib), Some(vec![B]));
        assert!(rib.received(A).any(|(_, standing)| standing.path.attributes.communities == [LLGR_STALE]));
        rib.peer_down(B);
        assert_eq!(next_hops(&mut rib), Some(vec![A]));
    }

    #[test]
    fn a_path_that_forbids_it_does_not_become_long_lived_stale() {
        let mut rib = rib();
        announce(&mut rib, A, vec![NO_LLGR]);
        assert_eq!(next_hops(&mut rib), Some(vec![A]));
        rib.mark_stale(A, Family::Ipv4);
        rib.degrade_stale(A, Family::Ipv4);
        assert_eq!(next_hops(&mut rib), Some(vec![]));
    }
}
