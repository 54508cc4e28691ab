//! What the API shows: rows out of the maps, completed with what only the daemon knows.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::{
    sync::{mpsc, oneshot, watch},
    time::interval,
};
use tracing::warn;

use super::{
    Request, SharedState, acl, audit,
    bgp_orders::BgpOrders,
    lock,
    recorder::{self, Told},
};
use crate::{
    api::{BoxFuture, Views},
    bgp::BgpHandle,
    datapath::{
        acl_view::acl_rows,
        answer::answer_from_pins,
        kernel_view::{Counted, KernelView, Rates},
        pins::FLOW_TABLES,
    },
    desired::{DesiredBackend, DesiredState, Exclusion},
    fib::FibHandle,
    model::{
        BackendVerb, Endpoint, FlowSelector, Frontend, HealthKey, Protocol,
        capture::{CaptureOrder, CaptureRow},
        query::{AclRow, Answer, ConfigChange, ConfigRow, Query, ViewError},
        scope,
        view::{BackendRow, ConditionRow, HealthRow, MapRow, ServiceRow, StatusRow},
    },
    reconcile::{
        actor::ReconcilerStatus,
        ports::{BackendSlot, PortError, service_key, socket_address, wire},
    },
    sources::{dns::DnsHandle, health::HealthHandle},
};

/// Between two samples of the counters behind the rates.
const SAMPLE: Duration = Duration::from_secs(1);
/// Backends whose counters are read for one sample: 50,000 have their turn every 13 s.
const BACKENDS_AT_ONCE: u32 = 4096;

/// Rates of the newest sample.
type Sampled = Arc<Mutex<Rates>>;

/// The parts of the daemon that answer for themselves.
pub struct Parts {
    /// Routes.
    pub fib: FibHandle,
    /// Peers, where BGP is configured.
    pub bgp: Option<BgpHandle>,
    /// Orders for their sessions.
    pub sessions: BgpOrders,
    /// Names.
    pub dns: DnsHandle,
    /// Checks.
    pub health: HealthHandle,
}

/// Answers the API's questions.
pub struct DaemonViews {
    shared: SharedState,
    fib: FibHandle,
    bgp: Option<BgpHandle>,
    sessions: BgpOrders,
    dns: DnsHandle,
    health: HealthHandle,
    reconciler: watch::Receiver<ReconcilerStatus>,
    requests: mpsc::Sender<Request>,
    kernel: Arc<KernelView>,
    sampled: Sampled,
    told: Arc<Mutex<Told>>,
}

impl DaemonViews {
    /// Opens the maps for reading and starts sampling their counters.
    ///
    /// # Errors
    /// Where a map cannot be opened.
    pub fn new(
        shared: SharedState,
        parts: Parts,
        reconciler: watch::Receiver<ReconcilerStatus>,
        requests: mpsc::Sender<Request>,
        told: Arc<Mutex<Told>>,
    ) -> Result<Self, PortError> {
        let Parts { fib, bgp, sessions, dns, health } = parts;
        let kernel = Arc::new(lock(&shared).datapath.view()?);
        let sampled = Sampled::default();
        tokio::spawn(sample(Arc::clone(&kernel), reconciler.clone(), Arc::clone(&sampled)));
        Ok(Self { shared, fib, bgp, sessions, dns, health, reconciler, requests, kernel, sampled, told })
    }

