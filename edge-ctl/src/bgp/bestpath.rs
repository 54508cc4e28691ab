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
use crate::model::Community;

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
    /// How far its next hop is.
    pub cost: u32,
    /// Path identifier, where the peer sends several (RFC 7911).
    pub path: u32,
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
    /// Long-lived stale, and another path is not (RFC 9494).
    LongLivedStale,
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
    /// Its next hop is farther than the best's (RFC 4271 9.1.2.2 e).
    Cost(u32),
    /// Equal cost; its router id is higher.
    RouterId(Ipv4Addr),
    /// Equal cost; it passed more route reflectors.
    ClusterList,
    /// Equal cost; its peer's address is higher.
    PeerAddress,
    /// Equal cost, from the same peer; its path identifier is higher.
    PathId,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local => f.write_str("we originate this prefix"),
            Self::LongLivedStale => f.write_str("long-lived stale (another path is not)"),
            Self::LocalPref(best) => write!(f, "lower local preference (best has {best})"),
            Self::AsPath(best) => write!(f, "longer AS path (best has {best})"),
            Self::Origin(best) => write!(f, "worse origin (best has {best})"),
            Self::Med(best) => write!(f, "higher MED (its AS's best has {best})"),
            Self::Internal => f.write_str("internal (an external path exists)"),
            Self::Cost(best) => write!(f, "farther next hop (best is at {best})"),
            Self::RouterId(best) => write!(f, "higher router id (best has {best})"),
            Self::ClusterList => f.write_str("longer cluster list"),
            Self::PeerAddress => f.write_str("higher peer address"),
            Self::PathId => f.write_str("higher path identifier"),
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

