//! The one task that changes the kernel's tables and compares them with what should be there.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::IpAddr,
    time::Duration,
};

use ipnet::IpNet;
use tokio::{
    sync::mpsc,
    time::{Instant, MissedTickBehavior},
};

use super::{
    Command, FibError, FibEvent, FibOptions, FibStatus, Kernel, Link, Neighbour, Notice, RouteTo, Snapshot,
    plan::{KernelRoute, METRIC, METRIC_INTERNAL, NextHop, Plan, RouteChange, plan},
    protocol_name,
};
use crate::model::{RouteSet, RouteUpdate, scope, view::RouteRow};

/// A reading of the tables may take at most this share of the time: one part in so many.
const DUMP_SHARE: u32 = 5;

pub(super) struct Actor<K> {
    kernel: K,
    options: FibOptions,
    /// The kernel's tables as last read, with our own changes since.
    known: Snapshot,
    macs: BTreeMap<(u32, IpAddr), [u8; 6]>,
    desired: RouteSet,
    /// Prefixes that may stand in the kernel on our account.
    owned: BTreeSet<IpNet>,
    /// Found at start, kept until BGP has converged.
    stale: RouteSet,
    keep: BTreeSet<IpNet>,
    installed_at: BTreeMap<IpNet, Instant>,
    held: BTreeSet<IpAddr>,
    watched: BTreeSet<(u32, IpAddr)>,
    status: FibStatus,
    events: VecDeque<FibEvent>,
    resync_at: Option<Instant>,
    neighbours_lost: bool,
    dump_time: Duration,
}

impl<K: Kernel> Actor<K> {
    pub(super) async fn new(kernel: K, options: FibOptions) -> Result<Self, FibError> {
        let known = kernel.snapshot().await?;
        let neighbours = kernel.neighbours().await?;
        let mut actor = Self {
            kernel,
            options,
            known,
            macs: neighbours.iter().filter_map(|entry| Some(((entry.ifindex, entry.address), entry.mac?))).collect(),
            desired: RouteSet::default(),
            owned: BTreeSet::new(),
            stale: RouteSet::default(),
            keep: BTreeSet::new(),
            installed_at: BTreeMap::new(),
            held: BTreeSet::new(),
            watched: BTreeSet::new(),
            status: FibStatus::default(),
            events: VecDeque::new(),
            resync_at: None,
            neighbours_lost: false,
            dump_time: Duration::ZERO,
        };
        actor.adopt();
        Ok(actor)
    }

    /// Remembers what an earlier life left behind.
    fn adopt(&mut self) {
        for route in self.known.table.iter().filter(|route| route.is_bgp()) {
            if self.known.table.ours(&route.prefix) != Some(route) {
                continue;
            }
            let next_hops = route.next_hops.iter().filter_map(|hop| hop.gateway).collect();
            self.stale.apply(RouteUpdate {
                prefix: route.prefix,
                next_hops,
                internal: route.metric == METRIC_INTERNAL,
            });
            self.owned.insert(route.prefix);
        }
        self.keep = self.owned.clone();
        self.held = self.known.addresses.iter().filter(|entry| entry.ours).map(|entry| entry.address).collect();
    }

    pub(super) async fn run(
        mut self,
        mut commands: mpsc::Receiver<Command>,
        mut notices: mpsc::UnboundedReceiver<Notice>,
        events: mpsc::Sender<FibEvent>,
    ) {
        let mut repair = ticker(self.options.repair_interval);
        let mut neighbours = ticker(self.options.neighbour_interval);
        let mut listening = true;
        loop {
            let resync_at = self.resync_at.unwrap_or_else(Instant::now);
            tokio::select! {
                command = commands.recv() => match command {
                    Some(command) => self.handle(command).await,
                    None => return,
                },
                notice = notices.recv(), if listening => match notice {
                    Some(notice) => self.note(notice),
                    None => {
                        tracing::error!("the netlink monitor has ended; routes are now compared periodically only");
                        listening = false;
                    }
                },
                () = tokio::time::sleep_until(resync_at), if self.resync_at.is_some() => self.resync().await,
                _ = repair.tick() => self.resync().await,
                _ = neighbours.tick() => self.look_after_neighbours().await,
                // Never waits inside a command: the receiver may be waiting for that command's reply.
                permit = events.reserve(), if !self.events.is_empty() => match (permit, self.events.pop_front()) {
                    (Ok(permit), Some(event)) => permit.send(event),
                    _ => self.events.clear(),
                },
            }
        }
    }

