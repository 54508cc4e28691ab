//! The host under the daemon: its settings and addresses, the kernel's own routes, neighbours, and where the program is
//! attached. Looked at again in regular intervals, since nobody tells when somebody else changes them.

use std::{collections::BTreeSet, net::IpAddr, thread, time::Instant};

use tokio::{
    sync::{
        oneshot::{self, error::RecvError},
        watch,
    },
    task::{JoinError, JoinSet},
};
use tracing::{error, info, warn};

use super::{Daemon, TRIM, acl, addresses, lock, start};
use crate::{
    config::{lint, valid::Config},
    datapath::{
        loader::{Datapath, ProgramLoaded},
        sys,
    },
    fib::sysctl::{self, SysctlProblem},
    model::{HostFault, Mode},
    notify,
    reconcile::actor::ReconcilerStatus,
};

impl Daemon {
    /// True where they changed.
    pub(super) async fn refresh_kernel_prefixes(&mut self) -> bool {
        let routes = self.fib.kernel_prefixes().await;
        let changed = routes != self.world.kernel_routes;
        self.world.kernel_routes = routes;
        self.world.own = self.fib.interface_addresses().await;
        if let Some(bgp) = self.bgp.as_ref().filter(|_| changed) {
            bgp.kernel(self.world.kernel_routes.clone()).await;
        }
        changed
    }

    /// Asks the kernel which of our addresses it would use towards these backends, and has the way to new ones resolved.
    pub(super) async fn learn_snat_sources(&mut self, backends: BTreeSet<IpAddr>) {
        let groups = self.world.by_route(backends);
        let mut unresolved: Vec<IpAddr> = groups.iter().filter_map(|group| group.first().copied()).collect();
        for (backend, source) in self.fib.sources_for(groups).await {
            let is_new = self.world.snat_sources.insert(backend, source).is_none();
            if is_new && !self.world.is_behind_gateway(backend) {
                unresolved.push(backend);
            }
        }
        if !unresolved.is_empty() {
            self.fib.resolve(unresolved).await;
        }
    }

    /// As [`Daemon::learn_snat_sources`], for backends about which nothing is known; forgets those that are gone.
    pub(super) async fn learn_new_snat_sources(&mut self) {
        self.world.forget_sources();
        let mut backends = (*self.world.backend_addresses()).clone();
        backends.retain(|backend| !self.world.snat_sources.contains_key(backend));
        self.learn_snat_sources(backends).await;
    }

    /// Attaches where the program is missing; failures are logged once and shown in the status until they pass.
    pub(super) fn attach(&mut self) {
        let mut shared = lock(&self.shared);
        let before: BTreeSet<String> = shared.problems.iter().cloned().collect();
        for (interface, error) in shared.datapath.attach_loaded() {
            let text = format!("{interface}: {error}");
            if !before.contains(&text) {
                error!(interface, %error, "the program is not attached; trying again");
                shared.problems.push(text);
            }
        }
        load_beside(&mut self.loading, &shared.datapath);
    }

    /// A program is loaded, or could not be: attaches, unless another is on its way.
    pub(super) fn on_loaded(
        &mut self,
        loaded: Result<Result<ProgramLoaded, RecvError>, JoinError>,
        status: &watch::Receiver<ReconcilerStatus>,
    ) {
        match loaded {
            Ok(Ok(loaded)) => lock(&self.shared).datapath.loaded(loaded),
            Ok(Err(_)) | Err(_) => error!("loading a program ended early, which is a defect; trying again"),
        }
        if self.loading.is_empty() {
            self.attach();
            self.end_start(status);
            self.publish();
        }
    }

    /// Once, when the first attempt to attach has come to its end: what follows from it is published, and readiness told.
    pub(super) fn end_start(&mut self, status: &watch::Receiver<ReconcilerStatus>) {
        if !self.starting || !self.loading.is_empty() {
            return;
        }
        self.starting = false;
        self.publish();
        lock(&self.shared).starting = false;
        tokio::spawn(start::announce_readiness(status.clone()));
    }

