//! The reconciler's loop on the fake datapath: errors, retries, drains, audits.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test stops at the first broken assumption"
)]

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use edge_ctl::{
    datapath::fake::FakeDatapath,
    desired::{Announced, DesiredBackend, DesiredFrontend, DesiredState, Exclusion, Timeouts},
    model::{
        Balance, Frontend, Mode, PathAttributes, PoolMember, Protection, Protocol, Selection, Snat, TableShape, Tier,
    },
    reconcile::{
        actor::{Intervals, Reconciler, ReconcilerStatus},
        ports::{
            Action, AnnouncementPort, DatapathPort, DatapathState, FlowCounts, NumberSets, PortError, service_key,
        },
    },
};
use ipnet::IpNet;
use tokio::sync::watch;

/// A fake that the test can reach while the loop owns it.
#[derive(Clone, Default)]
struct Shared(Arc<Mutex<FakeDatapath>>, Arc<Reads>);

/// How often the loop has read.
#[derive(Default)]
struct Reads {
    /// The whole maps.
    snapshots: AtomicU64,
    /// Numbers whose flows it asked for.
    counts: AtomicU64,
}

impl DatapathPort for Shared {
    fn snapshot(&mut self) -> Result<DatapathState, PortError> {
        self.1.snapshots.fetch_add(1, Ordering::Relaxed);
        self.0.lock().unwrap().snapshot()
    }

    fn flow_counts(&mut self, of: &NumberSets) -> Result<FlowCounts, PortError> {
        self.1.counts.fetch_add((of.services.len() + of.backends.len()) as u64, Ordering::Relaxed);
        self.0.lock().unwrap().flow_counts(of)
    }

    fn apply(&mut self, action: &Action) -> Result<u64, PortError> {
        self.0.lock().unwrap().apply(action)
    }
}

#[derive(Clone, Default)]
struct Bgp(Arc<Mutex<BTreeMap<IpNet, PathAttributes>>>);

impl AnnouncementPort for Bgp {
    fn announced(&self) -> BTreeMap<IpNet, PathAttributes> {
        self.0.lock().unwrap().clone()
    }

    fn announce(&mut self, prefix: IpNet, attributes: &PathAttributes) -> Result<(), PortError> {
        self.0.lock().unwrap().insert(prefix, attributes.clone());
        Ok(())
    }

    fn withdraw(&mut self, prefix: IpNet) -> Result<(), PortError> {
        self.0.lock().unwrap().remove(&prefix);
        Ok(())
    }
}

fn desired(backends: &[&str]) -> DesiredState {
    let address: IpAddr = "172.16.1.88".parse().unwrap();
    let backend = |text: &&str| DesiredBackend {
        address: text.parse().unwrap(),
        weight: 1,
        limit: None,
        share: 100,
        tier: Tier::Primary,
        excluded: None,
        facts: edge_ctl::desired::Facts::favourable("dns"),
        node: None,
        source: "dns",
        snat_address: Some(address),
    };
    let service = DesiredFrontend {
        service: "ingress".to_owned(),
        mode: Mode::FullNat,
        balance: Balance::Maglev,
        selection: Selection::default(),
        snat: Snat::default(),
        panic: None,
        protection: Protection::default(),
        timeouts: Timeouts::of(Protocol::Tcp),
        pool: Some(backends.iter().map(backend).collect()),
        announced: Announced::Yes,
        dedicated: false,
    };
    let frontend = Frontend { address: SocketAddr::new(address, 8443), protocol: Protocol::Tcp };
    DesiredState {
        frontends: BTreeMap::from([(frontend, service.into())]),
        announcements: BTreeMap::from([(address.into(), PathAttributes::default())]),
        addresses: [address].into(),
        ..DesiredState::default()
    }
}

fn fill(members: &[PoolMember], _: TableShape) -> Arc<[u16]> {
    let members = u16::try_from(members.len()).unwrap();
    if members == 0 { Arc::default() } else { (0..131).map(|slot: u16| slot % members).collect() }
}

fn quick() -> Intervals {
    let soon = Duration::from_millis(10);
    Intervals { audit: soon, drain: soon, retry: soon, region_rest: Duration::ZERO, number_rest: Duration::ZERO }
}

struct Running {
    fake: Shared,
    bgp: Bgp,
    desired: watch::Sender<Option<Arc<DesiredState>>>,
    status: watch::Receiver<ReconcilerStatus>,
}

fn start(intervals: Intervals) -> Running {
    let (fake, bgp) = (Shared::default(), Bgp::default());
    let reconciler = Reconciler::new(fake.clone(), bgp.clone(), Box::new(fill), intervals).unwrap();
    let (desired, wanted) = watch::channel(None);
    let (report, status) = watch::channel(ReconcilerStatus::default());
    tokio::spawn(reconciler.run(wanted, report));
    Running { fake, bgp, desired, status }
}

