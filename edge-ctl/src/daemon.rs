//! The daemon: the one place where the layers are wired together. One loop receives every event, keeps the [`World`]
//! up to date, and publishes the desired state that follows from it; the reconciler does the rest.

mod access_log;
mod acl;
mod announcer;
mod audit;
mod bgp_orders;
mod commit;
mod commits;
mod damping;
mod downtime;
mod drains;
mod flow_ends;
mod host;
mod leave;
mod orders;
mod recorder;
mod slow_start;
mod start;
mod sweep;
mod swept;
mod throttle;
mod traffic;
mod views;
mod world;

use std::{
    collections::BTreeSet,
    net::IpAddr,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use edge_common::midflow::QUIET_SECONDS;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::{mpsc, oneshot, watch},
    time::{MissedTickBehavior, interval, sleep_until},
};
use tracing::{error, info, warn};

pub use start::{StartError, run};

use self::{
    acl::Acl,
    commit::{Commits, Texts},
    damping::Damping,
    downtime::Downtimes,
    orders::Orders,
    recorder::Recorder,
    slow_start::SlowStart,
    sweep::Sweep,
    swept::Swept,
    throttle::Throttle,
    world::World,
};
use crate::{
    bgp::{BgpEvent, BgpHandle},
    config::{
        diff::{self, Changes},
        valid::Config,
    },
    datapath::{kernel_view::KernelView, loader::Datapath, next_hops::NextHops, program_log::ProgramLog},
    desired::{self, DesiredState},
    fib::{FibEvent, FibHandle},
    model::{
        BackendSource, BackendVerb, Endpoint, FlowSelector, HealthKey, PoolSnapshot, Resolver, RouteUpdate,
        query::{ConfigChange, Query, ReloadRow, ViewError},
    },
    notify,
    reconcile::actor::ReconcilerStatus,
    sources::{
        dns::{self, DnsHandle},
        fixed,
        health::{HealthHandle, Verdicts},
    },
};

/// How often host settings are looked at again, neighbours re-read and failed attachments retried.
const HOUSEKEEPING: Duration = Duration::from_secs(2);
/// How often freed memory is given back to the system; after each audit, which holds the maps twice.
const TRIM: Duration = Duration::from_secs(15);
/// Between two orders to all flows to look their routes up again, however much routes flap.
const ROUTE_GENERATION_PAUSE: Duration = Duration::from_millis(100);
/// Route changes told to the kernel between two looks at other events.
const ROUTE_CHUNK: usize = 512;

/// What the views may ask of the loop.
enum Request {
    /// Read the configuration again and apply it.
    Reload(oneshot::Sender<Result<ReloadRow, ViewError>>),
    /// An order for a backend.
    Order {
        /// Which.
        key: HealthKey,
        /// What to change.
        verb: BackendVerb,
        /// Told once it is kept and published.
        reply: oneshot::Sender<Result<(), ViewError>>,
    },
    /// Give or take back a source range; the answer is the service's name.
    Acl(Query, oneshot::Sender<Result<String, ViewError>>),
    /// Compare or change the configuration.
    Change(ConfigChange, oneshot::Sender<Result<ReloadRow, ViewError>>),
    /// End these flows.
    KillFlows(FlowSelector, flow_ends::Reply),
}

/// State that the loop writes and the views read.
struct Shared {
    file: PathBuf,
    /// The texts of the configuration in force.
    texts: Texts,
    started: Instant,
    /// The configuration in force and when it came into force.
    config: (Config, Instant),
    /// The newest desired state.
    desired: Arc<DesiredState>,
    /// Host settings that keep packets from being forwarded, and other findings.
    problems: Vec<String>,
    /// Backends that an administrator drains and that have no flow left.
    drained: BTreeSet<HealthKey>,
    downtimes: Downtimes,
    /// Prefixes learnt by BGP that the kernel was told of.
    prefixes: usize,
    /// Source ranges given at run time.
    acl: Acl,
    swept: Swept,
    /// How often another edge of this group was lost.
    edges_lost: u64,
    /// True until what follows from the first attempt to attach is published.
    starting: bool,
    datapath: Datapath,
}

type SharedState = Arc<Mutex<Shared>>;