    async fn answer_one(&self, query: Query) -> Result<Answer, ViewError> {
        let bgp =
            || self.bgp.as_ref().ok_or_else(|| ViewError::NotFound("there is no [bgp] in the configuration".into()));
        Ok(match query {
            Query::Status => Answer::Status(Box::new(self.status().await?)),
            Query::Services => Answer::Services(self.services()?),
            Query::Backends => Answer::Backends(self.backends()?),
            Query::Dns => Answer::Dns(self.dns.rows()),
            Query::DnsZones => Answer::DnsZones(self.dns.zones()),
            Query::DnsQuery { name, record, resolver } => {
                Answer::DnsRecords(self.dns.look_up(&name, record, resolver.as_deref()).await?)
            }
            Query::DnsRefresh { name } => {
                if self.dns.refresh(name.as_deref()) == 0 {
                    let what = name.as_deref().unwrap_or("anything");
                    return Err(ViewError::NotFound(format!("no service asks DNS for {what}")));
                }
                Answer::Dns(self.dns.rows())
            }
            Query::BgpPeers => Answer::BgpPeers(match &self.bgp {
                Some(bgp) => bgp.summary().await,
                None => Vec::new(),
            }),
            Query::BgpRoutes => Answer::BgpRoutes(bgp()?.routes().await),
            Query::BgpReceived(peer) => Answer::BgpRoutes(self.peer(peer).await?.received(peer).await),
            Query::BgpAdvertised(peer) => Answer::BgpRoutes(self.peer(peer).await?.advertised(peer).await),
            Query::BgpMessages(peer) => Answer::BgpMessages(self.peer(peer).await?.messages(peer).await),
            Query::BgpOrder(order) => {
                let bgp = bgp()?;
                self.sessions.give(bgp, order).await?;
                Answer::BgpPeers(bgp.summary().await)
            }
            Query::BgpPolicy(question) => {
                let rows = self.peer(question.peer).await?.policy(question).await;
                Answer::BgpPolicy(rows.into_iter().collect())
            }
            Query::Routes => Answer::Routes(self.fib.routes().await),
            Query::Xdp => Answer::Xdp(lock(&self.shared).datapath.xdp_rows()),
            Query::Acl => Answer::Acl(self.acl()?),
            Query::AclAdd { .. } | Query::AclRemove { .. } => return self.change_acl(query).await,
            Query::Events => Answer::Events(recorder::lock(&self.told).events.iter().cloned().collect()),
            Query::Config => Answer::Config(self.config()?),
            Query::Capture(order) => Answer::Capturing(self.capture(&order)?),
            Query::Audit => Answer::Audit(audit::audit(&self.shared, &self.kernel)?),
            Query::Reload => return self.reload().await,
            Query::Change(change) => return self.change(change).await,
            Query::Health => Answer::Health(self.health.rows()),
            Query::HealthHistory => Answer::HealthHistory(self.health.history()),
            Query::Order { service, backend, verb } => Answer::Backends(self.order((service, backend), verb).await?),
            Query::FlowKill(selector) => return self.kill_flows(selector).await,
            Query::Maps => Answer::Maps(self.maps()?),
            Query::Flows { .. } | Query::Map { .. } | Query::Reasons => answer_from_pins(&self.kernel, &query)?,
        })
    }

    async fn peer(&self, peer: std::net::IpAddr) -> Result<&BgpHandle, ViewError> {
        let unknown = || ViewError::NotFound(format!("there is no BGP peer {peer}"));
        // Peers out of a `listen_range` are in no configuration.
        let known = match &self.bgp {
            Some(bgp) => bgp.summary().await.iter().any(|row| scope::parse(&row.neighbor) == Ok(peer)),
            None => false,
        };
        self.bgp.as_ref().filter(|_| known).ok_or_else(unknown)
    }

    fn acl(&self) -> Result<Vec<AclRow>, ViewError> {
        let mut rows = {
            let shared = lock(&self.shared);
            shared.acl.rows(&shared.config.0, acl::now())
        };
        let counted = acl_rows(self.kernel.tables())?;
        let hits: BTreeMap<_, u64> = counted.iter().map(|row| ((&row.service, &row.prefix), row.hits)).collect();
        for row in &mut rows {
            row.hits = hits.get(&(&row.service, &row.prefix)).copied().unwrap_or(0);
        }
        Ok(rows)
    }

    async fn change_acl(&self, query: Query) -> Result<Answer, ViewError> {
        let (reply, answer) = oneshot::channel();
        let stopping = || ViewError::Unavailable("the daemon is stopping".into());
        self.requests.send(Request::Acl(query, reply)).await.map_err(|_| stopping())?;
        let service = answer.await.map_err(|_| stopping())??;
        let mut rows = self.acl()?;
        rows.retain(|row| row.service == service);
        Ok(Answer::Acl(rows))
    }

    fn services(&self) -> Result<Vec<ServiceRow>, ViewError> {
        let mut rows = self.kernel.service_rows()?;
        let (desired, age) = {
            let shared = lock(&self.shared);
            (Arc::clone(&shared.desired), shared.started.elapsed().as_secs())
        };
        let state = Arc::clone(&self.reconciler.borrow().state);
        let sampled = lock_rates(&self.sampled);
        for row in &mut rows {
            row.age = age;
            let Some(key) = frontend(&row.vip, &row.proto) else { continue };
            if let Some(number) = state.index.get(&service_key(key.address, key.protocol)) {
                (row.conn_s, row.rx_s, row.tx_s) = sampled.service(*number);
            }
            let Some(frontend) = desired.frontends.get(&key) else { continue };
            row.announced = frontend.announced.to_string();
            row.panic = frontend.panic.is_some();
            if let Some(pool) = &frontend.pool {
                row.backends = format!("{}/{}", frontend.eligible(), pool.len());
            }
        }
        Ok(rows)
    }

