use proptest::prelude::*;

use super::*;

const HOLD: Duration = Duration::from_secs(10);
const SHRINK_HOLD: Duration = Duration::from_secs(20);
const RETRY: Duration = Duration::from_secs(1);

fn timing(valid: Option<u64>) -> Timing {
    let valid = valid.map(Duration::from_secs);
    Timing { valid, retry: RETRY, hold: HOLD, shrink_hold: SHRINK_HOLD, shrink_limit: 50 }
}

fn guard() -> Guard {
    Guard::from(vec!["10.1.0.0/16".parse().unwrap()])
}

fn tracker(valid: Option<u64>) -> PoolTracker {
    PoolTracker::new(timing(valid), guard())
}

fn members(hosts: &[&str]) -> BTreeSet<PoolMember> {
    hosts.iter().map(|host| PoolMember::new(format!("{host}:443").parse().unwrap(), 1)).collect()
}

fn good(hosts: &[&str]) -> Outcome {
    Outcome::Answer { members: members(hosts), ttl: Duration::from_secs(5) }
}

fn nxdomain() -> Outcome {
    Outcome::Negative { reason: "NXDOMAIN".into(), ttl: Some(Duration::from_secs(5)) }
}

fn failure() -> Outcome {
    Outcome::Failure { reason: "SERVFAIL".into() }
}

fn dead(hosts: &[&str]) -> Evidence {
    Evidence { checked: true, dead: members(hosts).iter().map(|member| member.address).collect() }
}