    async fn handle(&mut self, command: Command) {
        // A caller that went away does not need its answer.
        match command {
            Command::Apply(updates, reply) => {
                self.apply(updates).await;
                let _ = reply.send(());
            }
            Command::FinishRestart(routes, reply) => {
                self.finish_restart(routes).await;
                let _ = reply.send(());
            }
            Command::Routes(reply) => drop(reply.send(self.rows())),
            Command::OwnAddresses(reply) => {
                drop(reply.send(self.known.addresses.iter().map(|known| known.address).collect()));
            }
            Command::InterfaceAddresses(reply) => {
                let on_lo = |ifindex: &u32| self.known.links.get(ifindex).is_some_and(|link| link.loopback);
                let others = self.known.addresses.iter().filter(|known| !on_lo(&known.ifindex));
                drop(reply.send(others.map(|known| known.address).collect()));
            }
            Command::KernelPrefixes(reply) => drop(reply.send(self.kernel_prefixes())),
            Command::Stale(reply) => drop(reply.send(self.stale.clone())),
            Command::RouteTo(destination, reply) => drop(reply.send(self.route_to(destination).await)),
            Command::HoldVip(vip, reply) => drop(reply.send(self.hold(vip).await)),
            Command::ReleaseVip(vip, reply) => drop(reply.send(self.release(vip).await)),
            Command::LocalAddresses(reply) => {
                drop(reply.send(self.known.addresses.iter().map(|entry| entry.address).collect()));
            }
            Command::Links(reply) => drop(reply.send(self.known.links.clone())),
            Command::Watch(neighbours, reply) => {
                self.watch(neighbours).await;
                let _ = reply.send(());
            }
            Command::Sources(groups, reply) => drop(reply.send(self.sources(&groups).await)),
            Command::Resolve(destinations) => {
                for destination in destinations {
                    self.resolve(destination).await;
                }
            }
            Command::Status(reply) => {
                self.status.stale = self.stale.len();
                self.status.objects = self.kernel.objects();
                self.status.held = self.held.clone();
                let _ = reply.send(self.status.clone());
            }
        }
    }

    async fn apply(&mut self, updates: Vec<RouteUpdate>) {
        let mut prefixes = BTreeSet::new();
        for update in updates {
            let prefix = update.prefix;
            self.keep.remove(&prefix);
            self.desired.apply(update);
            prefixes.insert(prefix);
        }
        self.carry_out(&prefixes).await;
    }

    async fn finish_restart(&mut self, routes: RouteSet) {
        self.desired = routes;
        self.stale = RouteSet::default();
        self.keep.clear();
        let prefixes = self.all_prefixes();
        self.carry_out(&prefixes).await;
    }

    fn all_prefixes(&self) -> BTreeSet<IpNet> {
        self.desired.iter().map(|(prefix, _)| *prefix).chain(self.owned.iter().copied()).collect()
    }

    /// Brings the kernel in line for `prefixes`; returns those that were changed.
    async fn carry_out(&mut self, prefixes: &BTreeSet<IpNet>) -> BTreeSet<IpNet> {
        let Plan { changes, errors } = plan(&self.desired, &self.keep, &self.known.table, prefixes);
        for prefix in prefixes {
            self.status.errors.remove(prefix);
        }
        self.status.errors.extend(errors);
        let mut changed = BTreeSet::new();
        if !changes.is_empty() {
            let results = self.kernel.change(&changes).await;
            for (change, result) in changes.iter().zip(results) {
                self.finish(change, result, &mut changed);
            }
        }
        for prefix in prefixes {
            if self.known.table.ours(prefix).is_none() && !self.is_desired(prefix) {
                self.owned.remove(prefix);
            }
        }
        changed
    }

