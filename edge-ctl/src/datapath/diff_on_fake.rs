//! The diff's promises, checked on the fake after every single write.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
};

use edge_common::maps::{ServiceKey, mode};
use proptest::prelude::*;

use super::fake::FakeDatapath;
use crate::{
    desired::{Announced, DesiredBackend, DesiredFrontend, DesiredState, Exclusion, Timeouts},
    model::{
        ANY_PORT, Balance, Frontend, Mode, PathAttributes, PoolMember, Protection, Protocol, RangeAction, Selection,
        Snat, TableShape, Tier,
    },
    reconcile::{
        diff::{Plan, Reserved, diff},
        narrow,
        ports::{self, Action, DatapathPort, DatapathState, service_key},
        protect as ranges,
    },
};

fn fill(members: &[PoolMember], _: TableShape) -> Arc<[u16]> {
    let slots = members.iter().zip(0_u16..).flat_map(|(member, index)| vec![index; usize::from(member.weight)]);
    slots.cycle().take(131).collect()
}

fn backend(host: u8, weight: u16, excluded: Option<Exclusion>) -> DesiredBackend {
    DesiredBackend {
        address: SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 1, 0, host)), 443),
        weight,
        limit: None,
        share: 100,
        tier: Tier::Primary,
        excluded,
        facts: crate::desired::Facts::favourable("dns"),
        node: None,
        source: "dns",
        snat_address: Some(IpAddr::V4(Ipv4Addr::new(172, 16, 1, 88))),
    }
}

fn frontend(host: u8, port: u16, protocol: Protocol) -> Frontend {
    Frontend { address: SocketAddr::new(IpAddr::V4(Ipv4Addr::new(172, 16, 1, host)), port), protocol }
}

fn service(mode: Mode, pool: Option<Vec<DesiredBackend>>) -> DesiredFrontend {
    DesiredFrontend {
        service: "ingress".to_owned(),
        mode,
        balance: Balance::Maglev,
        selection: Selection::default(),
        snat: Snat::default(),
        protection: Protection::default(),
        timeouts: Timeouts::of(Protocol::Tcp),
        panic: None,
        announced: if pool.iter().flatten().any(|b| b.eligible()) { Announced::Yes } else { Announced::Off },
        dedicated: false,
        pool,
    }
}

fn state(frontends: Vec<(Frontend, DesiredFrontend)>) -> DesiredState {
    let mut state = DesiredState {
        frontends: frontends.into_iter().map(|(key, desired)| (key, desired.into())).collect(),
        ..DesiredState::default()
    };
    for (frontend, desired) in &state.frontends {
        state.addresses.insert(frontend.address.ip());
        if desired.announced == Announced::Yes {
            state.announcements.insert(frontend.address.ip().into(), PathAttributes::default());
        }
    }
    state
}

/// A fake datapath and what BGP was told.
#[derive(Clone, Default)]
struct World {
    fake: FakeDatapath,
    announced: BTreeMap<ipnet::IpNet, PathAttributes>,
}

impl World {
    fn snapshot(&mut self) -> DatapathState {
        let mut state = self.fake.snapshot().unwrap();
        state.announced = self.announced.clone();
        state
    }

    fn plan(&mut self, desired: &DesiredState, reserved: &Reserved) -> Plan {
        diff(desired, &self.snapshot(), reserved, &fill)
    }

    fn apply(&mut self, action: &Action) {
        match action {
            Action::Announce { prefix, attributes } => drop(self.announced.insert(*prefix, attributes.clone())),
            Action::Withdraw { prefix } => drop(self.announced.remove(prefix)),
            _ => drop(self.fake.apply(action).unwrap()),
        }
    }

    fn reach(&mut self, desired: &DesiredState) -> Plan {
        let plan = self.plan(desired, &Reserved::default());
        plan.actions.iter().for_each(|action| self.apply(action));
        plan
    }