fn at(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

const FIVE: [&str; 5] = ["10.1.0.1", "10.1.0.2", "10.1.0.3", "10.1.0.4", "10.1.0.5"];

#[test]
fn valid_overrides_the_ttl_and_without_it_the_ttl_is_bounded_on_both_sides() {
    assert_eq!(tracker(Some(10)).step(at(0), good(&["10.1.0.4"])).next, at(10));
    assert_eq!(tracker(None).step(at(0), good(&["10.1.0.4"])).next, at(5));
    let lasting = |ttl| Outcome::Answer { members: members(&["10.1.0.4"]), ttl };
    assert_eq!(tracker(None).step(at(0), lasting(Duration::ZERO)).next, at(1));
    assert_eq!(tracker(None).step(at(0), lasting(Duration::from_secs(u32::MAX.into()))).next, at(3600));
}

#[test]
fn identical_answers_are_reported_once() {
    let mut pool = tracker(Some(10));
    assert!(pool.step(at(0), good(&["10.1.0.4", "10.1.1.4"])).changed);
    assert!(!pool.step(at(10), good(&["10.1.1.4", "10.1.0.4"])).changed);
    assert_eq!(pool.counts().changes, 1);
}

#[test]
fn half_a_pool_may_go_at_once_and_more_is_held() {
    let mut pool = tracker(Some(10));
    pool.step(at(0), good(&FIVE[..4]));
    pool.step(at(10), good(&FIVE[..2]));
    assert_eq!(pool.pool().members, members(&FIVE[..2]));
    pool.step(at(20), good(&FIVE));
    let step = pool.step(at(30), good(&FIVE[..2]));
    assert!(step.hold_began);
    assert_eq!(pool.pool().members, members(&FIVE));
    assert_eq!(pool.held().unwrap().kept.len(), 3);
    assert!(matches!(&pool.pool().state, PoolState::LastGood { reason } if reason.contains("2 of 5")));
}

#[test]
fn a_held_shrink_comes_true_at_the_end_of_its_hold_and_is_asked_again_then() {
    let mut pool = tracker(Some(15));
    pool.step(at(0), good(&FIVE));
    assert_eq!(pool.step(at(15), good(&FIVE[..1])).next, at(15));
    assert_eq!(pool.step(at(30), good(&FIVE[..1])).next, at(5));
    assert_eq!(pool.pool().members.len(), 5);
    let step = pool.step(at(35), good(&FIVE[..1]));
    assert!(step.changed && pool.held().is_none());
    assert_eq!(pool.pool().members, members(&FIVE[..1]));
}

#[test]
fn a_shrink_that_goes_back_within_its_hold_never_happened() {
    let mut pool = tracker(Some(10));
    pool.step(at(0), good(&FIVE));
    pool.step(at(10), good(&FIVE[..1]));
    pool.step(at(20), good(&FIVE));
    assert_eq!((pool.held(), &pool.pool().state), (None, &PoolState::Fresh));
    pool.step(at(30), good(&FIVE[..1]));
    assert_eq!(pool.pool().members.len(), 5, "the next hold starts anew");
    assert_eq!((pool.counts().changes, pool.counts().holds), (1, 2));
}

#[test]
fn members_that_checks_find_down_go_during_a_shrinks_hold_and_the_last_of_them_ends_it() {
    let mut pool = tracker(Some(10));
    pool.step(at(0), good(&FIVE));
    pool.step(at(10), good(&FIVE[..2]));
    assert!(!pool.heed(dead(&FIVE[2..4])), "one is alive");
    pool.step(at(12), good(&FIVE[..2]));
    assert_eq!(pool.pool().members, members(&[FIVE[0], FIVE[1], FIVE[4]]));
    assert!(pool.held().is_some(), "three of five are gone, whatever is left by now");
    assert!(pool.heed(dead(&FIVE[2..])), "now they agree");
    pool.step(at(13), good(&FIVE[..2]));
    assert_eq!((pool.held(), &pool.pool().members), (None, &members(&FIVE[..2])));
}

#[test]
fn new_members_of_a_shrunken_answer_count_at_once() {
    let mut pool = tracker(Some(10));
    pool.step(at(0), good(&FIVE));
    pool.step(at(10), good(&["10.1.9.9"]));
    assert_eq!(pool.pool().members.len(), 6);
}

#[test]
fn a_replacement_of_all_members_by_as_many_is_no_shrink() {
    let mut pool = tracker(Some(10));
    pool.step(at(0), good(&FIVE[..2]));
    pool.step(at(10), good(&FIVE[2..4]));
    assert_eq!(pool.pool().members, members(&FIVE[2..4]));
}

#[test]
fn a_hold_of_zero_lets_every_shrink_through() {
    let mut pool = PoolTracker::new(Timing { shrink_hold: Duration::ZERO, ..timing(None) }, guard());
    pool.step(at(0), good(&FIVE));
    pool.step(at(5), good(&FIVE[..1]));
    assert_eq!(pool.pool().members, members(&FIVE[..1]));
}

#[test]
fn what_the_first_answer_leaves_out_of_an_adopted_pool_is_held() {
    let mut pool = tracker(Some(10));
    pool.adopt(members(&FIVE));
    assert_eq!(pool.pool().state, PoolState::Unknown);
    pool.step(at(0), good(&FIVE[..1]));
    assert_eq!(pool.pool().members.len(), 5);
    let mut empty = tracker(Some(10));
    empty.adopt(members(&FIVE));
    empty.heed(dead(&[]));
    empty.step(at(0), nxdomain());
    empty.step(at(60), nxdomain());
    assert_eq!(empty.pool().members.len(), 5, "checks find them alive");
}

#[test]
fn a_failure_keeps_the_pool_and_is_retried_soon_whatever_valid_says() {
    let mut pool = tracker(Some(3600));
    pool.step(at(0), good(&["10.1.0.4"]));
    let step = pool.step(at(3600), failure());
    assert_eq!((step.next, step.changed), (RETRY, true));
    assert_eq!(pool.pool().members, members(&["10.1.0.4"]));
    assert_eq!(pool.pool().state, PoolState::LastGood { reason: "SERVFAIL".into() });
    pool.step(at(3601), good(&["10.1.0.4"]));
    assert_eq!(pool.pool().state, PoolState::Fresh);
}

#[test]
fn a_failure_before_the_first_answer_leaves_the_pool_unknown_and_sends_nothing() {
    let mut pool = tracker(Some(10));
    assert!(!pool.step(at(0), failure()).changed);
    assert_eq!(pool.pool().state, PoolState::Unknown);
    assert_eq!(pool.error(), Some("SERVFAIL"));
}

#[test]
fn refused_addresses_are_counted_named_with_their_age_and_never_in_the_pool() {
    let mut pool = tracker(Some(10));
    let step = pool.step(at(0), good(&["10.1.0.4", "192.0.2.66"]));
    assert_eq!(pool.pool().members, members(&["10.1.0.4"]));
    let outside: IpAddr = "192.0.2.66".parse().unwrap();
    assert_eq!(step.newly_refused, [(outside, Refusal::Outside)]);
    let again = pool.step(at(10), good(&["10.1.0.4", "192.0.2.66"]));
    assert_eq!(again.newly_refused, []);
    assert_eq!(pool.counts().refused, 2);
    assert_eq!(pool.refused()[&outside], (Refusal::Outside, at(0)));
    pool.step(at(20), good(&["10.1.0.4"]));
    assert!(pool.refused().is_empty());
}

#[test]
fn an_answer_wholly_refused_keeps_the_last_good_pool() {
    let mut pool = tracker(Some(10));
    pool.step(at(0), good(&["10.1.0.4"]));
    let step = pool.step(at(10), good(&["192.0.2.66"]));
    assert_eq!(pool.pool().members, members(&["10.1.0.4"]));
    assert!(matches!(pool.pool().state, PoolState::LastGood { .. }));
    assert_eq!(step.next, RETRY);
}

#[test]
fn nxdomain_empties_the_pool_only_after_the_hold_time() {
    let mut pool = tracker(None);
    pool.step(at(0), good(&["10.1.0.4"]));
    assert!(pool.step(at(5), nxdomain()).hold_began);
    assert_eq!(pool.pool().members, members(&["10.1.0.4"]));
    let held = pool.step(at(10), nxdomain());
    assert_eq!((held.changed, held.next), (false, at(5)));
    assert!(pool.step(at(15), nxdomain()).changed);
    assert_eq!((pool.pool().members.len(), &pool.pool().state), (0, &PoolState::Fresh));
    assert!(!pool.step(at(20), nxdomain()).changed, "it stays empty, and nothing is held");
    assert_eq!(pool.held(), None);
}

#[test]
fn nxdomain_does_not_empty_a_pool_while_checks_find_a_member_alive() {
    let mut pool = tracker(None);
    pool.heed(dead(&[]));
    pool.step(at(0), good(&["10.1.0.4", "10.1.0.5"]));
    pool.step(at(5), nxdomain());
    pool.heed(dead(&["10.1.0.4"]));
    pool.step(at(500), nxdomain());
    assert_eq!(pool.pool().members.len(), 2);
    assert!(pool.held().unwrap().reason.contains("alive"));
    assert!(pool.heed(dead(&["10.1.0.4", "10.1.0.5"])), "to be asked again at once");
    pool.step(at(501), nxdomain());
    assert!(pool.pool().members.is_empty());
}

#[test]
fn checks_alone_do_not_empty_a_pool_before_the_hold_time() {
    let mut pool = tracker(None);
    pool.heed(dead(&["10.1.0.4"]));
    pool.step(at(0), good(&["10.1.0.4"]));
    pool.step(at(5), nxdomain());
    pool.step(at(14), nxdomain());
    assert!(!pool.pool().members.is_empty());
    pool.step(at(15), nxdomain());
    assert!(pool.pool().members.is_empty());
}

#[test]
fn the_hold_time_is_never_shorter_than_valid_and_is_asked_again_at_its_end() {
    let mut pool = tracker(Some(30));
    pool.step(at(0), good(&["10.1.0.4"]));
    assert_eq!(pool.step(at(30), nxdomain()).next, at(30));
    assert_eq!(pool.step(at(40), nxdomain()).next, at(20));
    assert!(!pool.pool().members.is_empty());
    pool.step(at(60), nxdomain());
    assert!(pool.pool().members.is_empty());
}

#[test]
fn a_good_answer_ends_the_hold_and_the_next_nxdomain_starts_another() {
    let mut pool = tracker(None);
    pool.step(at(0), good(&["10.1.0.4"]));
    pool.step(at(1), nxdomain());
    pool.step(at(6), good(&["10.1.0.4"]));
    pool.step(at(12), nxdomain());
    assert!(!pool.pool().members.is_empty());
}

#[test]
fn a_server_that_fails_at_the_end_of_the_hold_does_not_empty_the_pool() {
    let mut pool = tracker(None);
    pool.step(at(0), good(&["10.1.0.4"]));
    pool.step(at(5), nxdomain());
    pool.step(at(20), failure());
    assert!(!pool.pool().members.is_empty());
}

#[test]
fn other_networks_take_members_out_at_once() {
    let mut pool = tracker(Some(10));
    pool.step(at(0), good(&["10.1.0.4", "10.1.1.4"]));
    assert!(pool.reconfigure(timing(None), Guard::from(vec!["10.1.1.0/24".parse().unwrap()])));
    assert_eq!(pool.pool().members, members(&["10.1.1.4"]));
}

/// What can happen to a tracker.
#[derive(Clone, Debug)]
enum Event {
    Outcome(Outcome),
    Evidence(Evidence),
}

fn host() -> impl Strategy<Value = PoolMember> {
    (0u8..2, 1u8..6, 0u8..8).prop_map(|(net, host, place)| {
        let address = match place {
            0 => format!("192.0.2.{host}:443"),
            1 => format!("127.0.0.{host}:443"),
            _ => format!("10.1.{net}.{host}:443"),
        };
        PoolMember::new(address.parse().unwrap(), 1)
    })
}

fn event() -> impl Strategy<Value = Event> {
    let hosts = || proptest::collection::btree_set(host(), 1..10);
    prop_oneof![
        5 => (hosts(), 0u64..60).prop_map(|(members, ttl)| {
            Event::Outcome(Outcome::Answer { members, ttl: Duration::from_secs(ttl) })
        }),
        2 => Just(Event::Outcome(failure())),
        2 => Just(Event::Outcome(nxdomain())),
        2 => (hosts(), any::<bool>()).prop_map(|(members, checked)| {
            let dead = members.iter().map(|member| member.address).filter(|_| checked).collect();
            Event::Evidence(Evidence { checked, dead })
        }),
    ]
}

fn addresses(pool: &Pool) -> BTreeSet<SocketAddr> {
    pool.members.iter().map(|member| member.address).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Says nothing about how the tracker keeps its books: only what may leave a pool, when, and on whose word.
    #[test]
    fn whatever_happens_no_member_leaves_without_enough_reason(
        valid in proptest::option::of(1u64..30),
        steps in proptest::collection::vec((event(), 0u64..8), 1..80),
    ) {
        let mut pool = tracker(valid);
        let (mut now, mut evidence) = (Duration::ZERO, Evidence::default());
        // Since when every answer has been empty, and since when every answer has been too small for the pool.
        let (mut empty_since, mut small_since): (Option<Duration>, Option<(Duration, usize)>) = (None, None);
        let hold = HOLD.max(Duration::from_secs(valid.unwrap_or(0)));
        for (event, pause) in steps {
            now += Duration::from_secs(pause);
            let outcome = match event {
                Event::Evidence(new) => {
                    evidence = new.clone();
                    let before = pool.pool().clone();
                    pool.heed(new);
                    prop_assert_eq!(pool.pool(), &before, "only an answer changes a pool");
                    continue;
                }
                Event::Outcome(outcome) => outcome,
            };
            let before = pool.pool().clone();
            let step = pool.step(now, outcome.clone());
            let after = pool.pool().clone();
            prop_assert_eq!(step.changed, after != before);
            prop_assert!(after.members.iter().all(|member| guard().refuses(member.address.ip()).is_none()));
            prop_assert!(step.next > Duration::ZERO && step.next <= Duration::from_secs(valid.unwrap_or(60).max(1)));
            let (was, is) = (addresses(&before), addresses(&after));
            match outcome {
                Outcome::Failure { .. } => prop_assert_eq!(&is, &was),
                Outcome::Negative { .. } => {
                    let since = *empty_since.get_or_insert(now);
                    small_since = None;
                    if now - since < hold || (evidence.checked && !was.is_subset(&evidence.dead)) {
                        prop_assert_eq!(&is, &was);
                    }
                    if is.is_empty() {
                        prop_assert!(was.is_empty() || now - since >= hold);
                    }
                }
                Outcome::Answer { members, .. } => {
                    let named: BTreeSet<SocketAddr> = members.iter().map(|member| member.address).collect();
                    let named: BTreeSet<SocketAddr> =
                        named.into_iter().filter(|one| guard().refuses(one.ip()).is_none()).collect();
                    if named.is_empty() {
                        prop_assert_eq!(&is, &was);
                        continue;
                    }
                    empty_since = None;
                    prop_assert!(named.is_subset(&is), "what is named counts at once");
                    prop_assert!(is.is_subset(&(&named | &was)));
                    // Half is counted from the pool that the first small answer found.
                    let (since, base) = small_since.unwrap_or((now, was.len()));
                    if named.len() * 2 < base {
                        small_since = Some((since, base));
                        let left: BTreeSet<SocketAddr> = &was - &is;
                        if now - since < SHRINK_HOLD {
                            prop_assert!(left.is_subset(&evidence.dead), "{left:?} left within the hold");
                        }
                    }
                    if pool.held().is_none() {
                        small_since = None;
                        prop_assert_eq!(&is, &named);
                    }
                }
            }
        }
    }
}