/// A panic elsewhere must not take the views down: the data is plain and stays readable.
fn lock(shared: &SharedState) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Everything the loop receives from.
struct Inbox {
    bgp: mpsc::Receiver<BgpEvent>,
    fib: mpsc::Receiver<FibEvent>,
    pools: mpsc::Receiver<PoolSnapshot>,
    requests: mpsc::Receiver<Request>,
    verdicts: watch::Receiver<Arc<Verdicts>>,
    /// SIGHUP, caught from before the start: it must never end the daemon.
    hangup: Signal,
    /// Ends only when the loop has, or by a panic.
    reconciler: oneshot::Receiver<()>,
    /// Likewise.
    sweep: oneshot::Receiver<()>,
    status: watch::Receiver<ReconcilerStatus>,
}

/// What the kernel is being told.
struct Installing {
    /// Route changes; none: it has all.
    changes: Vec<RouteUpdate>,
    /// Done when it has them.
    done: oneshot::Receiver<()>,
}

/// The loop's state.
struct Daemon {
    config: Config,
    world: World,
    shared: SharedState,
    desired: watch::Sender<Option<Arc<DesiredState>>>,
    next_hops: NextHops,
    /// Before the recorder, which writes what it ends.
    sweep: Sweep,
    slow_start: SlowStart,
    damping: Damping,
    next_share: Option<Instant>,
    program_log: ProgramLog,
    recorder: Recorder,
    commits: Commits,
    fib: FibHandle,
    bgp: Option<BgpHandle>,
    dns: DnsHandle,
    health: HealthHandle,
    orders: Orders,
    kernel: KernelView,
    /// Addresses that the host holds on our account, in this life or from an earlier one.
    held: BTreeSet<IpAddr>,
    route_generation: Throttle,
    /// When freed memory is given back to the system.
    next_trim: Instant,
    installing: Installing,
    /// Programs that the kernel verifies.
    loading: host::Loading,
    /// True until the first attempt to attach has come to its end.
    starting: bool,
}