    /// What must hold after every write, told from what a packet would meet.
    fn check(&mut self) -> Result<(), String> {
        let state = self.snapshot();
        for (key, number) in &state.index {
            let slot = state.services.get(number).ok_or(format!("{key:?} leads to service {number}, which is free"))?;
            let entry = &slot.entry;
            if (entry.address, entry.port, entry.protocol) != (key.address, key.port, key.protocol) {
                return Err(format!("{key:?} leads to the service of another frontend"));
            }
            if !state.filter.destinations.contains(&edge_common::address::filter_bit(&key.address)) {
                return Err(format!("{key:?} is in the index but not in the filter"));
            }
            if entry.selection == 0 {
                continue;
            }
            let region = state.regions.get(&entry.selection).ok_or(format!("service {number} has no region"))?;
            if region.table.is_empty() || region.table.iter().any(|slot| usize::from(*slot) >= region.pool.len()) {
                return Err(format!("the table of service {number} is not whole"));
            }
            for backend in &region.pool {
                let Some(slot) = state.backends.get(backend) else {
                    return Err(format!("service {number} selects backend {backend}, which is free"));
                };
                if slot.entry.service != *number {
                    return Err(format!("service {number} selects backend {backend} of another service"));
                }
                if !state.filter.destinations.contains(&edge_common::address::filter_bit(&slot.entry.snat_address)) {
                    return Err(format!("replies to backend {backend} would not pass the filter"));
                }
                let is_source = state.filter.sources.contains(&edge_common::address::filter_bit(&slot.entry.address));
                if entry.mode == mode::DNAT && slot.eligible() && !is_source {
                    return Err(format!("replies of dnat backend {backend} would not pass the filter"));
                }
            }
        }
        for (key, number) in state.backend_index.iter() {
            if !state.backends.contains_key(number) {
                return Err(format!("{key:?} leads to backend {number}, which is free"));
            }
        }
        let regions: Vec<_> = state.regions.iter().map(|(first, region)| (*first, first + region.chunks())).collect();
        if regions.windows(2).any(|pair| pair[0].1 > pair[1].0) {
            return Err("regions overlap".to_owned());
        }
        for prefix in self.announced.keys() {
            let serves = state.index.iter().any(|(key, number)| {
                let slot = &state.services[number];
                prefix.addr() == ports::ip(key.address) && slot.entry.selection != 0
            });
            if !serves {
                return Err(format!("{prefix} is announced, but nothing there has a pool"));
            }
        }
        Ok(())
    }

    /// Flows on a backend and its service, so that both must drain.
    fn set_flows(&mut self, number: u32, flows: u64) {
        let service = self.fake.backends.get(&number).map_or(0, |entry| entry.service);
        self.fake.flows.backends.insert(number, flows);
        self.fake.flows.services.insert(service, flows);
    }
}

fn arbitrary_pool() -> impl Strategy<Value = Option<Vec<DesiredBackend>>> {
    let member = (1_u8..12, 1_u16..4, prop::option::weighted(0.2, Just(Exclusion::NoRoute)));
    let pool = prop::collection::btree_map(1_u8..12, member, 0..6).prop_map(|members| {
        members.into_iter().map(|(host, (_, weight, excluded))| backend(host, weight, excluded)).collect()
    });
    prop::option::weighted(0.9, pool)
}

fn arbitrary_state() -> impl Strategy<Value = DesiredState> {
    let key = (88_u8..91, prop::sample::select(vec![8080_u16, 8443, ANY_PORT]), any::<bool>());
    let key = key.prop_map(|(host, port, tcp)| frontend(host, port, if tcp { Protocol::Tcp } else { Protocol::Udp }));
    let value = (any::<bool>(), arbitrary_pool());
    let value = value.prop_map(|(dnat, pool)| service(if dnat { Mode::Dnat } else { Mode::FullNat }, pool));
    let of_every_port = |(key, mut value): (Frontend, DesiredFrontend)| {
        if key.takes_every_port() {
            value.pool.iter_mut().flatten().for_each(|backend| backend.address.set_port(ANY_PORT));
        }
        (key, value)
    };
    prop::collection::vec((key, value).prop_map(of_every_port), 0..5).prop_map(state)
}