/// Selects among the usable paths to one prefix.
pub fn select(candidates: &[Candidate<'_>]) -> Selection {
    race(candidates, false).0
}

/// What each candidate had to show in each step that it took part in: `local-pref 100 equal`, `as-path 2 lost to 1`.
pub fn explain(candidates: &[Candidate<'_>]) -> Vec<Vec<String>> {
    race(candidates, true).1
}

fn race(candidates: &[Candidate<'_>], explain: bool) -> (Selection, Vec<Vec<String>>) {
    let mut race = Race {
        candidates,
        left: (0..candidates.len()).collect(),
        reasons: vec![None; candidates.len()],
        steps: explain.then(|| vec![Vec::new(); candidates.len()]),
    };
    // RFC 9494 4.3: below everything else, whoever marked it.
    let long_lived = |c: &Candidate<'_>| c.attributes.has_community(Community::LLGR_STALE);
    if candidates.iter().any(long_lived) {
        race.keep_least("long-lived-stale", long_lived, |c| long_lived(c).to_string(), |_| Reason::LongLivedStale);
    }
    let higher = |c: &Candidate<'_>| u32::MAX - c.local_pref();
    race.keep_least("local-pref", higher, |c| c.local_pref().to_string(), |best| Reason::LocalPref(best.local_pref()));
    let length = |c: &Candidate<'_>| c.attributes.as_path.length();
    race.keep_least("as-path", length, |c| length(c).to_string(), |best| Reason::AsPath(length(best)));
    let origin = |c: &Candidate<'_>| c.attributes.origin;
    race.keep_least("origin", origin, |c| origin(c).to_string(), |best| Reason::Origin(origin(best)));
    race.compare_meds();
    let kind = |c: &Candidate<'_>| if c.internal { "internal" } else { "external" }.to_owned();
    race.keep_least("type", |c| c.internal, kind, |_| Reason::Internal);
    race.keep_least("next-hop-cost", |c| c.cost, |c| c.cost.to_string(), |best| Reason::Cost(best.cost));
    let multipath = race.left.clone();
    let originator = Candidate::originator;
    race.keep_least("router-id", originator, |c| originator(c).to_string(), |c| Reason::RouterId(originator(c)));
    let clusters = |c: &Candidate<'_>| c.attributes.cluster_list_length;
    race.keep_least("cluster-list", clusters, |c| clusters(c).to_string(), |_| Reason::ClusterList);
    race.keep_least("peer-address", |c| c.peer, |c| c.peer.to_string(), |_| Reason::PeerAddress);
    race.keep_least("path-id", |c| c.path, |c| c.path.to_string(), |_| Reason::PathId);
    let selection = Selection { best: race.left.first().copied(), multipath, reasons: race.reasons };
    (selection, race.steps.unwrap_or_default())
}

struct Race<'a> {
    candidates: &'a [Candidate<'a>],
    left: Vec<usize>,
    reasons: Vec<Option<Reason>>,
    /// By candidate; `None`: nobody asked.
    steps: Option<Vec<Vec<String>>>,
}

impl<'a> Race<'a> {
    /// Drops every candidate whose key is not the least.
    fn keep_least<K: Ord>(
        &mut self,
        step: &str,
        key: impl Fn(&Candidate<'a>) -> K,
        show: impl Fn(&Candidate<'a>) -> String,
        reason: impl Fn(&Candidate<'a>) -> Reason,
    ) {
        if self.left.len() < 2 {
            return;
        }
        let candidates = self.candidates;
        let Some(best) = self.left.iter().map(|&index| &candidates[index]).min_by_key(|c| key(c)) else { return };
        let least = key(best);
        let before = self.left.len();
        let taking_part = self.steps.is_some().then(|| self.left.clone());
        let reasons = &mut self.reasons;
        self.left.retain(|&index| {
            let keep = key(&candidates[index]) == least;
            if !keep {
                reasons[index] = Some(reason(best));
            }
            keep
        });
        if let Some(taking_part) = taking_part {
            let parted = self.left.len() < before;
            self.note(&taking_part, step, |c| (show(c), key(c) == least), parted, &show(best));
        }
    }

    fn note(
        &mut self,
        taking_part: &[usize],
        step: &str,
        stands: impl Fn(&Candidate<'a>) -> (String, bool),
        parted: bool,
        best: &str,
    ) {
        let Some(steps) = &mut self.steps else { return };
        for &index in taking_part {
            let (value, kept) = stands(&self.candidates[index]);
            steps[index].push(match (kept, parted) {
                (true, false) => format!("{step} {value} equal"),
                (true, true) => format!("{step} {value} won"),
                (false, _) => format!("{step} {value} lost to {best}"),
            });
        }
    }

    /// MEDs compare only among paths from the same neighbouring AS, and against all of those, so that the outcome does
    /// not depend on the order of arrival.
    fn compare_meds(&mut self) {
        if self.left.len() < 2 {
            return;
        }
        let candidates = self.candidates;
        let before = self.left.clone();
        let least_of_as = |this: &Candidate<'_>| {
            before
                .iter()
                .map(|&other| &candidates[other])
                .filter(|other| other.attributes.as_path.first() == this.attributes.as_path.first())
                .map(Candidate::med)
                .min()
                .unwrap_or(0)
        };
        let reasons = &mut self.reasons;
        self.left.retain(|&index| {
            let this = &candidates[index];
            let least = least_of_as(this);
            let keep = this.med() == least;
            if !keep {
                reasons[index] = Some(Reason::Med(least));
            }
            keep
        });
        let parted = self.left.len() < before.len();
        let stands = |c: &Candidate<'_>| (c.med().to_string(), c.med() == least_of_as(c));
        self.note(&before, "med", stands, parted, "a lower one of its AS");
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
                cost: 0,
                path: 0,
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

    #[test]
    fn a_nearer_next_hop_beats_a_lower_router_id_and_is_no_equal() {
        let attributes = path(&[1]);
        let candidate = |host: u8, cost| Candidate {
            attributes: &attributes,
            internal: true,
            router_id: Ipv4Addr::new(10, 0, 0, host),
            peer: IpAddr::from([10, 0, 0, host]),
            cost,
            path: 0,
        };
        let outcome = select(&[candidate(1, 1), candidate(2, 0)]);
        assert_eq!((outcome.best, outcome.multipath), (Some(1), vec![1]));
        assert_eq!(outcome.reasons[0], Some(Reason::Cost(0)));
    }

    #[test]
    fn two_paths_of_one_peer_are_told_apart_by_their_identifiers() {
        let attributes = path(&[1]);
        let candidate = |path| Candidate {
            attributes: &attributes,
            internal: true,
            router_id: Ipv4Addr::new(10, 0, 0, 1),
            peer: IpAddr::from([10, 0, 0, 1]),
            cost: 0,
            path,
        };
        let outcome = select(&[candidate(7), candidate(3)]);
        assert_eq!((outcome.best, outcome.multipath), (Some(1), vec![0, 1]));
        assert_eq!(outcome.reasons[0], Some(Reason::PathId));
    }

    #[test]
    fn every_step_is_told_until_a_path_drops_out() {
        let (short, long) = (path(&[1]), path(&[1, 2]));
        let candidate = |attributes, host: u8| Candidate {
            attributes,
            internal: false,
            router_id: Ipv4Addr::new(10, 0, 0, host),
            peer: IpAddr::from([10, 0, 0, host]),
            cost: 0,
            path: 0,
        };
        let steps = explain(&[candidate(&long, 1), candidate(&short, 2), candidate(&short, 3)]);
        assert_eq!(steps[0], ["local-pref 100 equal", "as-path 2 lost to 1"]);
        assert_eq!(
            steps[2],
            [
                "local-pref 100 equal",
                "as-path 1 won",
                "origin i equal",
                "med 0 equal",
                "type external equal",
                "next-hop-cost 0 equal",
                "router-id 10.0.0.3 lost to 10.0.0.2"
            ]
        );
        assert_eq!(steps[1].last().unwrap(), "router-id 10.0.0.2 won");
    }

    proptest::proptest! {
        #[test]
        fn the_best_path_does_not_depend_on_the_order_of_the_candidates(
            list in proptest::collection::vec(
                (99u32..102, 0usize..3, 0u32..3, proptest::bool::ANY, 0u32..2, 1u32..4), 1..8),
            rotate in 0usize..8,
        ) {
            let attributes: Vec<Attributes> = list
                .iter()
                .map(|(local_pref, length, med, _, _, first)| Attributes {
                    local_pref: Some(*local_pref),
                    med: Some(*med),
                    ..path(&std::iter::once(*first).chain((0..*length).map(|_| 9)).collect::<Vec<_>>())
                })
                .collect();
            let mut candidates: Vec<Candidate<'_>> = (1u8..)
                .zip(list.iter().zip(&attributes))
                .map(|(host, ((_, _, _, internal, cost, _), attributes))| Candidate {
                    attributes,
                    internal: *internal,
                    router_id: Ipv4Addr::new(10, 0, 0, host),
                    peer: IpAddr::from([10, 0, 0, host]),
                    cost: *cost,
                    path: 0,
                })
                .collect();
            let best = |candidates: &[Candidate<'_>]| {
                let selection = select(candidates);
                let mut equals: Vec<IpAddr> = selection.multipath.iter().map(|&i| candidates[i].peer).collect();
                equals.sort();
                (selection.best.map(|i| candidates[i].peer), equals)
            };
            let before = best(&candidates);
            let rotate = rotate % candidates.len();
            candidates.rotate_left(rotate);
            proptest::prop_assert_eq!(best(&candidates), before);
        }
    }
}
