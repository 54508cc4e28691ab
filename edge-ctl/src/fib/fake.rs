//! A kernel in memory, for tests of what stands above: keeps state, refuses what the real one refuses, and does what
//! the real one does behind one's back (routes that go with a link, without a word).

use std::{
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::mpsc;

use super::{
    FibError, FibEvent, FibHandle, FibOptions, Kernel, Link, LocalAddress, Neighbour, Notice, RouteTo, Snapshot,
    plan::{KernelRoute, RouteChange, Table},
    spawn_on,
};

/// The fake kernel. Clones share its state, so that a test keeps one and gives one away.
#[derive(Clone)]
pub struct FakeKernel {
    state: Arc<Mutex<State>>,
    notices: mpsc::UnboundedSender<Notice>,
}

#[derive(Default)]
struct State {
    snapshot: Snapshot,
    neighbours: Vec<Neighbour>,
    refuse: Option<i32>,
    changes: Vec<RouteChange>,
    probes: Vec<(u32, IpAddr, bool)>,
}

impl FakeKernel {
    /// A kernel with `lo` (index 1) only, and the receiver of its notifications.
    pub fn new() -> (Self, mpsc::UnboundedReceiver<Notice>) {
        let (notices, receiver) = mpsc::unbounded_channel();
        let kernel = Self { state: Arc::default(), notices };
        let lo = Link { name: "lo".into(), up: true, loopback: true, mtu: 65536, mac: None };
        kernel.state().snapshot.links.insert(1, lo);
        (kernel, receiver)
    }

    /// Starts an actor over this kernel.
    ///
    /// # Errors
    /// Never, by itself; as [`spawn_on`].
    pub async fn spawn(
        &self,
        notices: mpsc::UnboundedReceiver<Notice>,
        options: FibOptions,
        events: mpsc::Sender<FibEvent>,
    ) -> Result<FibHandle, FibError> {
        spawn_on(self.clone(), notices, options, events).await
    }

    /// Adds an interface that is up, with an address and its connected route.
    pub fn add_interface(&self, ifindex: u32, name: &str, address: IpAddr, length: u8) {
        let mut state = self.state();
        let link = Link { name: name.into(), up: true, loopback: false, mtu: 1500, mac: Some([2, 0, 0, 0, 0, 1]) };
        state.snapshot.links.insert(ifindex, link);
        state.snapshot.addresses.push(LocalAddress { ifindex, address, length, ours: false });
        drop(state);
        self.connect(ifindex);
    }

    /// Takes an interface down: its routes go, and nobody is told about the routes.
    pub fn link_down(&self, ifindex: u32) {
        let mut state = self.state();
        if let Some(link) = state.snapshot.links.get_mut(&ifindex) {
            link.up = false;
        }
        let left: Vec<KernelRoute> = state
            .snapshot
            .table
            .iter()
            .filter(|route| route.next_hops.iter().all(|hop| hop.ifindex != ifindex))
            .cloned()
            .collect();
        state.snapshot.table = Table::new(left);
        drop(state);
        self.notify(Notice::Tables);
    }

    /// Brings an interface up again: its connected routes come back, others do not.
    pub fn link_up(&self, ifindex: u32) {
        if let Some(link) = self.state().snapshot.links.get_mut(&ifindex) {
            link.up = true;
        }
        self.connect(ifindex);
    }

    /// Adds a route as another program would.
    pub fn add_route(&self, route: KernelRoute) {
        let mut state = self.state();
        let routes: Vec<KernelRoute> = state.snapshot.table.iter().cloned().chain([route]).collect();
        state.snapshot.table = Table::new(routes);
        drop(state);
        self.notify(Notice::Tables);
    }

    /// Makes a change as another program would.
    pub fn change_by_other(&self, change: &RouteChange) {
        self.state().snapshot.table.apply(change);
        self.notify(Notice::Tables);
    }

    /// Drops every route to a prefix and tells nobody.
    pub fn lose_silently(&self, prefix: &ipnet::IpNet) {
        let mut state = self.state();
        let left: Vec<KernelRoute> =
            state.snapshot.table.iter().filter(|route| route.prefix != *prefix).cloned().collect();
        state.snapshot.table = Table::new(left);
    }

    /// Sets a neighbour, as ARP would.
    pub fn set_neighbour(&self, neighbour: Neighbour) {
        self.state().set_neighbour(neighbour.clone());
        self.notify(Notice::Neighbour(neighbour));
    }

    /// Sets a neighbour while the listener's socket buffer is full: it learns only that something was lost.
    pub fn lose_notifications(&self, neighbour: Neighbour) {
        self.state().set_neighbour(neighbour);
        self.notify(Notice::Lost);
    }

    /// Refuses every change with this `errno`; `None`: no longer.
    pub fn refuse(&self, errno: Option<i32>) {
        self.state().refuse = errno;
    }

    /// Route changes accepted so far.
    pub fn changes(&self) -> Vec<RouteChange> {
        self.state().changes.clone()
    }

    /// Neighbours asked for so far: interface index, address, managed.
    pub fn probes(&self) -> Vec<(u32, IpAddr, bool)> {
        self.state().probes.clone()
    }

    /// The tables as they are.
    pub fn tables(&self) -> Snapshot {
        self.state().snapshot.clone()
    }

    fn connect(&self, ifindex: u32) {
        let addresses = self.state().snapshot.addresses.clone();
        for entry in addresses.iter().filter(|entry| entry.ifindex == ifindex) {
            if let Ok(prefix) = ipnet::IpNet::new(entry.address, entry.length) {
                let next_hops = vec![super::plan::NextHop { gateway: None, ifindex }];
                self.add_route(KernelRoute { prefix: prefix.trunc(), metric: 0, protocol: 2, next_hops });
            }
        }
    }

    fn notify(&self, notice: Notice) {
        // Without an actor nobody listens.
        let _ = self.notices.send(notice);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn set_neighbour(&mut self, neighbour: Neighbour) {
        self.neighbours.retain(|entry| (entry.ifindex, entry.address) != (neighbour.ifindex, neighbour.address));
        self.neighbours.push(neighbour);
    }

    fn check(&self, what: &str) -> Result<(), FibError> {
        match self.refuse {
            Some(errno) => Err(refused(what, errno)),
            None => Ok(()),
        }
    }

    fn change(&mut self, change: &RouteChange) -> Result<(), FibError> {
        self.check("change a route")?;
        if let RouteChange::Replace { next_hops, .. } = change
            && next_hops
                .iter()
                .any(|hop| hop.gateway.is_some_and(|gateway| self.snapshot.table.on_link(gateway).is_none()))
        {
            return Err(refused("install a route", libc::ENETUNREACH));
        }
        self.snapshot.table.apply(change);
        self.changes.push(change.clone());
        Ok(())
    }

    fn route_to(&self, destination: IpAddr) -> Option<RouteTo> {
        if self.snapshot.addresses.iter().any(|entry| entry.address == destination) {
            return Some(RouteTo { ifindex: 1, gateway: None, source: Some(destination), local: true });
        }
        let covering = self.snapshot.table.iter().filter(|route| route.prefix.contains(&destination));
        let route = covering.max_by_key(|route| (route.prefix.prefix_len(), std::cmp::Reverse(route.metric)))?;
        let hop = route.next_hops.first()?;
        let own = self.snapshot.addresses.iter().find(|entry| entry.ifindex == hop.ifindex);
        Some(RouteTo {
            ifindex: hop.ifindex,
            gateway: hop.gateway,
            source: own.map(|entry| entry.address),
            local: false,
        })
    }
}

fn refused(what: &str, errno: i32) -> FibError {
    FibError::Refused { what: what.into(), reason: std::io::Error::from_raw_os_error(errno).to_string(), errno }
}

impl Kernel for FakeKernel {
    async fn snapshot(&self) -> Result<Snapshot, FibError> {
        Ok(self.tables())
    }

    async fn addresses(&self) -> Result<Vec<LocalAddress>, FibError> {
        Ok(self.tables().addresses)
    }

    async fn neighbours(&self) -> Result<Vec<Neighbour>, FibError> {
        Ok(self.state().neighbours.clone())
    }

    async fn change(&self, changes: &[RouteChange]) -> Vec<Result<(), FibError>> {
        let mut state = self.state();
        changes.iter().map(|change| state.change(change)).collect()
    }

    async fn route_to(&self, destination: IpAddr) -> Result<Option<RouteTo>, FibError> {
        Ok(self.state().route_to(destination))
    }

    async fn add_address(&self, ifindex: u32, address: IpAddr) -> Result<(), FibError> {
        let mut state = self.state();
        state.check("add an address")?;
        let length = if address.is_ipv4() { 32 } else { 128 };
        state.snapshot.addresses.push(LocalAddress { ifindex, address, length, ours: true });
        Ok(())
    }

    async fn remove_address(&self, ifindex: u32, address: IpAddr) -> Result<(), FibError> {
        let mut state = self.state();
        state.check("remove an address")?;
        state.snapshot.addresses.retain(|entry| (entry.ifindex, entry.address) != (ifindex, address));
        Ok(())
    }

    async fn probe(&self, ifindex: u32, address: IpAddr, managed: bool) -> Result<(), FibError> {
        let mut state = self.state();
        state.check("probe a neighbour")?;
        state.probes.push((ifindex, address, managed));
        Ok(())
    }
}