    fn is_desired(&self, prefix: &IpNet) -> bool {
        self.desired.get(prefix).is_some()
    }

    fn finish(&mut self, change: &RouteChange, result: Result<(), FibError>, changed: &mut BTreeSet<IpNet>) {
        let prefix = change.prefix();
        if let Err(error) = result {
            tracing::warn!(%prefix, %error, "route not changed in the kernel; it is tried again");
            self.status.errors.insert(prefix, error.to_string());
            return;
        }
        self.status.route_writes += 1;
        self.known.table.apply(change);
        changed.insert(prefix);
        match change {
            RouteChange::Replace { .. } => {
                self.owned.insert(prefix);
                self.installed_at.insert(prefix, Instant::now());
            }
            RouteChange::Delete { .. } => {
                self.installed_at.remove(&prefix);
            }
        }
    }

    fn note(&mut self, notice: Notice) {
        match notice {
            Notice::Neighbour(neighbour) => return self.note_neighbour(&neighbour),
            Notice::Lost => self.neighbours_lost = true,
            Notice::Tables => {}
        }
        // The first notification sets the time: a stream of them must not put the comparison off for ever.
        let delay = self.options.coalesce.max(self.dump_time * DUMP_SHARE);
        self.resync_at.get_or_insert_with(|| Instant::now() + delay);
    }

    fn note_neighbour(&mut self, neighbour: &Neighbour) {
        let key = (neighbour.ifindex, neighbour.address);
        let before = match neighbour.mac {
            Some(mac) => self.macs.insert(key, mac),
            None => self.macs.remove(&key),
        };
        if before != neighbour.mac {
            let Neighbour { ifindex, address, mac, .. } = *neighbour;
            self.events.push_back(FibEvent::NeighbourChanged { ifindex, address, mac });
        }
    }

    /// Reads the tables, reports what changed and repairs what is ours.
    async fn resync(&mut self) {
        self.resync_at = None;
        let started = Instant::now();
        let snapshot = match self.kernel.snapshot().await {
            Ok(snapshot) => snapshot,
            Err(error) => {
                tracing::warn!(%error, "the kernel's tables could not be read; trying again");
                self.status.dump_error = Some(error.to_string());
                self.resync_at = Some(Instant::now() + Duration::from_secs(1));
                return;
            }
        };
        self.dump_time = started.elapsed();
        self.status.dump_error = None;
        let before = std::mem::replace(&mut self.known, snapshot);
        let links_changed = self.report(&before);
        let prefixes = self.all_prefixes();
        let touched: BTreeSet<IpNet> = prefixes
            .iter()
            .filter(|prefix| before.table.ours(prefix) != self.known.table.ours(prefix))
            .copied()
            .collect();
        let changed = self.carry_out(&prefixes).await;
        for prefix in changed.intersection(&touched) {
            tracing::warn!(%prefix, "a route of ours was changed by somebody else; repaired");
            self.status.repairs += 1;
            self.events.push_back(FibEvent::ForeignChange { prefix: *prefix });
        }
        self.restore_held().await;
        // A link that went down has flushed its neighbours, managed ones too.
        if std::mem::take(&mut self.neighbours_lost) || links_changed {
            self.look_after_neighbours().await;
        }
    }

    /// True where a link changed.
    fn report(&mut self, before: &Snapshot) -> bool {
        let links_changed = before.links != self.known.links;
        let indices: BTreeSet<u32> = before.links.keys().chain(self.known.links.keys()).copied().collect();
        for ifindex in indices {
            let (old, new) = (before.links.get(&ifindex), self.known.links.get(&ifindex));
            if old == new {
                continue;
            }
            let name = new.or(old).map(|link| link.name.clone()).unwrap_or_default();
            self.events.push_back(FibEvent::LinkChanged { ifindex, name, up: new.is_some_and(|link| link.up) });
        }
        if before.addresses != self.known.addresses {
            self.events.push_back(FibEvent::AddressChanged);
        }
        if !before.table.others().eq(self.known.table.others()) {
            self.events.push_back(FibEvent::RoutesChanged);
        }
        links_changed
    }

