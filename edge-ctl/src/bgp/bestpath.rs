//! Route selection (RFC 4271 9.1.2) as successive filters over the candidates of one prefix.
//!
//! Everything before the router id also decides what may share the load: the candidates that are left then are
//! equal-cost paths. They may differ in the AS path's content as long as its length is the same (what FRR calls
//! `as-path multipath-relax`), since nodes with an AS of their own each are the common case at this edge.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr},
};

use super::wire::{Attributes, Origin};

/// A candidate.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    /// Its attributes.
    pub attributes: &'a Attributes,
    /// Learnt inside our AS.
    pub internal: bool,
    /// BGP identifier of the peer.
    pub router_id: Ipv4Addr,
    /// Address of the peer.
    pub peer: IpAddr,
}

impl Candidate<'_> {
    fn local_pref(&self) -> u32 {
        self.attributes.local_pref.unwrap_or(100)
    }

    /// A missing MED is the best one (RFC 4271 9.1.2.2 c).
    fn med(&self) -> u32 {
        self.attributes.med.unwrap_or(0)
    }

    /// RFC 4456 9: a reflected route counts as its originator's.
    fn originator(&self) -> Ipv4Addr {
        self.attributes.originator_id.unwrap_or(self.router_id)
    }
}

/// Why a candidate is not the best.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// We originate the prefix ourselves.
    Local,
    /// Lower LOCAL_PREF than the best.
    LocalPref(u32),
    /// Longer AS path than the best.
    AsPath(usize),
    /// Worse ORIGIN than the best.
    Origin(Origin),
    /// Higher MED than another path from the same neighbouring AS.
    Med(u32),
    /// Internal, and an external path exists.
    Internal,
    /// Equal cost; its router id is higher.
    RouterId(Ipv4Addr),
    /// Equal cost; it passed more route reflectors.
    ClusterList,
    /// Equal cost; its peer's address is higher.
    PeerAddress,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local => f.write_str("we originate this prefix"),
            Self::LocalPref(best) => write!(f, "lower local preference (best has {best})"),
            Self::AsPath(best) => write!(f, "longer AS path (best has {best})"),
            Self::Origin(best) => write!(f, "worse origin (best has {best})"),
            Self::Med(best) => write!(f, "higher MED (its AS's best has {best})"),
            Self::Internal => f.write_str("internal (an external path exists)"),
            Self::RouterId(best) => write!(f, "higher router id (best has {best})"),
            Self::ClusterList => f.write_str("longer cluster list"),
            Self::PeerAddress => f.write_str("higher peer address"),
        }
    }
}

/// The outcome for a list of candidates, by their position in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// The best one.
    pub best: Option<usize>,
    /// The best and its equals.
    pub multipath: Vec<usize>,
    /// Why each one is not the best; `None` for the best.
    pub reasons: Vec<Option<Reason>>,
}

/// Selects among the accepted paths to one prefix.
pub fn select(candidates: &[Candidate<'_>]) -> Selection {
    let mut race = Race { candidates, left: (0..candidates.len()).collect(), reasons: vec![None; candidates.len()] };
    race.keep_least(|c| u32::MAX - c.local_pref(), |best| Reason::LocalPref(best.local_pref()));
    race.keep_least(|c| c.attributes.as_path.length(), |best| Reason::AsPath(best.attributes.as_path.length()));
    race.keep_least(|c| c.attributes.origin, |best| Reason::Origin(best.attributes.origin));
    race.compare_meds();
    race.keep_least(|c| c.internal, |_| Reason::Internal);
    let multipath = race.left.clone();
    race.keep_least(Candidate::originator, |best| Reason::RouterId(best.originator()));
    race.keep_least(|c| c.attributes.cluster_list_length, |_| Reason::ClusterList);
    race.keep_least(|c| c.peer, |_| Reason::PeerAddress);
    Selection { best: race.left.first().copied(), multipath, reasons: race.reasons }
}

struct Race<'a> {
    candidates: &'a [Candidate<'a>],
    left: Vec<usize>,
    reasons: Vec<Option<Reason>>,
}

impl<'a> Race<'a> {
    /// Drops every candidate whose key is not the least.
    fn keep_least<K: Ord>(&mut self, key: impl Fn(&Candidate<'a>) -> K, reason: impl Fn(&Candidate<'a>) -> Reason) {
        if self.left.len() < 2 {
            return;
        }
        let candidates = self.candidates;
        let Some(best) = self.left.iter().map(|&index| &candidates[index]).min_by_key(|c| key(c)) else { return };
        let least = key(best);
        let reasons = &mut self.reasons;
        self.left.retain(|&index| {
            let keep = key(&candidates[index]) == least;
            if !keep {
                reasons[index] = Some(reason(best));
            }
            keep
        });
    }