impl Running {
    async fn until(&mut self, condition: impl FnMut(&ReconcilerStatus) -> bool) -> ReconcilerStatus {
        let reached = tokio::time::timeout(Duration::from_secs(20), self.status.wait_for(condition)).await;
        reached.expect("in time").unwrap().clone()
    }
}

#[tokio::test]
async fn a_failing_write_shows_in_the_status_and_the_rest_follows_once_it_works_again() {
    let mut running = start(quick());
    running.fake.0.lock().unwrap().fail_after = Some(4);
    running.desired.send_replace(Some(desired(&["10.1.0.4:443"]).into()));
    let failed = running.until(|status| status.error.is_some()).await;
    assert!(!failed.in_sync && failed.error.unwrap().contains("told to fail"));
    assert!(running.bgp.announced().is_empty(), "nothing is announced before the maps are written");
    running.fake.0.lock().unwrap().fail_after = None;
    let status = running.until(|status| status.in_sync).await;
    assert_eq!((status.error, status.state.index.len()), (None, 1));
    assert_eq!(running.bgp.announced().len(), 1);
}

#[tokio::test]
async fn a_drained_backend_is_freed_when_its_last_flow_has_ended() {
    let mut running = start(quick());
    running.desired.send_replace(Some(desired(&["10.1.0.4:443", "10.1.1.5:443"]).into()));
    running.until(|status| status.in_sync && status.state.backends.len() == 2).await;
    running.fake.0.lock().unwrap().flows.backends.insert(1, 1);
    // An audit carries the flow count into memory before the backend goes.
    running.until(|status| status.state.backends[&1].active == 1).await;
    running.desired.send_replace(Some(desired(&["10.1.1.5:443"]).into()));
    let excluded = running.until(|status| !status.state.backends[&1].eligible()).await;
    let audits = excluded.audits;
    let later = running.until(|status| status.audits > audits + 2).await;
    assert!(later.state.backends.contains_key(&1), "it still has a flow");
    running.fake.0.lock().unwrap().flows.backends.clear();
    let status = running.until(|status| !status.state.backends.contains_key(&1)).await;
    assert_eq!(status.actions["free-backend"], 1);
}

#[tokio::test]
async fn an_audit_finds_what_somebody_else_changed_and_repairs_it() {
    let mut running = start(quick());
    running.desired.send_replace(Some(desired(&["10.1.0.4:443"]).into()));
    running.until(|status| status.in_sync && status.audits > 1).await;
    running.fake.0.lock().unwrap().states.insert(1, 0);
    running.until(|status| status.audit_findings == 1).await;
    running.until(|status| status.state.backends[&1].eligible()).await;
    assert_eq!(running.fake.0.lock().unwrap().states[&1] & 1, 1);
    assert_eq!(running.status.borrow().problems, Vec::<String>::new());
}

#[tokio::test]
async fn nothing_is_written_while_nothing_changes() {
    let mut running = start(quick());
    running.desired.send_replace(Some(desired(&["10.1.0.4:443"]).into()));
    let first = running.until(|status| status.in_sync).await;
    running.desired.send_replace(Some(desired(&["10.1.0.4:443"]).into()));
    let later = running.until(|status| status.audits > first.audits + 5).await;
    assert_eq!((later.map_writes, later.audit_findings), (first.map_writes, 0));
}

/// The state with this many services, of which one has excluded this many of its backends.
fn many(services: u16, (changed, excluded): (u16, usize)) -> DesiredState {
    let one = desired(&["10.1.0.4:443", "10.1.0.5:443", "10.1.0.6:443", "10.1.0.7:443"]);
    let (frontend, like) = one.frontends.first_key_value().unwrap();
    let frontends = (0..services).map(|number| {
        let mut service = (**like).clone();
        service.service = format!("service-{number}");
        let out = if number == changed { excluded } else { 0 };
        for backend in service.pool.iter_mut().flatten().take(out) {
            backend.excluded = Some(Exclusion::Down);
        }
        let address = SocketAddr::new(frontend.address.ip(), 1000 + number);
        (Frontend { address, protocol: Protocol::Tcp }, service.into())
    });
    DesiredState { frontends: frontends.collect(), ..one }
}