    async fn hold(&mut self, vip: IpAddr) -> Result<(), FibError> {
        if self.known.addresses.iter().any(|entry| entry.address == vip) {
            return Ok(());
        }
        let ifindex = self.loopback()?;
        self.kernel.add_address(ifindex, vip).await?;
        self.held.insert(vip);
        self.refresh_addresses().await
    }

    async fn release(&mut self, vip: IpAddr) -> Result<(), FibError> {
        if !self.held.remove(&vip) {
            return Ok(());
        }
        let ifindex = self.loopback()?;
        let present = self.known.addresses.iter().any(|entry| entry.address == vip && entry.ifindex == ifindex);
        if present && let Err(error) = self.kernel.remove_address(ifindex, vip).await {
            self.held.insert(vip);
            return Err(error);
        }
        self.refresh_addresses().await
    }

    async fn restore_held(&mut self) {
        let missing: Vec<IpAddr> = self
            .held
            .iter()
            .filter(|vip| !self.known.addresses.iter().any(|entry| entry.address == **vip))
            .copied()
            .collect();
        for vip in missing {
            match self.hold(vip).await {
                Ok(()) => tracing::warn!(%vip, "VIP was taken off lo by somebody else; restored"),
                Err(error) => tracing::warn!(%vip, %error, "VIP was taken off lo and cannot be restored yet"),
            }
        }
    }

    /// Our own change of an address is not reported by the monitor, so that it is read here.
    async fn refresh_addresses(&mut self) -> Result<(), FibError> {
        self.known.addresses = self.kernel.addresses().await?;
        self.events.push_back(FibEvent::AddressChanged);
        Ok(())
    }

    fn loopback(&self) -> Result<u32, FibError> {
        let found = self.known.links.iter().find(|(_, link)| link.loopback);
        found.map(|(ifindex, _)| *ifindex).ok_or_else(|| FibError::Refused {
            what: "hold a VIP".into(),
            reason: "this network namespace has no loopback interface".into(),
            errno: libc::ENODEV,
        })
    }

    async fn route_to(&self, destination: IpAddr) -> Option<RouteTo> {
        match self.kernel.route_to(destination).await {
            Ok(route) => route,
            Err(error) => {
                tracing::warn!(%destination, %error, "route lookup failed");
                None
            }
        }
    }

    /// Our own address towards each destination of groups that one route covers.
    async fn sources(&self, groups: &[Vec<IpAddr>]) -> Vec<(IpAddr, IpAddr)> {
        let mut sources = Vec::new();
        for group in groups {
            let (Some(first), Some(last)) = (group.first(), group.last()) else { continue };
            // Where the kernel says the same of both ends of what one route covers, it says so of all between.
            let ends = (self.source(*first).await, if first == last { None } else { self.source(*last).await });
            let all_alike = first == last || ends.0 == ends.1;
            for destination in group {
                let source = if all_alike { ends.0 } else { self.source(*destination).await };
                sources.extend(source.map(|source| (*destination, source)));
            }
        }
        sources
    }

    async fn source(&self, destination: IpAddr) -> Option<IpAddr> {
        self.route_to(destination).await?.source
    }

    async fn resolve(&mut self, destination: IpAddr) {
        let Some(route) = self.route_to(destination).await.filter(|route| !route.local) else { return };
        let key = (route.ifindex, route.gateway.unwrap_or(destination));
        // A known address needs no packet, a watched one has the kernel's care, and a static one must not be touched.
        if self.macs.contains_key(&key) || self.known.links.get(&key.0).is_none_or(|link| link.loopback) {
            return;
        }
        self.probe(key, self.watched.contains(&key)).await;
    }

    async fn probe(&self, (ifindex, address): (u32, IpAddr), managed: bool) {
        if let Err(error) = self.kernel.probe(ifindex, address, managed).await {
            // The link may be down: the next round tries again.
            tracing::debug!(ifindex, %address, %error, "neighbour not probed");
        }
    }