fn eligible(state: &DatapathState, key: &Frontend) -> BTreeSet<(SocketAddr, u16)> {
    let Some(number) = state.index.get(&service_key(key.address, key.protocol)) else {
        return BTreeSet::new();
    };
    let backends = state.backends.values().filter(|slot| slot.entry.service == *number && slot.eligible());
    backends.map(|slot| (slot.address(), ports::weight_of(slot.state))).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_datapath_is_valid_after_every_write_of_every_list(
        wishes in prop::collection::vec(arbitrary_state(), 1..5),
        flows in prop::collection::vec((1_u32..20, 0_u64..3), 0..6),
    ) {
        let mut world = World::default();
        for wish in &wishes {
            for (number, count) in &flows {
                world.set_flows(*number, *count);
            }
            for action in world.plan(wish, &Reserved::default()).actions {
                world.apply(&action);
                prop_assert_eq!(world.check(), Ok(()), "after {:?}", action);
            }
        }
    }

    #[test]
    fn a_second_look_at_a_reached_state_finds_nothing_to_do(
        wishes in prop::collection::vec(arbitrary_state(), 1..4),
    ) {
        let mut world = World::default();
        for wish in &wishes {
            world.reach(wish);
        }
        let again = world.plan(&wishes[wishes.len() - 1], &Reserved::default());
        prop_assert_eq!(again.actions, vec![]);
    }

    #[test]
    fn a_daemon_that_dies_at_any_write_is_followed_by_one_that_gets_there(
        first in arbitrary_state(),
        second in arbitrary_state(),
        third in arbitrary_state(),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut world = World::default();
        world.reach(&first);
        let plan = world.plan(&second, &Reserved::default());
        let cut = cut.index(plan.actions.len() + 1);
        plan.actions.iter().take(cut).for_each(|action| world.apply(action));
        // BGP forgets what a dead daemon told it.
        world.announced.clear();
        for action in world.plan(&third, &Reserved::default()).actions {
            world.apply(&action);
            prop_assert_eq!(world.check(), Ok(()), "after {:?}", action);
        }
        let reached = world.snapshot();
        for (key, wanted) in &third.frontends {
            if let Some(pool) = &wanted.pool {
                let wanted: BTreeSet<_> =
                    pool.iter().filter(|b| b.eligible()).map(|b| (b.address, b.weight)).collect();
                prop_assert_eq!(eligible(&reached, key), wanted, "{}", key);
            }
        }
        let is_wanted = |key| ports::frontend_of(key).is_some_and(|key| third.frontends.contains_key(&key));
        prop_assert!(reached.index.keys().all(is_wanted));
        prop_assert_eq!((*reached.filter).clone(), reached.needed_filter());
        prop_assert_eq!(&world.plan(&third, &Reserved::default()).actions, &vec![]);
    }

    /// The restarted daemon may die again, after every single write.
    #[test]
    fn after_a_death_at_every_single_write_the_next_one_gets_there(
        first in arbitrary_state(),
        second in arbitrary_state(),
    ) {
        let mut start = World::default();
        start.reach(&first);
        let actions = start.plan(&second, &Reserved::default()).actions;
        for cut in 0..=actions.len() {
            let mut world = start.clone();
            actions.iter().take(cut).for_each(|action| world.apply(action));
            world.announced.clear();
            for action in world.plan(&second, &Reserved::default()).actions {
                world.apply(&action);
                prop_assert_eq!(world.check(), Ok(()), "after {} writes and {:?}", cut, action);
            }
            prop_assert_eq!(&world.plan(&second, &Reserved::default()).actions, &vec![], "after {} writes", cut);
            let reached = world.snapshot();
            prop_assert_eq!((*reached.filter).clone(), reached.needed_filter());
        }
    }

    /// Who is in the pools, and who of them may serve, changes at random.
    #[test]
    fn the_narrow_way_leads_where_the_whole_diff_leads_and_is_valid_after_every_write(
        wish in arbitrary_state(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), 1_u8..12, prop::option::of(0_u16..4)), 1..6),
        flows in prop::collection::vec((1_u32..20, 0_u64..3), 0..6),
    ) {
        let mut world = World::default();
        world.reach(&wish);
        for (number, count) in flows {
            world.set_flows(number, count);
        }
        let mut next: Vec<_> = wish.frontends.iter().map(|(key, desired)| (*key, (**desired).clone())).collect();
        for (which, host, weight) in changes {
            let Some(at) = (!next.is_empty()).then(|| which.index(next.len())) else { break };
            let Some(pool) = &mut next[at].1.pool else { continue };
            let address = backend(host, 1, None).address;
            pool.retain(|member| member.address != address);
            if let Some(weight) = weight {
                pool.push(backend(host, weight.max(1), (weight == 0).then_some(Exclusion::NoRoute)));
            }
            pool.sort_by_key(|member| member.address);
        }
        let next = state(next.into_iter().map(|(key, desired)| (key, service(desired.mode, desired.pool))).collect());
        let excluded = narrow::exclusions(&wish, &next, &world.snapshot());
        for action in &excluded {
            world.apply(action);
            prop_assert_eq!(world.check(), Ok(()), "after {:?}", action);
        }
        let actual = world.snapshot();
        for (key, desired) in &next.frontends {
            let Some(pool) = &desired.pool else { continue };
            let may_serve: BTreeSet<_> = pool.iter().filter(|b| b.eligible()).map(|b| b.address).collect();
            let open: BTreeSet<_> = eligible(&actual, key).into_iter().map(|(address, _)| address).collect();
            prop_assert!(open.is_subset(&may_serve), "an exclusion waits for the rest");
        }
        let mut members: BTreeMap<u32, BTreeSet<u32>> = BTreeMap::new();
        for (number, slot) in actual.backends.iter() {
            members.entry(slot.entry.service).or_default().insert(*number);
        }
        let plan = narrow::narrow(&wish, &next, &actual, &members, &Reserved::default(), &fill);
        let is_dnat = |(_, desired): (_, &Arc<DesiredFrontend>)| desired.mode == Mode::Dnat;
        prop_assert!(plan.is_some() || next.frontends.iter().any(is_dnat), "only the dnat index concerns other services");
        let Some(plan) = plan else { return Ok(()) };
        for action in &plan.actions {
            world.apply(action);
            prop_assert_eq!(world.check(), Ok(()), "after {:?}", action);
        }
        let reached = world.snapshot();
        for (key, wanted) in &next.frontends {
            let Some(pool) = &wanted.pool else { continue };
            let wanted: BTreeSet<_> = pool.iter().filter(|b| b.eligible()).map(|b| (b.address, b.weight)).collect();
            prop_assert_eq!(eligible(&reached, key), wanted, "{}", key);
        }
        prop_assert_eq!(&world.announced, &next.announcements);
        let resting = Reserved {
            backends: reached.backends.keys().copied().collect(),
            services: reached.services.keys().copied().collect(),
            ..Reserved::default()
        };
        prop_assert_eq!(world.plan(&next, &resting).actions, vec![]);
    }

    #[test]
    fn a_region_that_was_just_replaced_is_not_written_again(
        wishes in prop::collection::vec(arbitrary_state(), 2..5),
    ) {
        let mut world = World::default();
        let mut reserved = Reserved::default();
        for wish in &wishes {
            let plan = world.plan(wish, &reserved);
            for action in &plan.actions {
                if let Action::WriteRegion { first_chunk, region } = action {
                    let end = first_chunk + region.chunks();
                    let clear = reserved.regions.iter().all(|(first, length)| end <= *first || first + length <= *first_chunk);
                    prop_assert!(clear, "{first_chunk}..{end} was retired a moment ago");
                }
                world.apply(action);
            }
            reserved.regions.extend(plan.retired);
        }
    }
}

