use proptest::prelude::*;

use super::{
    super::{
        bestpath::Reason,
        policy::Rejection,
        wire::{Announcement, AsPath, Segment},
    },
    *,
};
use crate::config::valid::PrefixRule;

const NOW: Duration = Duration::from_secs(1);

fn address(host: u8) -> IpAddr {
    IpAddr::from([172, 16, 1, host])
}

/// Internal peers 172.16.1.HOST, established.
fn rib(hosts: &[u8]) -> Rib {
    let local = Local {
        asn: 64512,
        router_id: Some(Ipv4Addr::new(172, 16, 1, 88)),
        addresses: [address(88)].into(),
        ..Local::default()
    };
    let mut rib = Rib::new(local);
    for host in hosts {
        let policy = Policy { internal: true, ..Policy::default() };
        rib.peer_up(address(*host), policy, Ipv4Addr::new(172, 16, 1, *host));
    }
    rib
}

fn nlri(prefix: &str) -> Nlri {
    Nlri::from(prefix.parse::<IpNet>().unwrap())
}

fn announce(prefixes: &[&str], next_hop: IpAddr) -> Update {
    announce_with(prefixes, next_hop, Attributes::default())
}

fn announce_with(prefixes: &[&str], next_hop: IpAddr, attributes: Attributes) -> Update {
    let prefixes = prefixes.iter().map(|prefix| nlri(prefix)).collect();
    Update { announced: vec![Announcement { next_hop, prefixes }], attributes, ..Update::default() }
}

fn withdraw(prefixes: &[&str]) -> Update {
    Update { withdrawn: prefixes.iter().map(|prefix| nlri(prefix)).collect(), ..Update::default() }
}

fn change(prefix: &str, hosts: &[u8]) -> RouteUpdate {
    RouteUpdate {
        prefix: prefix.parse().unwrap(),
        next_hops: hosts.iter().map(|host| address(*host)).collect(),
        internal: !hosts.is_empty(),
    }
}

#[test]
fn a_withdrawal_says_that_the_prefix_is_gone_and_leaves_no_entry() {
    let mut rib = rib(&[80]);
    rib.update(address(80), &announce(&["10.1.0.0/24"], address(80)), NOW);
    assert_eq!(rib.take_changes(), [change("10.1.0.0/24", &[80])]);
    rib.update(address(80), &withdraw(&["10.1.0.0/24", "10.9.0.0/24"]), NOW);
    assert_eq!(rib.take_changes(), [change("10.1.0.0/24", &[])]);
    assert_eq!(rib.iter(false).count(), 0);
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
    let update = Update { withdrawn: withdraw(&["10.1.0.0/24"]).withdrawn, ..announce(&["10.1.0.0/24"], address(80)) };
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
    let (_, _, standings) = rib.iter(false).next().unwrap();
    assert_eq!(standings[0].path.rejection(), Some(Rejection::OwnAs(64512)));
    assert_eq!(rib.counts(address(80)), (1, 0));
}

#[test]
fn a_changed_policy_is_applied_to_what_was_received() {
    let mut rib = rib(&[80]);
    rib.update(address(80), &announce(&["10.1.0.0/24", "10.2.0.0/24"], address(80)), NOW);
    rib.take_changes();
    let only = PrefixRule { prefix: "10.1.0.0/16".parse().unwrap(), min_length: 16, max_length: 32 };
    let policy = Policy { internal: true, import: Some(Arc::new(vec![only.into()])), ..Policy::default() };
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
    let (_, own, standings) = rib.iter(false).next().unwrap();
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
    assert_eq!(rib.iter(false).count(), 0);
}