    fn backends(&self) -> Result<Vec<BackendRow>, ViewError> {
        let checked = self.health.rows().into_iter().map(|row| ((row.service.clone(), row.backend.clone()), row));
        Ok(self.complete(self.kernel.backend_rows()?, &checked.collect()))
    }

    /// The rows of one backend, one for each listen address of its service. What it costs does not depend on how many
    /// others there are.
    fn backend(&self, key: &HealthKey) -> Result<Vec<BackendRow>, ViewError> {
        let (service, address) = key;
        let state = Arc::clone(&self.reconciler.borrow().state);
        let (wire, port) = (wire(address.ip()), address.port().to_be());
        let of = |slot: &BackendSlot| {
            let is_there = slot.entry.address == wire && slot.entry.port == port;
            is_there && state.services.get(&slot.entry.service).is_some_and(|slot| slot.label == *service)
        };
        let numbers = state.backends.iter().filter(|(_, slot)| of(slot)).map(|(number, _)| *number).collect();
        let checked = self.health.row(key).map(|row| ((row.service.clone(), row.backend.clone()), row));
        Ok(self.complete(self.kernel.backend_rows_of(&numbers)?, &checked.into_iter().collect()))
    }

    /// Rows out of the maps with what only the daemon knows.
    fn complete(
        &self,
        rows: Vec<(u32, BackendRow)>,
        checked: &BTreeMap<(String, String), HealthRow>,
    ) -> Vec<BackendRow> {
        let (desired, drained) = {
            let shared = lock(&self.shared);
            (Arc::clone(&shared.desired), shared.drained.clone())
        };
        let now = Instant::now();
        let row = |(number, mut row): (u32, BackendRow)| {
            (row.conn_s, row.rx_s, row.tx_s) = lock_rates(&self.sampled).backend(number);
            row.snat = lock(&self.shared).swept.snat(number);
            let Some(key) = row_key(&row) else { return row };
            let Some(backend) = desired_backend(&desired, &key, &row.service) else { return row };
            describe(&mut row, backend);
            if backend.excluded == Some(Exclusion::Draining)
                && drained.contains(&(row.service.clone(), backend.address))
            {
                "drained".clone_into(&mut row.state);
            }
            row.downtime = lock(&self.shared).downtimes.of(now, &key).as_secs();
            if let Some(checked) = checked.get(&(row.service.clone(), row.backend.clone())) {
                (row.fails, row.unavail) = (checked.fails, checked.unavail);
                row.ejections = checked.ejections;
                (row.last_check, row.connect) = (checked.last_check, checked.connect);
            }
            row
        };
        rows.into_iter().map(row).collect()
    }

    /// The flow tables are not walked for this: the sweep has counted them.
    fn maps(&self) -> Result<Vec<MapRow>, ViewError> {
        let counted = lock(&self.shared).swept.counted(Instant::now());
        let known = |map: &str| {
            let known = || {
                let (age, entries) = counted.as_ref()?;
                Some((*entries.get(map)?, age.as_secs()))
            };
            FLOW_TABLES.contains(&map).then(|| Counted(known()))
        };
        Ok(self.kernel.map_rows_with(known)?)
    }

    fn config(&self) -> Result<ConfigRow, ViewError> {
        let shared = lock(&self.shared);
        let text = shared.texts.iter().map(|(_, text)| text.as_str()).collect::<Vec<_>>().join("\n");
        let file = shared.texts.first().map_or(&shared.file, |(file, _)| file).display().to_string();
        Ok(ConfigRow { file, age: shared.config.1.elapsed().as_secs(), text })
    }

