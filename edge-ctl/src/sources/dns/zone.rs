//! One resolver: its servers, shared by every name that is asked of it.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use hickory_resolver::proto::rr::{Name, RecordType as WireType};
use tokio::sync::Semaphore;

use super::{
    query::{Counts, Found, Servers},
    tracker::Outcome,
};
use crate::model::{RecordType, Resolver};

/// Names that are asked for at once: a start with a thousand of them must not flood the cluster's DNS.
const AT_ONCE: usize = 32;

/// A resolver that is asked.
pub(super) struct Zone {
    servers: Mutex<Arc<Servers>>,
    /// Servers that were found as endpoints of the resolver's own service; asked before the configured ones.
    followed: Mutex<Vec<SocketAddr>>,
    /// What servers counted that are configured no more.
    retired: Mutex<Counts>,
    turns: Semaphore,
}

impl Zone {
    pub fn new(resolver: &Resolver, timeout: Duration) -> Self {
        let servers = Servers::new(&resolver.servers, timeout, None);
        Self {
            servers: Mutex::new(Arc::new(servers)),
            followed: Mutex::default(),
            retired: Mutex::default(),
            turns: Semaphore::new(AT_ONCE),
        }
    }

    /// Takes over other servers, where they are others.
    pub fn reconfigure(&self, resolver: &Resolver, timeout: Duration) {
        let mut followed = self.followed();
        if resolver.policy.follow.is_none() {
            followed.clear();
        }
        self.use_servers(&in_turn(&followed, resolver), timeout);
    }

    /// These are the endpoints of the resolver's own service now. The configured servers stay behind them: they answered
    /// once, and are all there is where every endpoint has moved at once.
    pub fn follow(&self, found: Vec<SocketAddr>, resolver: &Resolver, timeout: Duration) {
        let mut followed = self.followed();
        if *followed != found {
            let servers: Vec<String> = found.iter().map(ToString::to_string).collect();
            tracing::info!(resolver = resolver.name, servers = servers.join(", "), "the resolver follows its servers");
            *followed = found;
            self.use_servers(&in_turn(&followed, resolver), timeout);
        }
    }

    fn use_servers(&self, addresses: &[SocketAddr], timeout: Duration) {
        if !self.servers().list.iter().map(|server| server.address).eq(addresses.iter().copied()) {
            self.reconnect(addresses, timeout);
        }
    }

    /// Servers as they are asked.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.servers().list.iter().map(|server| server.address).collect()
    }

    /// True for a server that is an endpoint of the resolver's own service.
    pub fn is_followed(&self, server: SocketAddr) -> bool {
        self.followed().contains(&server)
    }

    /// Makes connections anew with the next query.
    pub fn reconnect(&self, addresses: &[SocketAddr], timeout: Duration) {
        let mut servers = self.servers.lock().unwrap_or_else(PoisonError::into_inner);
        for server in servers.list.iter().filter(|server| !addresses.contains(&server.address)) {
            self.retired().add(&server.state().counts);
        }
        *servers = Arc::new(Servers::new(addresses, timeout, Some(&servers)));
    }

    /// The servers as they are now.
    pub fn servers(&self) -> Arc<Servers> {
        Arc::clone(&self.servers.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// As [`Servers::members`], a few names at a time.
    pub async fn members(&self, name: &Name, record: RecordType, counts: &mut Counts) -> Outcome {
        // Never closed.
        let _turn = self.turns.acquire().await;
        self.servers().members(name, record, counts).await
    }

    /// As [`Servers::look_up`].
    pub async fn look_up(&self, name: &Name, wire: WireType) -> Result<Vec<Found>, String> {
        self.servers().look_up(name, wire, &mut Counts::default()).await
    }

    /// What its servers have counted since the zone exists.
    pub fn counts(&self) -> Counts {
        let mut sum = self.retired().clone();
        for server in &self.servers().list {
            sum.add(&server.state().counts);
        }
        sum
    }

    fn followed(&self) -> MutexGuard<'_, Vec<SocketAddr>> {
        self.followed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn retired(&self) -> MutexGuard<'_, Counts> {
        self.retired.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Endpoints first, then the configured servers that are not among them.
fn in_turn(followed: &[SocketAddr], resolver: &Resolver) -> Vec<SocketAddr> {
    let configured = resolver.servers.iter().filter(|server| !followed.contains(server));
    followed.iter().chain(configured).copied().collect()
}
