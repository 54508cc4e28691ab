//! Start-up: everything that can be refused is refused before anything is changed.

use std::{
    collections::BTreeSet,
    path::Path,
    sync::{Arc, Mutex},
    time::Instant,
};

use edge_common::{
    maglev::{self, Candidate},
    schedule,
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, oneshot, watch},
    task::JoinSet,
};
use tracing::{info, warn};

use super::{
    Daemon, Inbox, Installing, Orders, ROUTE_GENERATION_PAUSE, Shared,
    acl::{self, Acl},
    announcer::Announcer,
    bgp_orders::BgpOrders,
    commit::{Commits, Texts},
    damping::Damping,
    dns_guard, dns_sources,
    downtime::Downtimes,
    host, lock,
    recorder::Recorder,
    slow_start::SlowStart,
    sweep::{Sweep, Tools},
    swept::Swept,
    throttle::Throttle,
    traffic,
    views::{DaemonViews, Parts},
    world::World,
};
use crate::{
    api,
    bgp::{BgpError, Speaker},
    config::{self, ConfigError, valid::Config},
    datapath::{
        loader::{Datapath, LoadError},
        next_hops::NextHops,
        object::EBPF_OBJECT,
        sys,
        tables::Tables,
    },
    desired::AdoptedBackend,
    fib::{self, FibError, FibOptions},
    model::{Balance, PoolMember},
    notify,
    reconcile::{
        actor::{Intervals, OwnedFill, Reconciler, ReconcilerStatus},
        diff::identity,
        ports::PortError,
    },
    sources::{dns, health},
    state_file::StateFileError,
};

