//! The daemon: the one place where the layers are wired together. One loop receives every event, keeps the [`World`]
//! up to date, and publishes the desired state that follows from it; the reconciler does the rest.

mod announcer;
mod start;
mod views;
mod world;

use std::{
    collections::BTreeSet,
    net::IpAddr,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, oneshot, watch},
    time::{MissedTickBehavior, interval},
};
use tracing::{error, info, warn};

pub use start::{StartError, run};

use self::world::World;
use crate::{
    bgp::{BgpEvent, BgpHandle},
    config::{
        self,
        diff::{self, Changes},
        valid::Config,
    },
    datapath::{loader::Datapath, next_hops::NextHops, program_log::ProgramLog, sweep::Sweeper},
    desired::DesiredState,
    fib::{FibEvent, FibHandle, sysctl},
    model::{
        BackendSource, Mode, PoolSnapshot, Resolver, RouteUpdate,
        query::{ReloadRow, ViewError},
    },
    notify,
    sources::{dns::DnsHandle, fixed},
};

/// How often host settings are looked at again, neighbours re-read and failed attachments retried.
const HOUSEKEEPING: Duration = Duration::from_secs(2);
/// Entries looked at in one step of the sweep: the default table in 16 s.
const SWEEP_BUDGET: usize = 8192;
/// Between two steps of the sweep over established flows.
const SWEEP_STEP: Duration = Duration::from_millis(250);

/// What the views may ask of the loop.
enum Request {
    /// Read the configuration again and apply it.
    Reload(oneshot::Sender<Result<ReloadRow, ViewError>>),
}

/// State that the loop writes and the views read.
struct Shared {
    file: PathBuf,
    started: Instant,
    /// The configuration in force and when it came into force.
    config: (Config, Instant),
    /// The newest desired state.
    desired: DesiredState,
    /// Host settings that keep packets from being forwarded, and other findings.
    problems: Vec<String>,
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
}

/// The loop's state.
struct Daemon {
    config: Config,
    world: World,
    shared: SharedState,
    desired: watch::Sender<Option<DesiredState>>,
    next_hops: NextHops,
    sweeper: Sweeper,
    program_log: ProgramLog,
    fib: FibHandle,
    bgp: Option<BgpHandle>,
    dns: DnsHandle,
    /// Addresses we asked the host to hold.
    held: BTreeSet<IpAddr>,
}