#[test]
fn standings_name_the_best_its_equals_and_why_the_rest_lost() {
    let mut rib = rib(&[80, 81, 82, 83]);
    rib.update(address(80), &announce(&["10.1.0.0/24"], address(88)), NOW);
    rib.update(address(81), &announce(&["10.1.0.0/24"], address(81)), NOW);
    rib.update(address(82), &announce(&["10.1.0.0/24"], address(82)), NOW);
    let worse = Attributes { local_pref: Some(50), ..Attributes::default() };
    rib.update(address(83), &announce_with(&["10.1.0.0/24"], address(83), worse), NOW);
    let (_, _, standings) = rib.iter(false).next().unwrap();
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
    assert_eq!(standings[0].path.rejection(), Some(Rejection::OwnNextHop(address(88))));
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

/// A kernel that is connected to 172.16.1.0/24 and has a route by 172.16.1.1.
fn connected() -> Vec<(IpNet, Option<IpAddr>)> {
    vec![("172.16.1.0/24".parse().unwrap(), None), ("10.5.0.0/16".parse().unwrap(), Some(address(1)))]
}

fn hop(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn a_path_whose_next_hop_cannot_be_reached_is_kept_and_not_used_until_it_can() {
    let mut rib = rib(&[80]);
    rib.kernel(connected());
    rib.update(address(80), &announce(&["10.1.0.0/24"], hop("192.168.7.7")), NOW);
    assert!(!rib.has_changes());
    assert_eq!(rib.counts(address(80)), (1, 1), "policy has let it in");
    let more = ("192.168.7.0/24".parse().unwrap(), Some(address(1)));
    rib.kernel(connected().into_iter().chain([more]));
    assert_eq!(rib.take_changes(), [change("10.1.0.0/24", &[1])], "through the gateway of the kernel's route");
    rib.kernel(connected());
    assert_eq!(rib.take_changes(), [change("10.1.0.0/24", &[])]);
}

#[test]
fn the_loss_of_a_network_takes_every_path_through_it_at_once_and_its_return_brings_them_back() {
    let mut rib = rib(&[80, 81]);
    rib.kernel(connected());
    rib.update(address(80), &announce(&["10.1.0.0/24", "10.1.1.0/24"], address(80)), NOW);
    rib.update(address(81), &announce(&["10.1.0.0/24"], hop("10.5.0.9")), NOW);
    assert_eq!(rib.take_changes(), [change("10.1.0.0/24", &[80]), change("10.1.1.0/24", &[80])], "the nearer one");
    rib.kernel([]);
    assert_eq!(rib.take_changes(), [change("10.1.0.0/24", &[]), change("10.1.1.0/24", &[])]);
    rib.kernel(connected());
    assert_eq!(rib.take_changes(), [change("10.1.0.0/24", &[80]), change("10.1.1.0/24", &[80])]);
}

#[test]
fn a_next_hop_inside_a_learnt_prefix_is_reached_by_its_gateways_and_lost_with_it() {
    let mut rib = rib(&[80, 81]);
    rib.kernel(connected());
    rib.update(address(81), &announce(&["10.1.0.0/24"], hop("10.7.0.1")), NOW);
    assert!(!rib.has_changes());
    rib.update(address(80), &announce(&["10.7.0.0/16"], address(80)), NOW);
    assert_eq!(rib.take_changes(), [change("10.1.0.0/24", &[80]), change("10.7.0.0/16", &[80])]);
    rib.update(address(80), &withdraw(&["10.7.0.0/16"]), NOW);
    assert_eq!(rib.take_changes(), [change("10.1.0.0/24", &[]), change("10.7.0.0/16", &[])]);
}

#[test]
fn routes_that_would_reach_their_next_hops_through_each_other_are_not_used() {
    let mut rib = rib(&[80]);
    rib.kernel(connected());
    rib.update(address(80), &announce(&["10.7.0.0/16"], hop("10.8.0.1")), NOW);
    rib.update(address(80), &announce(&["10.8.0.0/16"], hop("10.7.0.1")), NOW);
    rib.update(address(80), &announce(&["10.9.0.0/16"], hop("10.9.0.1")), NOW);
    assert!(!rib.has_changes());
}

#[test]
fn a_network_that_we_become_connected_to_is_no_longer_imported() {
    let mut rib = rib(&[80]);
    rib.kernel(connected());
    rib.update(address(80), &announce(&["10.1.0.0/24"], address(80)), NOW);
    rib.take_changes();
    rib.kernel(connected().into_iter().chain([("10.1.0.0/24".parse().unwrap(), None)]));
    assert_eq!(rib.take_changes(), [change("10.1.0.0/24", &[])]);
    let (_, _, standings) = rib.iter(false).next().unwrap();
    assert_eq!(standings[0].path.rejection(), Some(Rejection::Connected));
}

#[test]
fn several_paths_of_one_peer_share_the_load_and_go_one_by_one() {
    let mut rib = rib(&[80]);
    let with_id = |path, host| {
        let announced =
            vec![Announcement { next_hop: address(host), prefixes: vec![Nlri { path, ..nlri("10.1.0.0/24") }] }];
        Update { announced, ..Update::default() }
    };
    rib.update(address(80), &with_id(1, 81), NOW);
    rib.update(address(80), &with_id(2, 82), NOW);
    assert_eq!(rib.take_changes(), [change("10.1.0.0/24", &[81, 82])]);
    assert_eq!(rib.counts(address(80)), (2, 2));
    let gone = Update { withdrawn: vec![Nlri { path: 1, ..nlri("10.1.0.0/24") }], ..Update::default() };
    rib.update(address(80), &gone, NOW);
    assert_eq!(rib.take_changes(), [change("10.1.0.0/24", &[82])]);
}

#[test]
fn stale_paths_stay_until_they_are_said_again_or_swept() {
    let mut rib = rib(&[80]);
    rib.update(address(80), &announce(&["10.1.0.0/24", "10.1.1.0/24"], address(80)), NOW);
    rib.take_changes();
    rib.peer_restarts(address(80), &[Family::Ipv4].into());
    assert!(!rib.has_changes(), "stale but valid");
    rib.peer_up(address(80), Policy { internal: true, ..Policy::default() }, Ipv4Addr::new(172, 16, 1, 80));
    rib.update(address(80), &announce(&["10.1.0.0/24"], address(80)), NOW);
    rib.sweep(address(80), Some(Family::Ipv6));
    assert!(!rib.has_changes());
    rib.sweep(address(80), Some(Family::Ipv4));
    assert_eq!(rib.take_changes(), [change("10.1.1.0/24", &[])]);
    assert_eq!(rib.counts(address(80)), (1, 1));
}

#[test]
fn an_import_term_changes_what_is_used_and_not_what_was_received() {
    let mut rib = rib(&[80]);
    let set = crate::config::valid::Changes { local_pref: Some(250), ..Default::default() };
    let term = crate::config::valid::Term { set, ..Default::default() };
    let import = Some(Arc::new(vec![term]));
    rib.set_policy(address(80), Policy { internal: true, import, ..Policy::default() });
    rib.update(address(80), &announce(&["10.1.0.0/24"], address(80)), NOW);
    let (_, _, standings) = rib.iter(false).next().unwrap();
    assert_eq!(standings[0].path.used().attributes.local_pref, Some(250));
    assert_eq!(standings[0].path.received.attributes.local_pref, None);
}

#[test]
fn a_path_of_an_external_peer_that_is_shutting_down_gracefully_is_the_last_choice() {
    let mut rib = rib(&[80]);
    let list = || Some(Arc::new(vec![crate::config::valid::Term::default()]));
    for host in [81, 82] {
        let policy = Policy { internal: false, import: list(), ..Policy::default() };
        rib.peer_up(address(host), policy, Ipv4Addr::new(172, 16, 1, host));
        rib.update(address(host), &announce(&["10.1.0.0/24"], address(host)), NOW);
    }
    let leaving = Attributes { communities: vec![0xffff_0000], ..Attributes::default() };
    rib.update(address(81), &announce_with(&["10.1.0.0/24"], address(81), leaving), NOW);
    let update = RouteUpdate { internal: false, ..change("10.1.0.0/24", &[82]) };
    assert_eq!(rib.take_changes(), [update]);
}