    async fn watch(&mut self, neighbours: BTreeSet<(u32, IpAddr)>) {
        let before = std::mem::replace(&mut self.watched, neighbours);
        let dropped: Vec<(u32, IpAddr)> = before.difference(&self.watched).copied().collect();
        let added = self.watched.difference(&before).next().is_some();
        if !dropped.is_empty() {
            let table = self.kernel.neighbours().await.unwrap_or_default();
            for key in dropped {
                let managed = |entry: &Neighbour| (entry.ifindex, entry.address) == key && entry.managed;
                if table.iter().any(managed) {
                    self.probe(key, false).await;
                }
            }
        }
        if added {
            self.look_after_neighbours().await;
        }
    }

    /// Compares the neighbour table with what is known, and asks again for watched neighbours that the kernel does not
    /// keep resolved by itself: before 5.16 all of them, else those that a link down has flushed.
    async fn look_after_neighbours(&mut self) {
        let table = match self.kernel.neighbours().await {
            Ok(table) => table,
            Err(error) => {
                tracing::warn!(%error, "the neighbour table could not be read");
                return;
            }
        };
        let listed: BTreeMap<(u32, IpAddr), &Neighbour> =
            table.iter().map(|entry| ((entry.ifindex, entry.address), entry)).collect();
        let vanished: Vec<(u32, IpAddr)> = self.macs.keys().filter(|key| !listed.contains_key(key)).copied().collect();
        for (ifindex, address) in vanished {
            self.note_neighbour(&Neighbour { ifindex, address, mac: None, fixed: false, managed: false });
        }
        for neighbour in &table {
            self.note_neighbour(neighbour);
        }
        for key in &self.watched {
            if listed.get(key).is_none_or(|entry| !entry.fixed && !entry.managed) {
                self.probe(*key, true).await;
            }
        }
    }

    fn kernel_prefixes(&self) -> Vec<(IpNet, Option<IpAddr>)> {
        let loopback = |hop: &NextHop| self.known.links.get(&hop.ifindex).is_some_and(|link| link.loopback);
        // The kernel keeps the routes of a link that has lost its carrier; nothing is reached through them.
        let up = |hop: &NextHop| self.known.links.get(&hop.ifindex).is_none_or(|link| link.up);
        let mut prefixes: Vec<(IpNet, Option<IpAddr>)> = self
            .known
            .table
            .others()
            .filter(|route| route.prefix.prefix_len() > 0 && !route.next_hops.iter().all(loopback))
            .filter(|route| route.next_hops.is_empty() || route.next_hops.iter().any(up))
            .flat_map(|route| self.scoped(route))
            .collect();
        prefixes.dedup();
        prefixes
    }

    /// What a route says of next hops: a link-local network is one for each of its interfaces.
    fn scoped(&self, route: &KernelRoute) -> Vec<(IpNet, Option<IpAddr>)> {
        let gateway = route.next_hops.iter().find_map(|hop| hop.gateway);
        let mut said = vec![(route.prefix, gateway)];
        if route.is_connected() && matches!(route.prefix, IpNet::V6(prefix) if prefix.addr().is_unicast_link_local()) {
            let names = route.next_hops.iter().filter_map(|hop| self.known.links.get(&hop.ifindex));
            said.extend(names.map(|link| (scope::network_on(route.prefix, &link.name), None)));
        }
        said
    }

    fn rows(&self) -> Vec<RouteRow> {
        let mut rows: Vec<(IpNet, RouteRow)> =
            self.known.table.iter().map(|route| (route.prefix, self.row(route))).collect();
        for (prefix, gateways) in self.desired.iter() {
            if self.known.table.ours(prefix).is_none() {
                let metric = if self.desired.is_internal(prefix) { METRIC_INTERNAL } else { METRIC };
                rows.push((*prefix, missing_row(prefix, metric, gateways)));
            }
        }
        rows.sort_by_key(|(prefix, _)| *prefix);
        rows.into_iter().map(|(_, row)| row).collect()
    }