    pub(super) async fn housekeeping(&mut self) {
        let settings = self::problems(&self.config);
        let mut problems: Vec<String> = settings.iter().map(ToString::to_string).collect();
        let broken = faults(&settings);
        problems.extend(lint::not_dedicated(&self.config, &self.world.own));
        let ready = {
            let mut shared = lock(&self.shared);
            let before: BTreeSet<String> = shared.problems.iter().cloned().collect();
            let failures = shared.datapath.attach_loaded();
            load_beside(&mut self.loading, &shared.datapath);
            problems.extend(failures.iter().map(|(interface, error)| format!("{interface}: {error}")));
            problems.extend(shared.datapath.notes().iter().cloned());
            problems.extend(self.recorder.problem());
            problems.extend(self.commits.problem());
            for problem in problems.iter().filter(|problem| !before.contains(*problem)) {
                warn!(%problem, "degraded");
            }
            if let Err(error) = shared.datapath.end_stale_capture() {
                warn!(%error, "a capture that nobody reads goes on");
            }
            match shared.datapath.split_cache() {
                Ok(None) => {}
                Ok(Some(cpus)) => tracing::info!(?cpus, "the flow cache is split over the CPUs that receive packets"),
                Err(error) => warn!(%error, "the flow cache is off"),
            }
            if let Err(error) = shared.datapath.refresh_snat_ports() {
                warn!(%error, "the host's own ports are not known");
            }
            shared.problems = problems;
            shared.datapath.is_ready()
        };
        let expired = lock(&self.shared).acl.expire(acl::now());
        if expired || ready != self.world.datapath_ready || broken != self.world.host_faults {
            self.world.host_faults = broken;
            self.publish();
        }
        let unheld = self.world.unheld.clone();
        self.hold_addresses().await;
        if unheld != self.world.unheld {
            self.publish();
        }
        self.release_addresses().await;
        self.watch_neighbours().await;
        self.look_at_drains();
        self.program_log.drain();
        let now = Instant::now();
        if now >= self.next_trim {
            self.next_trim = now + TRIM;
            tokio::task::spawn_blocking(sys::trim_heap);
        }
    }

    /// VIPs that no interface of this host has are held on `lo`, so that the kernel answers ping and closed ports. To be
    /// called before a state that announces them is published.
    pub(super) async fn hold_addresses(&mut self) {
        let before = std::mem::take(&mut self.world.unheld);
        for vip in addresses(&self.config) {
            match self.fib.hold_vip(vip).await {
                Ok(()) => {
                    self.held.insert(vip);
                }
                Err(error) => {
                    self.world.unheld.insert(vip);
                    if !before.contains(&vip) {
                        warn!(%vip, %error, "the VIP could not be put on lo, and is not announced; trying again");
                    }
                }
            }
        }
    }

    /// Addresses that are no longer anybody's VIP leave `lo`, some time after their route was withdrawn.
    pub(super) async fn release_addresses(&mut self) {
        for vip in self.held.clone().difference(&addresses(&self.config)) {
            match self.fib.release_vip(*vip).await {
                Ok(()) => {
                    self.held.remove(vip);
                }
                Err(error) => warn!(%vip, %error, "the VIP could not be taken off lo"),
            }
        }
    }

    pub(super) async fn watch_neighbours(&self) {
        match self.next_hops.neighbours() {
            Ok(neighbours) => self.fib.watch_neighbours(neighbours.into_iter().collect()).await,
            Err(error) => warn!(%error, "the next hops in use are not known"),
        }
    }
}

/// Programs that the kernel verifies, each on a thread of its own.
pub(super) type Loading = JoinSet<Result<ProgramLoaded, RecvError>>;

/// Has the programs that interfaces wait for loaded beside the loop, which goes on meanwhile: the kernel takes seconds to
/// verify them, on every CPU, and lets sessions, routes and maps go first.
fn load_beside(loading: &mut Loading, datapath: &Datapath) {
    if !loading.is_empty() {
        return;
    }
    for load in datapath.loads() {
        let (tell, told) = oneshot::channel();
        let verify = move || {
            sys::give_way();
            // Nobody waits any more where the daemon stops.
            let _ = tell.send(load.run());
        };
        match thread::Builder::new().name("verify".to_owned()).spawn(verify) {
            Ok(_) => drop(loading.spawn(told)),
            Err(error) => error!(%error, "no thread can be had to load a program on; trying again"),
        }
    }
    if !loading.is_empty() {
        info!("the kernel verifies the program");
        notify::status("attaching: the kernel verifies the program");
    }
}

/// Kernel settings in the way of forwarding.
pub(super) fn problems(config: &Config) -> Vec<SysctlProblem> {
    let full_nat = config.services.values().any(|service| service.mode == Mode::FullNat);
    let ipv6 = addresses(config).iter().any(IpAddr::is_ipv6);
    sysctl::check(&config.edge.interfaces, full_nat, ipv6)
}

/// What these break. A setting that cannot be read at this moment says nothing: no VIP is withdrawn for want of a file
/// descriptor.
pub(super) fn faults(problems: &[SysctlProblem]) -> BTreeSet<HostFault> {
    problems.iter().filter(|problem| problem.value.is_some()).map(|problem| problem.breaks).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_read_and_found_wrong_is_a_fault() {
        let wrong = sysctl::Settings {
            ip_forward: Some(0),
            interfaces: vec![sysctl::InterfaceSettings { name: "ens33".into(), ..Default::default() }],
            ..Default::default()
        };
        let found = sysctl::evaluate(&wrong, true);
        assert_eq!(found.len(), 2, "{found:?}");
        assert_eq!(faults(&found), BTreeSet::from([HostFault::Ipv4]));
    }
}