fn one(pool: Vec<DesiredBackend>) -> DesiredState {
    state(vec![(frontend(88, 8443, Protocol::Tcp), service(Mode::FullNat, Some(pool)))])
}

fn kinds(plan: &Plan) -> Vec<&'static str> {
    plan.actions.iter().map(Action::kind).collect()
}

#[test]
fn a_new_service_is_reachable_last_and_announced_after_that() {
    let plan = World::default().plan(&one(vec![backend(4, 1, None)]), &Reserved::default());
    let expected = [
        "put-backend",
        "set-filter",
        "set-backend-state",
        "write-region",
        "put-label",
        "put-service",
        "set-index",
        "announce",
    ];
    assert_eq!(kinds(&plan), expected);
}

#[test]
fn losing_a_backend_is_one_write_first_and_a_table_without_it_next() {
    let mut world = World::default();
    world.reach(&one(vec![backend(4, 1, None), backend(5, 1, None)]));
    world.set_flows(1, 3);
    let gone = one(vec![backend(5, 1, None)]);
    let plan = world.reach(&gone);
    assert_eq!(kinds(&plan), ["set-backend-state", "write-region", "put-service"]);
    assert_eq!(plan.actions[0], Action::SetBackendState { number: 1, state: 1 << 16 });
    assert_eq!(world.reach(&gone).actions, [], "it drains");
    world.set_flows(1, 0);
    let resting = Reserved { backends: BTreeSet::from([1]), ..Reserved::default() };
    assert_eq!(world.plan(&gone, &resting).actions, [], "half-open flows may still name it");
    assert_eq!(kinds(&world.reach(&gone)), ["free-backend"]);
}