impl Daemon {
    /// Runs until SIGTERM or SIGINT. The datapath, its flows and the routes stay; BGP says goodbye.
    async fn run(mut self, mut inbox: Inbox) -> std::io::Result<()> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut housekeeping = interval(HOUSEKEEPING);
        housekeeping.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut watchdog = interval(notify::watchdog_interval().unwrap_or(HOUSEKEEPING));
        watchdog.set_missed_tick_behavior(MissedTickBehavior::Delay);
        self.refresh_kernel_prefixes().await;
        self.fixed_pools();
        self.learn_snat_sources((*self.world.backend_addresses()).clone()).await;
        self.hold_addresses().await;
        // The kernel takes seconds to verify a program that is new to it: the reconciler writes the maps meanwhile.
        self.publish();
        self.attach();
        self.end_start(&inbox.status);
        let speaks = self.bgp.is_some();
        loop {
            let (bump_at, share_at) = (self.route_generation.due(), self.next_share);
            let back_at = self.commits.due();
            tokio::select! {
                event = inbox.bgp.recv(), if speaks => self.on_bgp(event.ok_or_else(|| ended("BGP"))?).await,
                event = inbox.fib.recv() => self.on_fib(event.ok_or_else(|| ended("the kernel's routes"))?).await,
                Some(pool) = inbox.pools.recv() => self.on_pools(pool, &mut inbox.pools).await,
                Some(request) = inbox.requests.recv() => self.on_request(request).await,
                Ok(()) = inbox.verdicts.changed() => {
                    let verdicts = Arc::clone(&inbox.verdicts.borrow_and_update());
                    let services = world::services_of_changes(&self.world.verdicts, &verdicts);
                    self.world.verdicts = verdicts;
                    self.publish_of(Some(&services));
                    self.dns.heed(dns::gather(&self.config, &self.world.verdicts));
                }
                _ = inbox.hangup.recv() => {
                    if let Err(error) = self.reload().await {
                        error!(%error, "the configuration was not reloaded; the running one stays");
                    }
                }
                () = std::future::ready(()), if self.world.has_changes() => self.install_routes().await,
                _ = &mut self.installing.done, if !self.installing.changes.is_empty() => self.on_installed().await,
                () = sleep_until(bump_at.unwrap_or_else(Instant::now).into()), if bump_at.is_some() => {
                    self.bump_route_generation();
                }
                () = sleep_until(share_at.unwrap_or_else(Instant::now).into()), if share_at.is_some() => self.publish(),
                () = sleep_until(back_at.unwrap_or_else(Instant::now).into()), if back_at.is_some() => {
                    self.roll_back_in_time().await;
                }
                Some(loaded) = self.loading.join_next() => self.on_loaded(loaded, &inbox.status),
                _ = housekeeping.tick() => self.housekeeping().await,
                _ = watchdog.tick() => notify::alive(),
                _ = &mut inbox.reconciler => return Err(ended("the datapath")),
                _ = &mut inbox.sweep => return Err(ended("idle flows")),
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
            }
        }
        notify::stopping();
        info!("stopping: flows, maps and routes stay in the kernel for the next start");
        if let Some(bgp) = &self.bgp {
            if let Some(drain) = self.config.bgp.as_ref().and_then(|bgp| bgp.drain) {
                self.leave(bgp, drain, &mut terminate).await;
            }
            bgp.shutdown().await;
        }
        Ok(())
    }

    async fn on_request(&mut self, request: Request) {
        // Whoever asked may have gone.
        match request {
            Request::Order { key, verb, reply } => drop(reply.send(self.order(&key, verb))),
            Request::Reload(reply) => drop(reply.send(self.reload().await)),
            Request::Change(change, reply) => drop(reply.send(self.change_config(change).await)),
            Request::KillFlows(selector, reply) => self.sweep.kill(selector, reply),
            Request::Acl(change, reply) => drop(reply.send(self.change_acl(&change))),
        }
    }

    fn change_acl(&mut self, change: &Query) -> Result<String, ViewError> {
        let now = acl::now();
        let changed = acl::change(&mut lock(&self.shared).acl, &self.config, change, now)?;
        self.publish();
        Ok(changed)
    }

    async fn on_bgp(&mut self, event: BgpEvent) {
        match event {
            BgpEvent::Routes(updates) => {
                // Backends behind a lost route stop being eligible before anything else happens.
                let lost = self.world.hear(updates);
                if !lost.is_empty() {
                    let services = self.world.services_at(&lost);
                    self.publish_of(Some(&services));
                }
            }
            BgpEvent::PeerUp { address } => info!(peer = %address, "BGP session established"),
            BgpEvent::PeerDown { address, reason, peer_edge } => {
                warn!(peer = %address, %reason, "BGP session lost");
                if peer_edge {
                    self.peer_edge_lost(address);
                }
            }
            BgpEvent::Converged => {
                self.world.converged();
                self.settle_routes().await;
            }
        }
    }

    /// Flows of another edge come here now, or to a third one: nobody is told yet that their flow is not known.
    fn peer_edge_lost(&mut self, peer: IpAddr) {
        let mut shared = lock(&self.shared);
        shared.edges_lost += 1;
        match shared.datapath.begin_quiet() {
            Ok(()) => info!(
                %peer,
                seconds = QUIET_SECONDS,
                "another edge is lost: unknown connections are not reset for a while, since their packets may yet find the \
                 edge that knows them"
            ),
            Err(error) => warn!(%peer, %error, "unknown connections may be reset although another edge is lost"),
        }
    }

    /// Begins to tell the kernel some of the route changes that wait.
    async fn install_routes(&mut self) {
        let changes = self.world.next_changes(ROUTE_CHUNK);
        self.installing = Installing { changes: changes.clone(), done: self.fib.begin_apply(changes).await };
    }

    /// The kernel has what it was told.
    async fn on_installed(&mut self) {
        let changes = std::mem::take(&mut self.installing.changes);
        let moved = self.world.in_kernel(&changes);
        lock(&self.shared).prefixes = self.world.learnt().len();
        if !moved.is_empty() {
            self.route_generation.ask(Instant::now());
            let services = self.world.services_at(&moved);
            self.learn_snat_sources(moved).await;
            self.publish_of(Some(&services));
        }
        let appeared = changes.iter().filter(|change| !change.next_hops.is_empty());
        let appeared: Vec<_> = appeared.map(|change| change.prefix).collect();
        self.dns.rerouted(&appeared);
        self.settle_routes().await;
    }

    /// Once BGP has converged and the kernel has its routes, those that an earlier life left go.
    async fn settle_routes(&mut self) {
        let Some(moved) = self.world.settle() else { return };
        info!(prefixes = self.world.learnt().len(), "BGP has converged");
        self.publish();
        if let Some(bgp) = &self.bgp {
            tokio::spawn(announcer::end_restart(bgp.clone(), std::sync::Arc::clone(&self.shared)));
        }
        self.fib.finish_restart(self.world.learnt()).await;
        if !moved.is_empty() {
            self.route_generation.ask(Instant::now());
            self.learn_snat_sources(moved).await;
            self.publish();
        }
    }

    async fn on_fib(&mut self, event: FibEvent) {
        match event {
            FibEvent::NeighbourChanged { ifindex, address, mac: Some(mac) } => {
                match self.next_hops.set_mac(ifindex, address, mac) {
                    Ok(true) => info!(%address, ifindex, "a next hop has a new MAC"),
                    Ok(false) => {}
                    Err(error) => warn!(%error, %address, "a next hop's MAC could not be updated"),
                }
            }
            // The flow's next packet goes through the stack, which resolves the neighbour again.
            FibEvent::NeighbourChanged { .. } => {}
            FibEvent::LinkChanged { name, up, .. } => {
                if self.config.edge.interfaces.contains(&name) {
                    info!(interface = name, up, "link changed");
                    self.attach();
                }
                self.refresh_kernel_prefixes().await;
                self.route_generation.ask(Instant::now());
                self.publish();
            }
            FibEvent::RoutesChanged | FibEvent::AddressChanged => {
                if self.refresh_kernel_prefixes().await {
                    self.route_generation.ask(Instant::now());
                }
                self.dns.own_addresses(&self.fib.own_addresses().await);
                self.publish();
                self.learn_snat_sources((*self.world.backend_addresses()).clone()).await;
                self.publish();
            }
            FibEvent::ForeignChange { prefix } => warn!(%prefix, "somebody else changed one of our routes; repaired"),
        }
    }

    /// Many services may ask for one name: all that has come by now makes one new state.
    async fn on_pools(&mut self, first: PoolSnapshot, more: &mut mpsc::Receiver<PoolSnapshot>) {
        let (mut sources, mut fresh, mut next) = (BTreeSet::new(), BTreeSet::new(), Some(first));
        while let Some(pool) = next {
            let known = |address: &IpAddr| self.world.snat_sources.contains_key(address);
            fresh.extend(pool.members.iter().map(|member| member.address.ip()).filter(|address| !known(address)));
            sources.insert(pool.source.clone());
            self.world.hear_pool(&self.config, pool);
            next = more.try_recv().ok();
        }
        if self.world.has_many_sources() {
            self.world.forget_sources();
        }
        self.learn_snat_sources(fresh).await;
        let services = self.config.services.values().filter(|service| sources.contains(&service.backends));
        let services = services.map(|service| service.name.clone()).collect();
        self.publish_of(Some(&services));
    }

    /// Builds the desired state and hands it to the reconciler.
    fn publish(&mut self) {
        self.publish_of(None);
    }

    /// As [`Daemon::publish`], where nothing has changed but what concerns these services.
    fn publish_of(&mut self, services: Option<&BTreeSet<String>>) {
        let mut shared = lock(&self.shared);
        // Maps that are still filled from maps of an earlier layout are left alone: what is removed there would come back.
        if self.starting && shared.datapath.is_migrating() {
            return;
        }
        // An interface that comes by a reload and waits for its program takes no VIP away.
        let ready = shared.datapath.is_ready() || self.world.datapath_ready && shared.datapath.only_waits();
        let services = self.world.concerned(services.filter(|_| ready == self.world.datapath_ready));
        self.world.datapath_ready = ready;
        let mut desired = self.world.desired_of(&self.config, services);
        shared.acl.overlay(&mut desired, acl::now());
        let now = Instant::now();
        let next_share = self.slow_start.apply(now, self.world.adopted(), &mut desired);
        let next_announcement = self.damping.apply(now, &self.config, self.world.adopted(), &mut desired);
        self.next_share = next_share.into_iter().chain(next_announcement).min();
        let desired = Arc::new(desired);
        self.desired.send_if_modified(|published| {
            let changed = published.as_ref() != Some(&desired);
            if changed {
                *published = Some(Arc::clone(&desired));
            }
            changed
        });
        self.health.retarget(desired::targets(&self.config, &desired, services), services);
        self.sweep.down(flow_ends::down(&self.config, &desired));
        shared.downtimes.look(Instant::now(), &desired);
        shared.desired = desired;
    }

    /// Orders are for backends that there are: a mistyped address must not wait in a file for its backend to come.
    fn order(&mut self, key: &HealthKey, verb: BackendVerb) -> Result<(), ViewError> {
        let (service, backend) = key;
        let known = {
            let shared = lock(&self.shared);
            let listens = self.config.services.get(service).into_iter().flat_map(|service| &service.listen);
            let mut pools = listens.filter_map(|frontend| shared.desired.frontends.get(frontend)?.pool.as_ref());
            pools.any(|pool| pool.iter().any(|one| one.address == *backend))
        };
        if !known && !self.orders.all().contains_key(key) {
            let help = "`edge-ctl backend list` names them";
            return Err(ViewError::NotFound(format!(
                "service `{service}` has no backend {}; {help}",
                Endpoint(*backend)
            )));
        }
        self.orders.give(key, verb)?;
        self.world.orders.clone_from(self.orders.all());
        self.publish_of(Some(&BTreeSet::from([service.clone()])));
        self.look_at_drains();
        Ok(())
    }

    fn look_at_drains(&mut self) {
        self.orders.look(&self.kernel);
        lock(&self.shared).drained.clone_from(self.orders.drained());
    }

    fn bump_route_generation(&mut self) {
        self.route_generation.done(Instant::now());
        if let Err(error) = lock(&self.shared).datapath.bump_route_generation() {
            warn!(%error, "flows could not be told to look their routes up again");
        }
    }

    fn fixed_pools(&mut self) {
        for service in self.config.services.values() {
            if let Some(pool) = fixed::snapshot(&service.backends, &self.config.edge.pod_networks) {
                self.world.set_pool(pool);
            }
        }
    }

    async fn apply_config(&mut self, new: Config) -> Result<Changes, ViewError> {
        let changes = diff::changes(&self.config, &new);
        let new = diff::until_restart(&self.config, new);
        match (&self.bgp, &new.bgp) {
            (Some(handle), Some(bgp)) if self.config.bgp.as_ref() != Some(bgp) => {
                handle.reload(bgp.clone()).await.map_err(|error| ViewError::Invalid(vec![error.to_string()]))?;
            }
            _ => {}
        }
        self.config = new;
        self.recorder.reload(&self.config.access_log);
        let current = Arc::clone(&lock(&self.shared).desired);
        self.world.reconfigure(&self.config, &current);
        let guard = dns_guard(&self.config, self.fib.own_addresses().await);
        self.dns.reconfigure(dns_sources(&self.config), guard);
        self.dns.heed(dns::gather(&self.config, &self.world.verdicts));
        self.fixed_pools();
        if let Err(error) = self.orders.forget_others(&self.config) {
            warn!(%error, "orders for services that are gone stay in the file");
        }
        self.world.orders.clone_from(self.orders.all());
        {
            let mut shared = lock(&self.shared);
            shared.datapath.reconfigure(&self.config.edge);
            shared.config = (self.config.clone(), Instant::now());
        }
        self.attach();
        self.world.host_faults = host::faults(&host::problems(&self.config));
        self.learn_new_snat_sources().await;
        self.hold_addresses().await;
        self.publish();
        Ok(changes)
    }
}

/// One of the tasks without which nothing can go on: the service manager starts the daemon anew, and the kernel forwards
/// meanwhile.
fn ended(what: &str) -> std::io::Error {
    std::io::Error::other(format!("the task that looks after {what} has ended, which is a defect; see the log"))
}

/// Every VIP.
fn addresses(config: &Config) -> BTreeSet<IpAddr> {
    config.services.values().flat_map(|service| &service.listen).map(|frontend| frontend.address.ip()).collect()
}

/// Names to ask for, with the resolver of each.
fn dns_sources(config: &Config) -> Vec<(BackendSource, Resolver)> {
    let sources: BTreeSet<_> = config.services.values().map(|service| &service.backends).collect();
    let resolver = |source: &BackendSource| match source {
        BackendSource::Dns { resolver, .. } => config.resolvers.get(resolver).cloned(),
        BackendSource::Static(_) => None,
    };
    sources.into_iter().filter_map(|source| Some((source.clone(), resolver(source)?))).collect()
}

/// What an address in an answer must not be.
fn dns_guard(config: &Config, own: BTreeSet<IpAddr>) -> dns::Guard {
    dns::Guard { pod_networks: config.edge.pod_networks.clone(), vips: addresses(config), own }
}
