//! Paths of a peer that is away, or is telling its table anew: they count until it, or a timer, says otherwise.

use std::{net::IpAddr, sync::Arc};

use ipnet::IpNet;

use super::{Rib, Route};
use crate::{bgp::wire::Family, model::Community};

impl Rib {
    /// What the peer has taught us of a family is stale from now on: it counts as before (RFC 4724 4.2, RFC 7313 4).
    pub fn mark_stale(&mut self, peer: IpAddr, family: Family) {
        let Some(id) = self.id(peer) else { return };
        for prefix in self.of_family(id, family) {
            self.take(prefix, id, |path| {
                path.stale = true;
                true
            });
        }
        self.settle();
    }

    /// What is stale of a family is long-lived stale from now on (RFC 9494 4.3): selection takes it only where there is
    /// no other path. Paths that forbid that go.
    pub fn degrade_stale(&mut self, peer: IpAddr, family: Family) {
        let Some(id) = self.id(peer) else { return };
        for prefix in self.of_family(id, family) {
            let gone = self
                .take(prefix, id, |path| !path.stale || !path.received.attributes.has_community(Community::NO_LLGR));
            self.count_out(id, &gone);
            let Some(entry) = self.table.get(&prefix) else { continue };
            let stale = entry.paths.iter().filter(|path| path.source == id && path.stale);
            let before: Vec<(u32, Arc<Route>)> = stale.map(|path| (path.id, Arc::clone(&path.received))).collect();
            for (number, route) in before {
                let mut marked = Route::clone(&route);
                marked.attributes.communities.push(Community::LLGR_STALE_VALUE);
                let marked = self.routes.share(marked);
                self.take(prefix, id, |path| {
                    if path.id == number {
                        path.received = Arc::clone(&marked);
                    }
                    true
                });
            }
        }
        // Policy may have copied what was received.
        self.evaluate(peer);
    }

    /// What is still stale of a family goes.
    pub fn sweep_stale(&mut self, peer: IpAddr, family: Family) {
        self.sweep(peer, Some(family));
    }

    /// Everything of a family goes.
    pub fn withdraw_family(&mut self, peer: IpAddr, family: Family) {
        let Some(id) = self.id(peer) else { return };
        for prefix in self.of_family(id, family) {
            let gone = self.take(prefix, id, |_| false);
            self.count_out(id, &gone);
        }
        self.settle();
    }

    /// Paths of a peer that are stale.
    pub fn stale_count(&self, peer: IpAddr) -> u64 {
        let Some(id) = self.id(peer) else { return 0 };
        let stale =
            |entry: &super::Entry| entry.paths.iter().filter(|path| path.source == id && path.stale).count() as u64;
        self.table.iter().map(|(_, entry)| stale(entry)).sum()
    }

    fn of_family(&self, id: u32, family: Family) -> Vec<IpNet> {
        let mut prefixes = self.prefixes_of(id);
        prefixes.retain(|prefix| Family::of(prefix) == family);
        prefixes
    }
}

#[cfg(test)]
mod tests {
    use std::{net::Ipv4Addr, time::Duration};

    use super::*;
    use crate::bgp::{
        policy::{Local, Policy},
        wire::{Announcement, Attributes, Nlri, Update},
    };

    const A: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 2));
    const B: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 3));

    fn up(rib: &mut Rib, peer: IpAddr) {
        rib.peer_up(peer, Policy { internal: true, ..Policy::default() }, Ipv4Addr::new(10, 0, 0, 9));
    }

    fn rib() -> Rib {
        let local = Local { asn: 64512, router_id: Some(Ipv4Addr::new(10, 0, 0, 1)), ..Local::default() };
        let mut rib = Rib::new(local);
        [A, B].into_iter().for_each(|peer| up(&mut rib, peer));
        rib
    }

    fn announce(rib: &mut Rib, peer: IpAddr, communities: Vec<u32>) {
        let local_pref = Some(if peer == A { 200 } else { 100 });
        let attributes = Attributes { local_pref, communities, ..Attributes::default() };
        let prefixes = vec![Nlri::from("10.1.2.0/26".parse::<IpNet>().unwrap())];
        let announced = vec![Announcement { next_hop: peer, prefixes }];
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
        up(&mut rib, A);
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
        assert_eq!(rib.counts(A), (1, 1));
        rib.peer_down(B);
        assert_eq!(next_hops(&mut rib), Some(vec![A]));
    }

    #[test]
    fn a_path_that_forbids_it_does_not_become_long_lived_stale() {
        let mut rib = rib();
        announce(&mut rib, A, vec![0xffff_0007]);
        assert_eq!(next_hops(&mut rib), Some(vec![A]));
        rib.mark_stale(A, Family::Ipv4);
        rib.degrade_stale(A, Family::Ipv4);
        assert_eq!((next_hops(&mut rib), rib.counts(A)), (Some(vec![]), (0, 0)));
    }
}