#[test]
fn a_backend_that_returns_while_it_drains_keeps_its_number_and_its_flows() {
    let mut world = World::default();
    let both = one(vec![backend(4, 1, None), backend(5, 1, None)]);
    world.reach(&both);
    world.set_flows(1, 3);
    world.reach(&one(vec![backend(4, 1, Some(Exclusion::NoRoute)), backend(5, 1, None)]));
    let plan = world.reach(&both);
    assert_eq!(kinds(&plan), ["set-backend-state", "write-region", "put-service"]);
    assert_eq!(world.fake.backends.len(), 2);
}

#[test]
fn a_removed_service_leaves_the_index_at_once_and_its_filter_bits_when_its_flows_have_ended() {
    let mut world = World::default();
    world.reach(&one(vec![backend(4, 1, None)]));
    world.set_flows(1, 1);
    let nothing = state(vec![]);
    let plan = world.reach(&nothing);
    assert_eq!(kinds(&plan), ["withdraw", "remove-index", "set-backend-state", "put-service"]);
    assert!(!world.fake.filter.destinations.is_empty(), "established flows still pass the filter");
    world.set_flows(1, 0);
    assert_eq!(kinds(&world.reach(&nothing)), ["free-backend", "free-service", "set-filter"]);
    assert!(world.fake.filter.destinations.is_empty());
    assert!(world.fake.services.is_empty() && world.fake.backends.is_empty() && world.fake.index.is_empty());
}

#[test]
fn a_frontend_of_every_port_and_its_backends_have_keys_beside_those_of_one_port() {
    let kept = DesiredBackend { address: "10.1.0.4:0".parse().unwrap(), ..backend(4, 1, None) };
    let (every, exact) = (frontend(88, ANY_PORT, Protocol::Tcp), frontend(88, 8443, Protocol::Tcp));
    let both = state(vec![
        (every, service(Mode::Dnat, Some(vec![kept]))),
        (exact, service(Mode::Dnat, Some(vec![backend(4, 1, None)]))),
    ]);
    let mut world = World::default();
    world.reach(&both);
    let ports = |keys: Vec<&ServiceKey>| keys.into_iter().map(|key| u16::from_be(key.port)).collect::<BTreeSet<_>>();
    assert_eq!(ports(world.fake.index.keys().collect()), BTreeSet::from([ANY_PORT, 8443]));
    assert_eq!(ports(world.fake.backend_index.keys().collect()), BTreeSet::from([ANY_PORT, 443]));
    assert_eq!(world.plan(&both, &Reserved::default()).actions, [], "what is there is found again");
    let only = state(vec![(every, both.frontends[&every].as_ref().clone())]);
    world.reach(&only);
    assert_eq!(ports(world.fake.index.keys().collect()), BTreeSet::from([ANY_PORT]));
    assert_eq!(ports(world.fake.backend_index.keys().collect()), BTreeSet::from([ANY_PORT]));
}

#[test]
fn a_frontend_whose_pool_was_never_learnt_keeps_what_the_maps_have() {
    let mut world = World::default();
    world.reach(&one(vec![backend(4, 1, None)]));
    let key = frontend(88, 8443, Protocol::Tcp);
    let mut unknown = service(Mode::FullNat, None);
    unknown.announced = Announced::Yes;
    assert_eq!(world.reach(&state(vec![(key, unknown)])).actions, []);
}