impl Daemon {
    /// Runs until SIGTERM or SIGINT. The datapath, its flows and the routes stay; BGP says goodbye.
    async fn run(mut self, mut inbox: Inbox) -> std::io::Result<()> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut hangup = signal(SignalKind::hangup())?;
        let mut housekeeping = interval(HOUSEKEEPING);
        let mut sweep = interval(SWEEP_STEP);
        sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut watchdog = interval(notify::watchdog_interval().unwrap_or(HOUSEKEEPING));
        self.refresh_kernel_prefixes().await;
        self.fixed_pools();
        self.learn_snat_sources().await;
        self.publish();
        loop {
            tokio::select! {
                Some(event) = inbox.bgp.recv() => self.on_bgp(event).await,
                Some(event) = inbox.fib.recv() => self.on_fib(event).await,
                Some(pool) = inbox.pools.recv() => self.on_pool(pool).await,
                Some(Request::Reload(reply)) = inbox.requests.recv() => {
                    let _ = reply.send(self.reload().await);
                }
                _ = hangup.recv() => {
                    if let Err(error) = self.reload().await {
                        error!(%error, "the configuration was not reloaded; the running one stays");
                    }
                }
                _ = housekeeping.tick() => self.housekeeping().await,
                _ = sweep.tick() => self.sweep(),
                _ = watchdog.tick() => notify::alive(),
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
            }
        }
        notify::stopping();
        info!("stopping: flows, maps and routes stay in the kernel for the next start");
        if let Some(bgp) = &self.bgp {
            bgp.shutdown().await;
        }
        Ok(())
    }

    async fn on_bgp(&mut self, event: BgpEvent) {
        match event {
            BgpEvent::Routes(updates) => self.on_routes(updates).await,
            BgpEvent::PeerUp { address } => info!(peer = %address, "BGP session established"),
            BgpEvent::PeerDown { address, reason } => warn!(peer = %address, %reason, "BGP session lost"),
            BgpEvent::Converged => {
                info!(prefixes = self.world.learnt().len(), "BGP has converged");
                self.world.routes_settled = true;
                self.fib.finish_restart(self.world.learnt()).await;
                self.learn_snat_sources().await;
                self.publish();
            }
        }
    }

    /// Backends behind a lost route stop being eligible before anything else happens.
    async fn on_routes(&mut self, updates: Vec<RouteUpdate>) {
        let moved = self.world.apply_routes(&updates);
        self.publish();
        let reaches_resolver = self.reaches_resolver(&updates);
        self.fib.apply(updates).await;
        if moved {
            self.bump_route_generation();
        }
        self.learn_snat_sources().await;
        self.publish();
        if reaches_resolver {
            self.dns.refresh();
        }
    }

    fn reaches_resolver(&self, updates: &[RouteUpdate]) -> bool {
        let servers = self.config.resolvers.values().flat_map(|resolver| &resolver.servers);
        let appeared = updates.iter().filter(|update| !update.next_hops.is_empty());
        let appeared: Vec<_> = appeared.map(|update| update.prefix).collect();
        servers.into_iter().any(|server| appeared.iter().any(|prefix| prefix.contains(&server.ip())))
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
                self.bump_route_generation();
                self.publish();
            }
            FibEvent::RoutesChanged | FibEvent::AddressChanged => {
                if self.refresh_kernel_prefixes().await {
                    self.bump_route_generation();
                }
                self.learn_snat_sources().await;
                self.publish();
            }
            FibEvent::ForeignChange { prefix } => warn!(%prefix, "somebody else changed one of our routes; repaired"),
        }
    }

    async fn on_pool(&mut self, pool: PoolSnapshot) {
        self.world.pools.insert(pool.source.clone(), pool);
        self.learn_snat_sources().await;
        self.publish();
    }

    /// Builds the desired state and hands it to the reconciler.
    fn publish(&mut self) {
        let mut shared = lock(&self.shared);
        self.world.datapath_ready = shared.datapath.is_ready();
        let desired = self.world.desired(&self.config);
        self.desired.send_if_modified(|published| {
            let changed = published.as_ref() != Some(&desired);
            if changed {
                *published = Some(desired.clone());
            }
            changed
        });
        shared.desired = desired;
    }

    fn bump_route_generation(&self) {
        if let Err(error) = lock(&self.shared).datapath.bump_route_generation() {
            warn!(%error, "flows could not be told to look their routes up again");
        }
    }

    /// True where they changed.
    async fn refresh_kernel_prefixes(&mut self) -> bool {
        let routes = self.fib.kernel_prefixes().await;
        let changed = routes != self.world.kernel_routes;
        self.world.kernel_routes = routes;
        changed
    }

    /// Asks the kernel which of our addresses it would use towards each backend, and has the way there resolved.
    async fn learn_snat_sources(&mut self) {
        for backend in self.world.backend_addresses() {
            let Some(source) = self.fib.source_for(backend).await else { continue };
            if self.world.snat_sources.insert(backend, source).is_none() {
                self.fib.resolve(backend).await;
            }
        }
    }

    fn fixed_pools(&mut self) {
        for service in self.config.services.values() {
            if let Some(pool) = fixed::snapshot(&service.backends, &self.config.edge.pod_networks) {
                self.world.pools.insert(pool.source.clone(), pool);
            }
        }
    }

    /// Attaches where the program is missing; failures are logged once and shown in the status until they pass.
    fn attach(&self) {
        let mut shared = lock(&self.shared);
        let before: BTreeSet<String> = shared.problems.iter().cloned().collect();
        for (interface, error) in shared.datapath.attach_missing() {
            let text = format!("{interface}: {error}");
            if !before.contains(&text) {
                error!(interface, %error, "the program is not attached; trying again");
                shared.problems.push(text);
            }
        }
    }

    async fn housekeeping(&mut self) {
        let mut problems: Vec<String> = host_problems(&self.config);
        let ready = {
            let mut shared = lock(&self.shared);
            let before: BTreeSet<String> = shared.problems.iter().cloned().collect();
            let failures = shared.datapath.attach_missing();
            problems.extend(failures.iter().map(|(interface, error)| format!("{interface}: {error}")));
            problems.extend(shared.datapath.notes().iter().cloned());
            for problem in problems.iter().filter(|problem| !before.contains(*problem)) {
                warn!(%problem, "degraded");
            }
            if let Err(error) = shared.datapath.refresh_snat_ports() {
                warn!(%error, "the host's own ports are not known");
            }
            shared.problems = problems;
            shared.datapath.is_ready()
        };
        if ready != self.world.datapath_ready {
            self.publish();
        }
        self.hold_addresses().await;
        self.watch_neighbours().await;
        self.program_log.drain();
    }

    /// VIPs that no interface of this host has are held on `lo`, so that the kernel answers ping and closed ports.
    async fn hold_addresses(&mut self) {
        let wanted = lock(&self.shared).desired.addresses.clone();
        for vip in wanted.difference(&self.held.clone()) {
            match self.fib.hold_vip(*vip).await {
                Ok(()) => {
                    self.held.insert(*vip);
                }
                Err(error) => warn!(%vip, %error, "the VIP could not be put on lo"),
            }
        }
        for vip in self.held.clone().difference(&wanted) {
            match self.fib.release_vip(*vip).await {
                Ok(()) => {
                    self.held.remove(vip);
                }
                Err(error) => warn!(%vip, %error, "the VIP could not be taken off lo"),
            }
        }
    }

    async fn watch_neighbours(&self) {
        match self.next_hops.neighbours() {
            Ok(neighbours) => self.fib.watch_neighbours(neighbours.into_iter().collect()).await,
            Err(error) => warn!(%error, "the next hops in use are not known"),
        }
    }

    fn sweep(&mut self) {
        if let Err(error) = self.sweeper.step(SWEEP_BUDGET) {
            warn!(%error, "idle flows could not be swept");
        }
    }

    /// Parses, validates, compares, applies; on any error the running configuration stays.
    async fn reload(&mut self) -> Result<ReloadRow, ViewError> {
        notify::reloading();
        let file = lock(&self.shared).file.clone();
        let result = match config::load(&file) {
            Ok(config) => self.apply_config(config).await,
            Err(error) => Err(ViewError::Invalid(error.lines())),
        };
        notify::ready("serving");
        let Changes { applied, needs_restart } = result?;
        info!(changes = applied.len(), "configuration reloaded");
        Ok(ReloadRow { file: file.display().to_string(), changes: applied, needs_restart })
    }

    async fn apply_config(&mut self, new: Config) -> Result<Changes, ViewError> {
        let changes = diff::changes(&self.config, &new);
        match (&self.bgp, &new.bgp) {
            (Some(handle), Some(bgp)) if self.config.bgp.as_ref() != Some(bgp) => {
                handle.reload(bgp.clone()).await.map_err(|error| ViewError::Invalid(vec![error.to_string()]))?;
            }
            _ => {}
        }
        self.config = new;
        self.world.retain_sources(&self.config);
        self.dns.reconfigure(dns_sources(&self.config), self.config.edge.pod_networks.clone());
        self.fixed_pools();
        {
            let mut shared = lock(&self.shared);
            shared.datapath.reconfigure(&self.config.edge);
            shared.config = (self.config.clone(), Instant::now());
        }
        self.attach();
        self.learn_snat_sources().await;
        self.publish();
        self.hold_addresses().await;
        Ok(changes)
    }
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

/// Kernel settings in the way of forwarding, in words.
fn host_problems(config: &Config) -> Vec<String> {
    let full_nat = config.services.values().any(|service| service.mode == Mode::FullNat);
    sysctl::check(&config.edge.interfaces, full_nat).iter().map(ToString::to_string).collect()
}