#[tokio::test]
async fn a_change_of_one_service_costs_its_own_plan_and_writes_however_many_others_there_are() {
    const SERVICES: u16 = 500;
    // No audit comes between.
    let mut running = start(Intervals::default());
    let mut writes = Vec::new();
    running.desired.send_replace(Some(many(SERVICES, (0, 0)).into()));
    let mut before = running.until(|status| status.in_sync).await;
    assert!(before.planned >= u64::from(SERVICES));
    let reads = |running: &Running| running.fake.1.snapshots.load(Ordering::Relaxed);
    let at_start = reads(&running);
    for (service, excluded) in [(7, 1), (7, 2), (7, 0), (499, 1), (499, 0)] {
        running.desired.send_replace(Some(many(SERVICES, (service, excluded)).into()));
        let after = running.until(|status| status.applied > before.applied).await;
        assert_eq!(after.planned - before.planned, 1, "service {service} with {excluded} out");
        writes.push(after.map_writes - before.map_writes);
        let out = after.state.backends.values().filter(|slot| !slot.eligible()).count();
        assert_eq!(out, excluded);
        before = after;
    }
    assert!(writes.iter().all(|writes| *writes <= 12), "a state word for each backend, a region, an entry: {writes:?}");
    assert_eq!(reads(&running), at_start, "nothing was read back");
    assert_eq!(running.fake.1.counts.load(Ordering::Relaxed), 0, "who is out on order is not waited for");
}

#[tokio::test]
async fn members_that_come_and_go_and_a_vip_that_goes_with_the_last_one_cost_the_plan_of_their_service() {
    const SERVICES: u16 = 500;
    let mut running = start(Intervals::default());
    let whole = many(SERVICES, (0, 0));
    let vip = *whole.announcements.first_key_value().unwrap().0;
    running.desired.send_replace(Some(whole.clone().into()));
    let mut before = running.until(|status| status.in_sync).await;
    let highest = *before.state.backends.last_key_value().unwrap().0;
    let of = |state: &DesiredState| *state.frontends.keys().nth(7).unwrap();
    let change = |change: &dyn Fn(&mut DesiredFrontend)| {
        let mut state = whole.clone();
        change(Arc::make_mut(state.frontends.get_mut(&of(&whole)).unwrap()));
        state
    };
    let grown = change(&|service| {
        let pool = service.pool.as_mut().unwrap();
        let more = DesiredBackend { address: "10.1.0.8:443".parse().unwrap(), ..pool[0].clone() };
        pool.push(more);
    });
    let shrunk = change(&|service| drop(service.pool.as_mut().unwrap().remove(0)));
    let mut empty = change(&|service| service.pool = Some(Vec::new()));
    empty.announcements.clear();
    for (state, pool, announced) in [(&grown, 5, true), (&shrunk, 3, true), (&empty, 0, false), (&grown, 5, true)] {
        running.desired.send_replace(Some(state.clone().into()));
        let after = running.until(|status| status.applied > before.applied).await;
        assert_eq!(after.planned - before.planned, 1, "{pool} members");
        let key = service_key(of(&whole).address, Protocol::Tcp);
        let selection = after.state.services[&after.state.index[&key]].entry.selection;
        let serve = after.state.regions.get(&selection).map_or(0, |region| region.pool.len());
        assert_eq!(serve, pool);
        assert_eq!(running.bgp.0.lock().unwrap().contains_key(&vip), announced);
        before = after;
    }
    assert_eq!(
        *before.state.backends.last_key_value().unwrap().0,
        highest + 1,
        "the lowest free number, and its own again"
    );
}

#[tokio::test]
async fn while_a_backend_drains_only_its_own_flows_are_counted_and_nothing_is_planned_until_the_last_has_ended() {
    const SERVICES: u16 = 100;
    let mut running = start(Intervals { audit: Duration::from_secs(3600), ..quick() });
    let whole = many(SERVICES, (0, 0));
    running.desired.send_replace(Some(whole.clone().into()));
    running.until(|status| status.in_sync).await;
    running.fake.0.lock().unwrap().flows.backends.insert(1, 1);
    let mut less = whole;
    let first = less.frontends.values_mut().next().unwrap();
    Arc::make_mut(first).pool.as_mut().unwrap().remove(0);
    running.desired.send_replace(Some(less.into()));
    let reads = Arc::clone(&running.fake.1);
    let counted = move || reads.counts.load(Ordering::Relaxed);
    running.until(|status| !status.state.backends[&1].eligible()).await;
    let (looked, settled) = (counted(), running.until(|_| counted() > 5).await);
    let later = running.until(|_| counted() > looked + 10).await;
    assert_eq!(later.planned, settled.planned, "ten looks at one backend");
    assert!(later.state.backends.contains_key(&1));
    running.fake.0.lock().unwrap().flows.backends.clear();
    let status = running.until(|status| !status.state.backends.contains_key(&1)).await;
    assert_eq!(status.actions["free-backend"], 1);
}