#[test]
fn when_no_backend_is_eligible_the_service_lets_go_of_its_pool_and_is_not_announced() {
    let mut world = World::default();
    world.reach(&one(vec![backend(4, 1, None)]));
    let plan = world.reach(&one(vec![backend(4, 1, Some(Exclusion::NoRoute))]));
    assert_eq!(kinds(&plan), ["withdraw", "set-backend-state", "put-service"]);
    assert_eq!(world.fake.services[&1].selection, 0);
    assert!(
        world.fake.index.values().any(|number| *number == 1),
        "new flows are dropped with their reason, not passed"
    );
}

#[test]
fn a_changed_mode_gets_a_new_number_and_the_old_one_drains_with_its_flows() {
    let key = frontend(88, 8443, Protocol::Tcp);
    let pool = || Some(vec![backend(4, 1, None)]);
    let mut world = World::default();
    world.reach(&state(vec![(key, service(Mode::Dnat, pool()))]));
    world.set_flows(1, 2);
    let full_nat = state(vec![(key, service(Mode::FullNat, pool()))]);
    world.reach(&full_nat);
    assert_eq!(world.fake.index.values().copied().collect::<Vec<_>>(), [2]);
    assert_eq!(world.fake.services[&1].mode, mode::DNAT);
    assert!(!world.fake.filter.sources.is_empty(), "replies of the old flows still pass the filter");
    world.set_flows(1, 0);
    world.reach(&full_nat);
    assert!(world.fake.filter.sources.is_empty());
    assert_eq!(world.fake.services.keys().copied().collect::<Vec<_>>(), [2]);
}

#[test]
fn what_does_not_fit_is_named_and_not_announced() {
    let mut world = World::default();
    world.fake.capacity.chunks = 3;
    let plan = world.reach(&one(vec![backend(4, 1, None)]));
    assert!(!kinds(&plan).contains(&"announce") && !kinds(&plan).contains(&"set-index"), "{:?}", kinds(&plan));
    assert!(plan.problems.iter().any(|problem| problem.contains("selection map is full")), "{:?}", plan.problems);
}

#[test]
fn a_weight_change_is_a_new_table_and_adopted_pools_remember_weights() {
    let mut world = World::default();
    world.reach(&one(vec![backend(4, 1, None), backend(5, 1, None)]));
    let plan = world.reach(&one(vec![backend(4, 3, None), backend(5, 1, None)]));
    assert_eq!(kinds(&plan), ["set-backend-state", "write-region", "put-service"]);
    let adopted = world.snapshot().adopted();
    let pool = &adopted[&frontend(88, 8443, Protocol::Tcp)];
    assert_eq!(pool.iter().map(|backend| backend.weight).collect::<Vec<_>>(), [3, 1]);
}

#[test]
fn ranges_are_there_before_the_service_turns_them_on_and_go_after_it_turned_them_off() {
    use edge_common::maps::service_flag;
    let allowed = |prefixes: &[&str]| {
        let mut service = service(Mode::Dnat, Some(vec![backend(4, 1, None)]));
        let ranges = &mut service.protection.source_ranges;
        ranges.refuse_others = !prefixes.is_empty();
        ranges.ranges.extend(prefixes.iter().map(|prefix| (prefix.parse().unwrap(), RangeAction::Allow)));
        state(vec![(frontend(88, 8443, Protocol::Tcp), service)])
    };
    let mut world = World::default();
    for (wish, count) in [
        (allowed(&["192.0.2.0/24", "198.51.100.7/32"]), 2),
        (allowed(&["192.0.2.0/24", "203.0.113.0/24"]), 2),
        (allowed(&[]), 0),
        (allowed(&["192.0.2.0/24"]), 1),
        (DesiredState::default(), 0),
    ] {
        for action in world.plan(&wish, &Reserved::default()).actions {
            world.apply(&action);
            let state = world.snapshot();
            for number in state.index.values() {
                let refuses = state.services[number].entry.flags & service_flag::SOURCES_REFUSED_BY_DEFAULT != 0;
                let first = ranges::range_key(*number, &"192.0.2.0/24".parse().unwrap());
                assert!(!refuses || state.ranges.contains_key(&first), "who may stay is shut out after {action:?}");
            }
        }
        assert_eq!(world.snapshot().ranges.len(), count);
        assert_eq!(world.plan(&wish, &Reserved::default()).actions, []);
    }
}
