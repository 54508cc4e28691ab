//! Graceful restart of a peer, as its helper (RFC 4724 4.2, RFC 8538, RFC 9494): which of its routes outlive the session,
//! and until when. Pure. The same marks serve an enhanced route refresh (RFC 7313), which says anew what a peer has.
//!
//! One family:
//!
//! | Stage     | What happens                              | Next      | Actions                        |
//! |-----------|-------------------------------------------|-----------|--------------------------------|
//! | fresh     | session lost, kept                        | away      | Mark                           |
//! | fresh     | session lost, not kept                    | fresh     | Withdraw                       |
//! | any other | session lost, kept                        | away      | Sweep what is stale, then Mark |
//! | any other | session lost, not kept                    | fresh     | Withdraw                       |
//! | away      | restart time over, no long-lived restart  | fresh     | Withdraw                       |
//! | away      | restart time over, long-lived restart     | long      | Degrade                        |
//! | long      | stale time over                           | fresh     | Withdraw                       |
//! | away, long| session back, forwarding preserved (F)    | back      | none                           |
//! | away, long| session back, F missing                   | fresh     | Sweep                          |
//! | away, long| BFD down, the peer had set C              | fresh     | Withdraw                       |
//! | away, long| BFD down, it had not                      | same      | none                           |
//! | back      | End-of-RIB, or the stale timer            | fresh     | Sweep                          |
//! | fresh     | refresh begins (BoRR)                     | back      | Mark                           |
//! | back      | refresh ends (EoRR)                       | fresh     | Sweep                          |

use std::{collections::BTreeMap, time::Duration};

use super::{fsm::Negotiated, wire::Family};
use crate::model::bgp_session::GracefulRestart;

/// What is to be done with the paths of one family that the peer taught us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// They are stale from now on.
    Mark(Family),
    /// Those that are still stale go.
    Sweep(Family),
    /// Those that are stale are long-lived stale from now on: used only where there is no other (RFC 9494 4.3).
    Degrade(Family),
    /// All of them go.
    Withdraw(Family),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The peer is away; then long-lived for so long.
    Away {
        long: Duration,
    },
    Long,
    /// It is back and tells what it has.
    Back,
}

/// State of one peer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Helper {
    stale: BTreeMap<Family, (Stage, Duration)>,
}

impl Helper {
    /// The session is lost. `keep`: gracefully.
    pub fn lost(
        &mut self,
        negotiated: &Negotiated,
        settings: Option<&GracefulRestart>,
        keep: bool,
        now: Duration,
    ) -> Vec<Action> {
        let kept = if keep { negotiated.kept() } else { None };
        let (Some((families, time)), Some(settings)) = (kept, settings) else {
            self.stale.clear();
            return Family::ALL.map(Action::Withdraw).into();
        };
        let long_lived = negotiated.peer.long_lived();
        let mut actions = Vec::new();
        for family in Family::ALL {
            if !families.contains(&family) {
                self.stale.remove(&family);
                actions.push(Action::Withdraw(family));
                continue;
            }
            // RFC 4724 4.2: what was stale before a second restart does not live on.
            if self.stale.contains_key(&family) {
                actions.push(Action::Sweep(family));
            }
            let long = long_lived.iter().find(|(listed, _)| *listed == family).map_or(0, |(_, time)| *time);
            let long = Duration::from_secs(long.into()).min(settings.long_lived);
            self.stale.insert(family, (Stage::Away { long }, now + time));
            actions.push(Action::Mark(family));
        }
        actions
    }

    /// The session is back.
    pub fn back(&mut self, negotiated: &Negotiated, settings: Option<&GracefulRestart>, now: Duration) -> Vec<Action> {
        let mut actions = Vec::new();
        let until = now + settings.map_or(Duration::ZERO, |settings| settings.stale);
        self.stale.retain(|family, (stage, at)| {
            let preserved = negotiated.preserved(*family) && negotiated.families.contains(family);
            if preserved {
                (*stage, *at) = (Stage::Back, until);
            } else {
                actions.push(Action::Sweep(*family));
            }
            preserved
        });
        actions
    }

    /// The peer has told all it has of a family: by End-of-RIB, or at the end of a refresh.
    pub fn complete(&mut self, family: Family) -> Vec<Action> {
        match self.stale.get(&family) {
            Some((Stage::Back, _)) => {
                self.stale.remove(&family);
                vec![Action::Sweep(family)]
            }
            _ => Vec::new(),
        }
    }