    fn capture(&self, order: &CaptureOrder) -> Result<CaptureRow, ViewError> {
        let state = Arc::clone(&self.reconciler.borrow().state);
        let unknown = || ViewError::NotFound(format!("there is no frontend or service `{}`", order.vip));
        let found = state.index.iter().find_map(|(key, number)| {
            let slot = state.services.get(number)?;
            let vip = Endpoint(socket_address(key.address, key.port));
            (slot.label == order.vip || vip.to_string() == order.vip).then(|| (*number, vip, slot.label.clone()))
        });
        let (number, vip, service) = found.ok_or_else(unknown)?;
        let backend = match &order.backend {
            None => 0,
            Some(wanted) => {
                let mine = |slot: &BackendSlot| {
                    slot.entry.service == number && Endpoint(slot.address()).to_string() == *wanted
                };
                let found = state.backends.iter().find(|(_, slot)| mine(slot)).map(|(number, _)| *number);
                found.ok_or_else(|| ViewError::NotFound(format!("{service} has no backend `{wanted}`")))?
            }
        };
        let mut shared = lock(&self.shared);
        let ordered = shared.datapath.capture(number, backend, order.length, order.seconds);
        ordered.map_err(|error| ViewError::Internal(error.to_string()))?;
        Ok(CaptureRow { service, vip: vip.to_string() })
    }