    fn row(&self, route: &KernelRoute) -> RouteRow {
        let ours = self.known.table.ours(&route.prefix) == Some(route);
        let code = match route.protocol {
            _ if route.is_bgp() => "B",
            4 => "S",
            2 if route.is_connected() => "C",
            _ => "K",
        };
        let agrees = || {
            let present: Vec<IpAddr> = route.next_hops.iter().filter_map(|hop| hop.gateway).collect();
            self.desired.get(&route.prefix).is_some_and(|gateways| {
                gateways.len() == present.len() && gateways.iter().all(|gateway| present.contains(gateway))
            })
        };
        RouteRow {
            code: code.into(),
            prefix: route.prefix.to_string(),
            next_hops: route.next_hops.iter().map(|hop| next_hop_text(hop, &self.known.links)).collect(),
            protocol: protocol_name(route.protocol),
            metric: route.metric,
            installed: !ours || agrees(),
            age: self.installed_at.get(&route.prefix).filter(|_| ours).map(|at| at.elapsed().as_secs()),
        }
    }
}

fn missing_row(prefix: &IpNet, metric: u32, gateways: &[IpAddr]) -> RouteRow {
    RouteRow {
        code: "B".into(),
        prefix: prefix.to_string(),
        next_hops: gateways.iter().map(|gateway| format!("via {gateway}")).collect(),
        protocol: protocol_name(super::plan::PROTOCOL_BGP),
        metric,
        installed: false,
        age: None,
    }
}

fn next_hop_text(hop: &NextHop, links: &BTreeMap<u32, Link>) -> String {
    let device = links.get(&hop.ifindex).map_or_else(|| format!("if{}", hop.ifindex), |link| link.name.clone());
    match hop.gateway {
        Some(gateway) => format!("via {gateway} dev {device}"),
        None => format!("dev {device}"),
    }
}

fn ticker(period: Duration) -> tokio::time::Interval {
    let mut ticker = tokio::time::interval_at(Instant::now() + period, period);
    ticker.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticker
}

#[cfg(test)]
mod tests {
    use super::{super::fake::FakeKernel, *};

    const PATIENCE: Duration = Duration::from_secs(10);

    struct Setup {
        kernel: FakeKernel,
        fib: super::super::FibHandle,
        events: mpsc::Receiver<FibEvent>,
    }

    /// An edge at 172.16.1.88/24 on interface 2; notifications are acted upon at once, periods are out of reach.
    async fn setup(prepare: impl FnOnce(&FakeKernel)) -> Setup {
        setup_with(options(), 64, prepare).await
    }

    async fn setup_with(options: FibOptions, events: usize, prepare: impl FnOnce(&FakeKernel)) -> Setup {
        let (kernel, notices) = FakeKernel::new();
        kernel.add_interface(2, "ens33", "172.16.1.88".parse().unwrap(), 24);
        prepare(&kernel);
        let (sender, events) = mpsc::channel(events);
        let fib = kernel.spawn(notices, options, sender).await.unwrap();
        Setup { kernel, fib, events }
    }

    fn options() -> FibOptions {
        let never = Duration::from_secs(3600);
        FibOptions {
            coalesce: Duration::ZERO,
            repair_interval: never,
            neighbour_interval: never,
            ..FibOptions::default()
        }
    }

    fn update(prefix: &str, hops: &[&str]) -> RouteUpdate {
        let next_hops = hops.iter().map(|hop| hop.parse().unwrap()).collect();
        RouteUpdate { prefix: prefix.parse().unwrap(), next_hops, internal: false }
    }

    fn installed(kernel: &FakeKernel, prefix: &str) -> bool {
        kernel.tables().table.ours(&prefix.parse().unwrap()).is_some()
    }

    async fn event(events: &mut mpsc::Receiver<FibEvent>, wanted: impl Fn(&FibEvent) -> bool) {
        let waiting = async {
            while let Some(event) = events.recv().await {
                if wanted(&event) {
                    return;
                }
            }
            panic!("the actor has ended");
        };
        tokio::time::timeout(PATIENCE, waiting).await.expect("the event");
    }