    /// BFD has lost the peer. `independent`: its BFD does not share fate with its BGP (C), so that its forwarding is gone
    /// and its routes lead nowhere; else its BFD has ended because its BGP did (RFC 5882 4.3.2).
    pub fn unreachable(&mut self, independent: bool) -> Vec<Action> {
        let mut actions = Vec::new();
        self.stale.retain(|family, (stage, _)| {
            let gone = independent && *stage != Stage::Back;
            if gone {
                actions.push(Action::Withdraw(*family));
            }
            !gone
        });
        actions
    }

    /// The peer begins to tell all it has of a family. Within `limit` it has to be done.
    pub fn refresh(&mut self, family: Family, limit: Duration, now: Duration) -> Vec<Action> {
        self.stale.insert(family, (Stage::Back, now + limit));
        vec![Action::Mark(family)]
    }

    /// When [`Helper::due`] has something next.
    pub fn next_deadline(&self) -> Option<Duration> {
        self.stale.values().map(|(_, until)| *until).min()
    }

    /// What has run out.
    pub fn due(&mut self, now: Duration) -> Vec<Action> {
        let mut actions = Vec::new();
        self.stale.retain(|family, (stage, until)| {
            if *until > now {
                return true;
            }
            match *stage {
                Stage::Away { long } if !long.is_zero() => {
                    actions.push(Action::Degrade(*family));
                    (*stage, *until) = (Stage::Long, *until + long);
                    return true;
                }
                Stage::Away { .. } | Stage::Long => actions.push(Action::Withdraw(*family)),
                Stage::Back => actions.push(Action::Sweep(*family)),
            }
            false
        });
        actions
    }

    /// For users: what is kept, why, and until when.
    pub fn rows(&self) -> impl Iterator<Item = (Family, &'static str, Duration)> {
        self.stale.iter().map(|(family, (stage, until))| {
            let stage = match stage {
                Stage::Away { .. } => "restarting",
                Stage::Long => "long-lived",
                Stage::Back => "refreshing",
            };
            (*family, stage, *until)
        })
    }