    /// MEDs compare only among paths from the same neighbouring AS, and against all of those, so that the outcome does
    /// not depend on the order of arrival.
    fn compare_meds(&mut self) {
        let candidates = self.candidates;
        let before = self.left.clone();
        let reasons = &mut self.reasons;
        self.left.retain(|&index| {
            let this = &candidates[index];
            let least = before
                .iter()
                .map(|&other| &candidates[other])
                .filter(|other| other.attributes.as_path.first() == this.attributes.as_path.first())
                .map(Candidate::med)
                .min()
                .unwrap_or(0);
            let keep = this.med() == least;
            if !keep {
                reasons[index] = Some(Reason::Med(least));
            }
            keep
        });
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::wire::{AsPath, Segment},
        *,
    };

    fn path(numbers: &[u32]) -> Attributes {
        let segments = if numbers.is_empty() { vec![] } else { vec![Segment::Sequence(numbers.to_vec())] };
        Attributes { as_path: AsPath(segments), ..Attributes::default() }
    }

    /// Candidates from peers 10.0.0.1, 10.0.0.2, ... with router ids to match.
    fn race(list: &[(Attributes, bool)]) -> Selection {
        let candidates: Vec<Candidate<'_>> = (1u8..)
            .zip(list)
            .map(|(host, (attributes, internal))| Candidate {
                attributes,
                internal: *internal,
                router_id: Ipv4Addr::new(10, 0, 0, host),
                peer: IpAddr::from([10, 0, 0, host]),
            })
            .collect();
        select(&candidates)
    }

    #[test]
    fn nothing_is_selected_from_nothing() {
        assert_eq!(race(&[]), Selection::default());
    }

    #[test]
    fn a_higher_local_preference_beats_a_shorter_path_and_a_missing_one_counts_as_100() {
        let preferred = Attributes { local_pref: Some(101), ..path(&[1, 2, 3]) };
        let outcome = race(&[(path(&[]), true), (preferred, true)]);
        assert_eq!(outcome.best, Some(1));
        assert_eq!(outcome.reasons[0], Some(Reason::LocalPref(101)));
        assert_eq!(outcome.multipath, [1]);
    }

    #[test]
    fn the_shorter_as_path_beats_the_better_origin() {
        let short = Attributes { origin: Origin::Incomplete, ..path(&[1]) };
        let outcome = race(&[(path(&[1, 2]), false), (short, false)]);
        assert_eq!(outcome.best, Some(1));
        assert_eq!(outcome.reasons[0], Some(Reason::AsPath(1)));
    }

    #[test]
    fn the_better_origin_beats_the_lower_med() {
        let worse = Attributes { origin: Origin::Egp, med: Some(0), ..path(&[1]) };
        let better = Attributes { med: Some(50), ..path(&[1]) };
        let outcome = race(&[(worse, false), (better, false)]);
        assert_eq!(outcome.best, Some(1));
        assert_eq!(outcome.reasons[0], Some(Reason::Origin(Origin::Igp)));
    }

    #[test]
    fn meds_compare_only_within_one_neighbouring_as() {
        let med = |asn, med| (Attributes { med: Some(med), ..path(&[asn]) }, false);
        let outcome = race(&[med(1, 20), med(2, 30), med(1, 10)]);
        assert_eq!(outcome.multipath, [1, 2]);
        assert_eq!(outcome.best, Some(1));
        assert_eq!(outcome.reasons[0], Some(Reason::Med(10)));
    }

    #[test]
    fn external_beats_internal_and_internal_is_no_equal_of_it() {
        let outcome = race(&[(path(&[1]), true), (path(&[1]), false)]);
        assert_eq!(outcome.best, Some(1));
        assert_eq!(outcome.multipath, [1]);
        assert_eq!(outcome.reasons[0], Some(Reason::Internal));
    }

    #[test]
    fn paths_that_differ_only_in_router_id_share_the_load() {
        let outcome = race(&[(path(&[2]), false), (path(&[1]), false)]);
        assert_eq!(outcome.best, Some(0));
        assert_eq!(outcome.multipath, [0, 1]);
        assert_eq!(outcome.reasons[1], Some(Reason::RouterId(Ipv4Addr::new(10, 0, 0, 1))));
    }

    #[test]
    fn a_reflected_route_counts_as_its_originators() {
        let reflected = Attributes { originator_id: Some(Ipv4Addr::new(1, 1, 1, 1)), ..path(&[]) };
        assert_eq!(race(&[(path(&[]), true), (reflected, true)]).best, Some(1));
    }

    #[test]
    fn among_reflections_of_one_originator_the_shorter_cluster_list_and_then_the_lower_address_win() {
        let reflected = |length| {
            let originator_id = Some(Ipv4Addr::new(1, 1, 1, 1));
            (Attributes { originator_id, cluster_list_length: length, ..path(&[]) }, true)
        };
        let outcome = race(&[reflected(2), reflected(1), reflected(1)]);
        assert_eq!(outcome.best, Some(1));
        assert_eq!(outcome.reasons, [Some(Reason::ClusterList), None, Some(Reason::PeerAddress)]);
    }
}