    async fn reload(&self) -> Result<Answer, ViewError> {
        let gone = || ViewError::Unavailable("the daemon is stopping".into());
        let (reply, answer) = oneshot::channel();
        self.requests.send(Request::Reload(reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?.map(Answer::Reloaded)
    }

    async fn change(&self, change: ConfigChange) -> Result<Answer, ViewError> {
        let gone = || ViewError::Unavailable("the daemon is stopping".into());
        let (reply, answer) = oneshot::channel();
        self.requests.send(Request::Change(change, reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?.map(Answer::Reloaded)
    }

    async fn kill_flows(&self, selector: FlowSelector) -> Result<Answer, ViewError> {
        let gone = || ViewError::Unavailable("the daemon is stopping".into());
        // A service that is gone from the configuration may have flows still.
        let known = self.reconciler.borrow().state.services.values().any(|slot| slot.label == selector.service);
        if !known {
            return Err(ViewError::NotFound(format!("there is no service `{}`", selector.service)));
        }
        let (reply, answer) = oneshot::channel();
        self.requests.send(Request::KillFlows(selector, reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?.map(Answer::Killed)
    }

    async fn order(&self, key: HealthKey, verb: BackendVerb) -> Result<Vec<BackendRow>, ViewError> {
        let gone = || ViewError::Unavailable("the daemon is stopping".into());
        let (reply, answer) = oneshot::channel();
        self.requests.send(Request::Order { key: key.clone(), verb, reply }).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())??;
        self.backend(&key)
    }

    async fn status(&self) -> Result<StatusRow, ViewError> {
        let services = self.services()?;
        let backends = self.backends()?;
        let peers = match &self.bgp {
            Some(bgp) => bgp.summary().await,
            None => Vec::new(),
        };
        let fib = self.fib.status().await;
        let reconciler = self.reconciler.borrow().clone();
        let (access, events_lost) = {
            let told = recorder::lock(&self.told);
            (told.access, told.lost.saturating_add(told.unqueued))
        };
        let shared = lock(&self.shared);
        let mut problems = shared.problems.clone();
        let attaching = |name: &str| format!("{name}: attaching; the kernel verifies the program");
        problems.extend(shared.datapath.waiting().map(attaching));
        problems.extend(reconciler.error.clone());
        problems.extend(reconciler.problems.clone());
        problems.extend(shared.swept.problems().iter().cloned());
        problems.extend(fib.dump_error.clone());
        problems.extend(fib.errors.iter().map(|(prefix, error)| format!("route {prefix}: {error}")));
        let down = |row: &&crate::model::view::BgpPeerRow| row.state != "Established";
        problems.extend(peers.iter().filter(down).map(|row| format!("BGP peer {} is {}", row.neighbor, row.state)));
        let empty = services.iter().filter(|row| row.backends.starts_with("0/"));
        problems.extend(empty.map(|row| format!("service {} ({}) has no eligible backend", row.name, row.vip)));
        let panics =
            shared.desired.frontends.iter().filter_map(|(key, frontend)| Some((key, frontend, frontend.panic?)));
        problems.extend(panics.map(|(key, frontend, (healthy, total))| {
            let service = &frontend.service;
            format!("service {service} ({key}) panics: {healthy} of {total} backends are healthy, so health is ignored")
        }));
        let attached = shared.datapath.xdp_rows().iter().filter(|row| row.program.is_some()).count();
        Ok(StatusRow {
            state: if problems.is_empty() { "ok" } else { "degraded" }.to_owned(),
            problems,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uptime: shared.started.elapsed().as_secs(),
            config: shared.file.display().to_string(),
            services: services.len() as u64,
            backends_eligible: backends.iter().filter(|row| row.state == "up" || row.state == "full").count() as u64,
            backends: backends.len() as u64,
            peers_established: peers.iter().filter(|row| row.state == "Established").count() as u64,
            peers: peers.len() as u64,
            prefixes: shared.prefixes as u64,
            next_hops: fib.objects.hops as u64,
            next_hop_groups: fib.objects.groups as u64,
            flows: services.iter().map(|row| row.active).sum(),
            attached: attached as u64,
            map_writes: reconciler.map_writes + shared.datapath.writes(),
            access_written: access.written,
            access_lost: access.lost,
            events_lost,
            quiet: shared.datapath.quiet_left().map_err(|error| ViewError::Internal(error.to_string()))?,
            edges_lost: shared.edges_lost,
            actions: reconciler.actions,
        })
    }
}

impl Views for DaemonViews {
    fn answer(&self, query: Query) -> BoxFuture<'_, Result<Answer, ViewError>> {
        Box::pin(self.answer_one(query))
    }
}

/// The link of the chain that the program judges, for each new flow, as of now.
fn limit_condition(row: &BackendRow) -> ConditionRow {
    let (active, limit) = (row.active, row.limit);
    let (holds, reason) = match limit {
        0 => (true, "no limit".to_owned()),
        _ if active >= limit => (false, format!("full: {active} of {limit} connections")),
        _ => (true, format!("{active} of {limit} connections")),
    };
    ConditionRow { condition: "limit".to_owned(), holds, reason }
}

/// The frontend that a row is about.
fn frontend(vip: &str, protocol: &str) -> Option<Frontend> {
    let protocol = match protocol {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        _ => return None,
    };
    let Endpoint(address) = vip.parse().ok()?;
    Some(Frontend { address, protocol })
}

/// What is wanted of a row's backend; `None`: it has left the pool and only drains.
fn desired_backend<'a>(desired: &'a DesiredState, key: &BackendKey, service: &str) -> Option<&'a DesiredBackend> {
    let frontend = desired.frontends.get(&key.0).filter(|frontend| frontend.service == service)?;
    frontend.pool.iter().flatten().find(|candidate| candidate.address == key.1)
}

/// What a row's backend is wanted as, and how far that goes.
fn describe(row: &mut BackendRow, backend: &DesiredBackend) {
    backend.source.clone_into(&mut row.source);
    if let Some(node) = &backend.node {
        row.node.clone_from(node);
    }
    if let Some(excluded) = &backend.excluded {
        row.state = excluded.to_string();
    }
    row.conditions = backend.facts.conditions();
    row.conditions.push(limit_condition(row));
    if row.state == "up" && row.limit > 0 && row.active >= row.limit {
        "full".clone_into(&mut row.state);
    }
}

/// A panic elsewhere must not take the views down.
fn lock_rates(sampled: &Sampled) -> MutexGuard<'_, Rates> {
    sampled.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What identifies a row's backend: VIP, protocol, address.
type BackendKey = (Frontend, SocketAddr);

fn row_key(row: &BackendRow) -> Option<BackendKey> {
    Some((frontend(&row.vip, &row.proto)?, row.backend.parse().ok().map(|Endpoint(address)| address)?))
}

/// Keeps the rates fresh. Which numbers are in use the reconciler knows, so that only their counters are read; of many
/// backends, some in each turn.
async fn sample(kernel: Arc<KernelView>, reconciler: watch::Receiver<ReconcilerStatus>, sampled: Sampled) {
    let (start, mut tick, mut failing, mut first) = (Instant::now(), interval(SAMPLE), false, 0_u32);
    loop {
        tick.tick().await;
        let (services, backends) = {
            let state = &reconciler.borrow().state;
            (state.services_end(), state.backends_end())
        };
        let end = first.saturating_add(BACKENDS_AT_ONCE);
        // Behind the last one in use there may be some that no longer are.
        let (turn, next) = if end < backends { (first..end, end) } else { (first..u32::MAX, 0) };
        let tables = kernel.tables();
        let counted = tables.backend_stats_in(&(first..end.min(backends)));
        first = next;
        match (tables.service_stats(services), counted) {
            (Ok(services), Ok(backends)) => {
                lock_rates(&sampled).sample(start.elapsed().as_secs_f64(), &services, (turn, &backends));
                failing = false;
            }
            (Err(error), _) | (_, Err(error)) => {
                if !std::mem::replace(&mut failing, true) {
                    warn!(%error, "the counters could not be read");
                }
            }
        }
    }
}