    #[tokio::test]
    async fn a_refused_change_is_reported_and_tried_again_at_the_next_comparison() {
        let Setup { kernel, fib, .. } = setup(|_| {}).await;
        kernel.refuse(Some(libc::ENOBUFS));
        fib.apply(vec![update("10.1.0.0/24", &["172.16.1.80"])]).await;
        assert_eq!(fib.status().await.errors.len(), 1);
        kernel.refuse(None);
        kernel.change_by_other(&RouteChange::Delete { prefix: "10.99.0.0/24".parse().unwrap(), metric: METRIC });
        let repaired = async {
            while !installed(&kernel, "10.1.0.0/24") {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(PATIENCE, repaired).await.unwrap();
        assert_eq!(fib.status().await.errors.len(), 0);
    }

    #[tokio::test]
    async fn a_refused_withdrawal_is_not_forgotten() {
        let Setup { kernel, fib, .. } = setup(|_| {}).await;
        fib.apply(vec![update("10.1.0.0/24", &["172.16.1.80"])]).await;
        kernel.refuse(Some(libc::ENOBUFS));
        fib.apply(vec![update("10.1.0.0/24", &[])]).await;
        assert!(installed(&kernel, "10.1.0.0/24"));
        kernel.refuse(None);
        fib.apply(vec![]).await;
        fib.finish_restart(&RouteSet::default()).await;
        assert!(!installed(&kernel, "10.1.0.0/24"));
    }

    #[tokio::test]
    async fn routes_that_go_with_a_link_without_a_word_come_back_with_it() {
        let Setup { kernel, fib, mut events } = setup(|_| {}).await;
        fib.apply(vec![update("10.1.0.0/24", &["172.16.1.80"])]).await;
        kernel.link_down(2);
        event(&mut events, |event| matches!(event, FibEvent::LinkChanged { ifindex: 2, up: false, .. })).await;
        assert_eq!(fib.status().await.errors.len(), 1);
        kernel.link_up(2);
        event(&mut events, |event| matches!(event, FibEvent::LinkChanged { ifindex: 2, up: true, .. })).await;
        assert_eq!(fib.status().await.errors.len(), 0);
        assert!(installed(&kernel, "10.1.0.0/24"));
        assert_eq!(fib.status().await.repairs, 0, "nobody meddled");
    }

    #[tokio::test]
    async fn a_loss_that_nobody_reported_is_found_by_the_periodic_comparison() {
        let periodic = FibOptions { repair_interval: Duration::from_millis(20), ..options() };
        let Setup { kernel, fib, mut events } = setup_with(periodic, 64, |_| {}).await;
        fib.apply(vec![update("10.1.0.0/24", &["172.16.1.80"])]).await;
        kernel.lose_silently(&"10.1.0.0/24".parse().unwrap());
        event(&mut events, |event| matches!(event, FibEvent::ForeignChange { .. })).await;
        assert!(installed(&kernel, "10.1.0.0/24"));
    }

    #[tokio::test]
    async fn events_that_nobody_reads_do_not_block_commands() {
        let Setup { kernel, fib, mut events } = setup_with(options(), 1, |_| {}).await;
        for last in 0..20u8 {
            let address = IpAddr::from([172, 16, 1, last]);
            kernel.set_neighbour(Neighbour { ifindex: 2, address, mac: Some([2; 6]), fixed: false, managed: false });
        }
        for number in 0..20 {
            let apply = fib.apply(vec![update(&format!("10.1.{number}.0/24"), &["172.16.1.80"])]);
            tokio::time::timeout(PATIENCE, apply).await.expect("no deadlock");
        }
        let last = IpAddr::from([172, 16, 1, 19]);
        event(&mut events, |event| matches!(event, FibEvent::NeighbourChanged { address, .. } if *address == last))
            .await;
    }

    #[tokio::test]
    async fn a_neighbour_that_keeps_its_address_is_not_reported_again() {
        let Setup { kernel, fib, mut events } = setup(|_| {}).await;
        let address: IpAddr = "172.16.1.80".parse().unwrap();
        let neighbour = Neighbour { ifindex: 2, address, mac: Some([2; 6]), fixed: false, managed: false };
        kernel.set_neighbour(neighbour.clone());
        kernel.set_neighbour(neighbour.clone());
        kernel.set_neighbour(Neighbour { mac: None, ..neighbour });
        let mut seen = Vec::new();
        while seen.len() < 2 {
            let event = tokio::time::timeout(PATIENCE, events.recv()).await.unwrap().unwrap();
            if let FibEvent::NeighbourChanged { mac, .. } = event {
                seen.push(mac);
            }
        }
        assert_eq!(seen, [Some([2; 6]), None]);
        drop(fib);
    }

    #[tokio::test]
    async fn lost_notifications_are_made_up_for_by_reading_everything() {
        let Setup { kernel, fib, mut events } = setup(|_| {}).await;
        fib.apply(vec![update("10.1.0.0/24", &["172.16.1.80"])]).await;
        let hop: IpAddr = "172.16.1.80".parse().unwrap();
        kernel.lose_silently(&"10.1.0.0/24".parse().unwrap());
        kernel.lose_notifications(Neighbour {
            ifindex: 2,
            address: hop,
            mac: Some([2; 6]),
            fixed: false,
            managed: false,
        });
        event(&mut events, |event| matches!(event, FibEvent::ForeignChange { .. })).await;
        event(&mut events, |event| matches!(event, FibEvent::NeighbourChanged { address, .. } if *address == hop))
            .await;
    }

    #[tokio::test]
    async fn static_neighbours_are_not_touched_and_managed_ones_not_asked_again() {
        let hop = |last: u8| IpAddr::from([172, 16, 1, last]);
        let Setup { kernel, fib, .. } = setup(|kernel| {
            let entry =
                |last, fixed, managed| Neighbour { ifindex: 2, address: hop(last), mac: Some([2; 6]), fixed, managed };
            kernel.set_neighbour(entry(80, true, false));
            kernel.set_neighbour(entry(81, false, true));
        })
        .await;
        fib.watch_neighbours([80, 81, 82].map(|last| (2, hop(last))).into()).await;
        assert_eq!(kernel.probes(), [(2, hop(82), true)]);
        fib.watch_neighbours([80, 82].map(|last| (2, hop(last))).into()).await;
        assert_eq!(kernel.probes()[1..], [(2, hop(81), false)], "given back");
    }

    #[tokio::test]
    async fn watched_neighbours_are_asked_for_again_as_soon_as_their_link_is_back() {
        let Setup { kernel, fib, mut events } = setup(|_| {}).await;
        let hop = (2, "172.16.1.80".parse().unwrap());
        fib.watch_neighbours([hop].into()).await;
        kernel.link_down(2);
        event(&mut events, |event| matches!(event, FibEvent::LinkChanged { up: false, .. })).await;
        let before = kernel.probes().len();
        kernel.link_up(2);
        event(&mut events, |event| matches!(event, FibEvent::LinkChanged { up: true, .. })).await;
        assert_eq!(kernel.probes()[before..], [(2, hop.1, true)]);
    }

    #[tokio::test]
    async fn a_backend_is_resolved_through_its_gateway_and_this_host_is_not() {
        let Setup { kernel, fib, .. } = setup(|_| {}).await;
        fib.apply(vec![update("10.1.0.0/24", &["172.16.1.80"])]).await;
        for destination in ["10.1.0.4", "172.16.1.88", "203.0.113.1"] {
            fib.resolve(vec![destination.parse().unwrap()]).await;
        }
        // Answered after what was asked before.
        fib.status().await;
        assert_eq!(kernel.probes(), [(2, "172.16.1.80".parse().unwrap(), false)]);
    }

    #[tokio::test]
    async fn a_route_withdrawn_before_bgp_has_converged_is_deleted_at_once() {
        let stale = |kernel: &FakeKernel| {
            for prefix in ["10.1.0.0/24", "10.1.1.0/24"] {
                let gateway = Some("172.16.1.80".parse().unwrap());
                let next_hops = vec![NextHop { gateway, ifindex: 2 }];
                kernel.add_route(KernelRoute {
                    prefix: prefix.parse().unwrap(),
                    metric: METRIC,
                    protocol: 186,
                    next_hops,
                });
            }
        };
        let Setup { kernel, fib, .. } = setup(stale).await;
        assert_eq!(fib.stale().await.len(), 2);
        fib.apply(vec![update("10.1.0.0/24", &[])]).await;
        assert!(!installed(&kernel, "10.1.0.0/24") && installed(&kernel, "10.1.1.0/24"));
    }
}