/// Why the daemon did not start, or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration is wrong.
    #[error("{0}")]
    Config(#[from] ConfigError),
    /// Kernel settings would make the stack drop what the program hands to it.
    #[error("this host would not forward packets:\n  {}", .0.join("\n  "))]
    Host(Vec<String>),
    /// The datapath cannot be loaded or adopted.
    #[error("{0}")]
    Load(#[from] LoadError),
    /// A map cannot be read.
    #[error("{0}")]
    Maps(#[from] PortError),
    /// Routes cannot be read or written.
    #[error("{0}")]
    Fib(#[from] FibError),
    /// BGP cannot listen.
    #[error("{0}")]
    Bgp(#[from] BgpError),
    /// The API cannot listen.
    #[error("{0}")]
    Api(#[from] api::BindError),
    /// Orders of the daemon's earlier life cannot be read.
    #[error("{0}")]
    State(#[from] StateFileError),
    /// The runtime, a signal handler or a listener failed.
    #[error("{0}")]
    Io(#[from] std::io::Error),
}

/// Runs the daemon with the configuration in `file` until it is told to stop.
///
/// # Errors
/// What was wrong, where, and what to do about it; nothing has been changed then.
pub fn run(file: &Path) -> Result<(), StartError> {
    sys::keep_heap_small();
    let files = config::read_texts(file)?;
    let config = config::parse_texts(&files)?;
    let mut commits = Commits::load(&config.edge.state_dir)?;
    let (config, texts) = match commits.at_start(&files, acl::now())? {
        Some(texts) => (config::parse_texts(&texts)?, texts),
        None => (config, files),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(start(file, config, texts, commits))
}

async fn start(file: &Path, config: Config, texts: Texts, commits: Commits) -> Result<(), StartError> {
    let hangup = signal(SignalKind::hangup())?;
    let problems = host::problems(&config);
    if !problems.is_empty() {
        return Err(StartError::Host(problems.iter().map(ToString::to_string).collect()));
    }
    let orders = Orders::load(&config.edge.state_dir)?;
    let acl = Acl::load(&config.edge.state_dir)?;
    let listen = api::Listen { socket: config.edge.socket.clone(), http: config.http };
    let bound = api::bind(&listen).await?;
    // Short: what waits there is old news, while changes that wait in the speaker are one per prefix.
    let (bgp_events, bgp_inbox) = mpsc::channel(1);
    let speaker = config.bgp.as_ref().map(|settings| Speaker::bind(settings.clone(), bgp_events)).transpose()?;
    let datapath = Datapath::open(&config.edge, EBPF_OBJECT)?;
    let (fib_events, fib_inbox) = mpsc::channel(256);
    let next_hops = config.bgp.as_ref().map(|bgp| bgp.next_hops).unwrap_or_default();
    let fib = fib::spawn(FibOptions { next_hops, ..FibOptions::default() }, fib_events).await?;
    let bgp = speaker.as_ref().map(Speaker::handle);
    let reconciler = Reconciler::new(
        datapath.port()?,
        Announcer::spawn(bgp.clone()),
        table_filler(datapath.seed()?),
        Intervals::default(),
    )?;
    let mut world = World::new(reconciler.adopted(), fib.stale().await);
    world.orders.clone_from(orders.all());
    let sessions = BgpOrders::load(&config.edge.state_dir)?;
    if let Some(speaker) = speaker {
        let speaker = speaker.shut_down(&sessions.shut_down());
        // What an earlier life left in maps or routes has gone on forwarding without us.
        let forwarded = !world.adopted().is_empty() || fib.stale().await.iter().next().is_some();
        let speaker = if forwarded { speaker.restarting() } else { speaker };
        speaker.start();
    }
    if bgp.is_none() {
        world.converged();
        world.settle();
        fib.finish_restart(world.learnt()).await;
    }
    let (pool_events, pool_inbox) = mpsc::channel(256);
    let dns = dns::spawn_dns(dns_sources(&config), dns_guard(&config, fib.own_addresses().await), pool_events);
    adopt_pools(&dns, &config, &world);
    let health = health::spawn();
    let (desired, desired_inbox) = watch::channel(None);
    let (status, reconciler_status) = watch::channel(ReconcilerStatus::default());
    let next_hops = NextHops::open(datapath.pins())?;
    let (sweeper, ender, tables) = (datapath.sweeper()?, datapath.flow_ender()?, Tables::open(datapath.pins())?);
    let program_log = datapath.program_log()?;
    let recorder = Recorder::start(datapath.events()?, config.access_log.clone())?;
    let shared = Arc::new(Mutex::new(Shared {
        file: file.to_owned(),
        texts,
        started: Instant::now(),
        config: (config.clone(), Instant::now()),
        desired: Arc::default(),
        problems: Vec::new(),
        drained: BTreeSet::new(),
        downtimes: Downtimes::default(),
        prefixes: 0,
        acl,
        swept: Swept::default(),
        edges_lost: 0,
        starting: true,
        datapath,
    }));
    let (requests, request_inbox) = mpsc::channel(4);
    let views = DaemonViews::new(
        Arc::clone(&shared),
        Parts { fib: fib.clone(), bgp: bgp.clone(), sessions, dns: dns.clone(), health: health.clone() },
        reconciler_status.clone(),
        requests,
        recorder.told(),
    )?;
    let kernel = lock(&shared).datapath.view()?;
    let verdicts = health.verdicts();
    let counters = Arc::new(lock(&shared).datapath.view()?);
    tokio::spawn(traffic::watch(Arc::clone(&shared), counters, reconciler_status.clone(), health.clone()));
    let (stop, stopped) = oneshot::channel::<()>();
    let server = tokio::spawn(api::serve_bound(bound, Arc::new(views), async move {
        let _ = stopped.await;
    }));
    let reconciler = reconcile(reconciler.run(desired_inbox, status))?;
    let tools = Tools { sweeper, ender, tables, ended: recorder.inlet(), shared: Arc::clone(&shared) };
    let (sweep, sweep_ended) = Sweep::start(tools)?;
    let daemon = Daemon {
        config,
        world,
        shared,
        desired,
        next_hops,
        sweep,
        slow_start: SlowStart::default(),
        damping: Damping::default(),
        next_share: None,
        program_log,
        recorder,
        commits,
        held: fib.status().await.held,
        fib,
        bgp,
        dns,
        health,
        orders,
        kernel,
        route_generation: Throttle::new(ROUTE_GENERATION_PAUSE),
        next_trim: Instant::now(),
        installing: Installing { changes: Vec::new(), done: oneshot::channel().1 },
        loading: JoinSet::new(),
        starting: true,
    };
    let inbox = Inbox {
        bgp: bgp_inbox,
        fib: fib_inbox,
        pools: pool_inbox,
        requests: request_inbox,
        verdicts,
        hangup,
        reconciler,
        sweep: sweep_ended,
        status: reconciler_status,
    };
    // A task as those are that it hears from: the worker that has read a withdrawal goes on with it here, and no other thread
    // is woken in between.
    let result = tokio::spawn(daemon.run(inbox)).await.map_err(std::io::Error::from).flatten();
    drop(stop);
    if let Ok(Err(error)) = server.await {
        warn!(%error, "the API stopped badly");
    }
    Ok(result?)
}

/// Runs the reconciler on a thread of its own: reading and writing maps, and filling tables, would keep sessions and the
/// kernel's routes waiting on a thread that they share. What is returned is done when the thread has ended.
fn reconcile(run: impl Future<Output = ()> + Send + 'static) -> std::io::Result<oneshot::Receiver<()>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
    let (running, ended) = oneshot::channel();
    std::thread::Builder::new().name("reconciler".to_owned()).spawn(move || {
        runtime.block_on(run);
        drop(running);
    })?;
    Ok(ended)
}

/// What the maps still serve is what discovery starts from.
fn adopt_pools(dns: &dns::DnsHandle, config: &Config, world: &World) {
    for service in config.services.values() {
        for backends in service.listen.iter().filter_map(|frontend| world.adopted().get(frontend)) {
            let eligible = backends.iter().filter(|backend| backend.eligible);
            let member = |b: &AdoptedBackend| PoolMember { address: b.address, weight: b.weight, tier: b.tier };
            dns.adopt(&service.backends, eligible.map(member));
        }
    }
}

/// Fills selection tables. Maglev's is the same on every edge that has the seed, whatever numbers it gives its backends; it
/// also serves to draw the two of which the less loaded is taken.
pub(super) fn table_filler(seed: [u64; 2]) -> OwnedFill {
    Box::new(move |pool, shape| match shape.balance {
        Balance::RoundRobin => {
            let weights: Vec<u32> = pool.iter().map(|member| u32::from(member.weight)).collect();
            schedule::turns(&weights).into()
        }
        Balance::Maglev | Balance::LeastConnections => {
            let candidates: Vec<Candidate> = pool.iter().map(candidate).collect();
            maglev::fill(seed, &candidates, shape.maglev_size.unwrap_or(maglev::table_len(candidates.len()))).into()
        }
    })
}

fn candidate(member: &PoolMember) -> Candidate {
    Candidate { identity: identity(member.address), weight: u32::from(member.weight) }
}

/// Tells the service manager once the maps first hold the desired state.
pub(super) async fn announce_readiness(mut status: watch::Receiver<ReconcilerStatus>) {
    if status.wait_for(|status| status.in_sync).await.is_ok() {
        info!("the datapath holds the desired state");
        notify::ready("serving");
    }
}