    /// True while the session is away and its routes are kept.
    pub fn is_away(&self) -> bool {
        self.stale.values().any(|(stage, _)| *stage != Stage::Back)
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::{
        super::wire::{Capability, Open, Restart},
        *,
    };

    const SETTINGS: GracefulRestart = GracefulRestart {
        time: Duration::from_secs(120),
        notification: false,
        stale: Duration::from_secs(360),
        long_lived: Duration::from_secs(1000),
    };

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// Both families spoken; `listed` of them kept for 60 s, with F where it says so.
    fn negotiated(listed: &[(Family, bool)], long: &[(Family, u32)]) -> Negotiated {
        let restart = Restart { time: 60, families: listed.to_vec(), ..Restart::default() };
        let long = long.iter().map(|(family, time)| (*family, true, *time)).collect();
        let capabilities = vec![Capability::GracefulRestart(restart), Capability::LongLived(long)];
        Negotiated {
            peer: Open { asn: 64512, hold: 90, router_id: Ipv4Addr::LOCALHOST, capabilities },
            offered: vec![],
            hold: 90,
            keepalive: at(30),
            families: Family::ALL.into(),
            four_octet_as: true,
            route_refresh: true,
            enhanced_refresh: true,
            extended_message: false,
            extended_next_hop: vec![],
            add_path: vec![],
            graceful: true,
            notification_restart: false,
        }
    }

    use Action::{Degrade, Mark, Sweep, Withdraw};
    use Family::{Ipv4, Ipv6};

    #[test]
    fn a_family_that_the_peer_lists_is_kept_until_its_restart_time_and_the_other_goes_at_once() {
        let mut helper = Helper::default();
        let actions = helper.lost(&negotiated(&[(Ipv4, true)], &[]), Some(&SETTINGS), true, at(100));
        assert_eq!(actions, [Mark(Ipv4), Withdraw(Ipv6)]);
        assert!(helper.is_away());
        assert_eq!((helper.next_deadline(), helper.due(at(159))), (Some(at(160)), vec![]));
        assert_eq!(helper.due(at(160)), [Withdraw(Ipv4)]);
        assert_eq!((helper.next_deadline(), helper.is_away()), (None, false));
    }

    #[test]
    fn a_peer_that_comes_back_is_awaited_until_its_end_of_rib_or_the_stale_timer() {
        let both = negotiated(&[(Ipv4, true), (Ipv6, true)], &[]);
        let mut helper = Helper::default();
        helper.lost(&both, Some(&SETTINGS), true, at(100));
        assert_eq!(helper.back(&both, Some(&SETTINGS), at(120)), []);
        assert!(!helper.is_away());
        assert_eq!(helper.complete(Ipv4), [Sweep(Ipv4)]);
        assert_eq!(helper.complete(Ipv4), [], "an ordinary End-of-RIB sweeps nothing");
        assert_eq!(helper.due(at(479)), []);
        assert_eq!(helper.due(at(480)), [Sweep(Ipv6)]);
    }

    #[test]
    fn a_family_whose_forwarding_was_not_preserved_loses_what_is_stale_at_once() {
        let mut helper = Helper::default();
        helper.lost(&negotiated(&[(Ipv4, true), (Ipv6, true)], &[]), Some(&SETTINGS), true, at(100));
        let again = negotiated(&[(Ipv4, true), (Ipv6, false)], &[]);
        assert_eq!(helper.back(&again, Some(&SETTINGS), at(120)), [Sweep(Ipv6)]);
        let mut helper = Helper::default();
        helper.lost(&again, Some(&SETTINGS), true, at(100));
        let without = Negotiated { graceful: false, ..again };
        assert_eq!(helper.back(&without, Some(&SETTINGS), at(120)), [Sweep(Ipv4), Sweep(Ipv6)]);
    }

    #[test]
    fn what_was_stale_before_a_second_loss_does_not_live_on() {
        let both = negotiated(&[(Ipv4, true)], &[]);
        let mut helper = Helper::default();
        helper.lost(&both, Some(&SETTINGS), true, at(100));
        helper.back(&both, Some(&SETTINGS), at(120));
        let actions = helper.lost(&both, Some(&SETTINGS), true, at(130));
        assert_eq!(actions, [Sweep(Ipv4), Mark(Ipv4), Withdraw(Ipv6)]);
        assert_eq!(helper.lost(&both, Some(&SETTINGS), false, at(140)), [Withdraw(Ipv4), Withdraw(Ipv6)]);
        assert_eq!(helper.next_deadline(), None);
    }

    #[test]
    fn bfd_ends_the_waiting_where_it_does_not_share_fate_with_the_peers_bgp_and_only_there() {
        let both = negotiated(&[(Ipv4, true), (Ipv6, true)], &[]);
        let mut helper = Helper::default();
        helper.lost(&both, Some(&SETTINGS), true, at(100));
        assert_eq!(helper.unreachable(false), []);
        assert!(helper.is_away());
        assert_eq!(helper.unreachable(true), [Withdraw(Ipv4), Withdraw(Ipv6)]);
        assert_eq!((helper.is_away(), helper.next_deadline()), (false, None));
        helper.refresh(Ipv4, at(360), at(110));
        assert_eq!(helper.unreachable(true), [], "a refresh is told over a session that is up");
    }

    #[test]
    fn long_lived_routes_are_kept_after_the_restart_time_for_the_lesser_of_both_times() {
        for (theirs, until) in [(500, 660), (5000, 1160)] {
            let mut helper = Helper::default();
            let long = negotiated(&[(Ipv4, true)], &[(Ipv4, theirs)]);
            helper.lost(&long, Some(&SETTINGS), true, at(100));
            assert_eq!(helper.due(at(160)), [Degrade(Ipv4)]);
            assert_eq!(helper.due(at(until - 1)), []);
            assert_eq!(helper.due(at(until)), [Withdraw(Ipv4)]);
        }
        let mut helper = Helper::default();
        let unwilling = GracefulRestart { long_lived: Duration::ZERO, ..SETTINGS };
        helper.lost(&negotiated(&[(Ipv4, true)], &[(Ipv4, 500)]), Some(&unwilling), true, at(100));
        assert_eq!(helper.due(at(160)), [Withdraw(Ipv4)]);
    }

    #[test]
    fn a_refresh_sweeps_what_it_did_not_say_again() {
        let mut helper = Helper::default();
        assert_eq!(helper.refresh(Ipv4, at(360), at(10)), [Mark(Ipv4)]);
        assert_eq!(helper.complete(Ipv6), []);
        assert_eq!(helper.complete(Ipv4), [Sweep(Ipv4)]);
        helper.refresh(Ipv4, at(360), at(20));
        assert_eq!(helper.due(at(380)), [Sweep(Ipv4)], "a refresh that never ends");
    }
}
