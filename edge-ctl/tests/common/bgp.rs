//! The speaker under test, and a lab of one edge and one node, back to back.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use edge_ctl::{
    bgp::{self, BgpEvent, BgpHandle},
    config::valid,
    model::{RouteSet, view::BgpPeerRow},
};
use tempfile::TempDir;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, timeout_at},
};

use super::{Daemon, Namespace, veth};

/// How long anything may take.
pub const PATIENCE: Duration = Duration::from_secs(15);
/// The node's address.
pub const NODE: &str = "10.0.0.2";
/// The node's IPv6 address.
pub const NODE6: &str = "fd00::2";

/// One edge (10.0.0.1, fd00::1) and one node (10.0.0.2 and .3, fd00::2).
pub struct Lab {
    pub edge: Namespace,
    pub node: Namespace,
    pub folder: TempDir,
    pub daemons: Vec<Daemon>,
}

impl Lab {
    pub fn new() -> Self {
        let (edge, node) = (Namespace::new("edge"), Namespace::new("node"));
        veth(&edge, &node, "eth0");
        for (namespace, host) in [(&edge, 1), (&node, 2), (&node, 3)] {
            namespace.ip(&format!("addr add 10.0.0.{host}/24 dev eth0"));
            namespace.ip(&format!("addr add fd00::{host}/64 dev eth0 nodad"));
        }
        Self { edge, node, folder: TempDir::new().unwrap(), daemons: vec![] }
    }

    /// With link-local addresses alone: fe80::1 is the edge, fe80::2 the node.
    pub fn link_local() -> Self {
        let lab = Self::new();
        for (namespace, host) in [(&lab.edge, 1), (&lab.node, 2)] {
            namespace.ip("addr flush dev eth0");
            namespace.ip(&format!("addr add fe80::{host}/64 dev eth0 nodad"));
        }
        lab
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Starts a program in the node's namespace.
    pub fn start(&mut self, program: &str, arguments: &[&str]) {
        let mut command = self.node.command(program);
        command.args(arguments);
        let log = self.path(&format!("{}.log", Path::new(program).file_name().unwrap().display()));
        self.daemons.push(Daemon::start(&mut command, &log));
    }

    /// Ends everything in the node's namespace without a goodbye: `ip netns exec` becomes the program, so the child
    /// is the daemon itself.
    pub fn kill(&mut self) {
        self.daemons.clear();
    }
}

/// A peer with the defaults of the configuration.
pub fn peer(address: &str, remote_asn: u32) -> valid::Peer {
    valid::Peer {
        address: address.parse().unwrap(),
        remote_asn,
        port: 179,
        description: "node".to_owned(),
        group: None,
        passive: false,
        local_address: None,
        keepalive: Duration::from_secs(30),
        hold: Duration::from_secs(90),
        peer_edge: false,
        ebgp_multihop: 1,
        session: Default::default(),
        import: None,
        export: None,
        client_networks: vec![],
        intake: valid::Intake::default(),
    }
}

/// An edge in AS 64512.
pub fn config(peers: impl IntoIterator<Item = valid::Peer>) -> valid::Bgp {
    valid::Bgp {
        asn: 64512,
        router_id: "10.0.0.1".parse().unwrap(),
        listen_port: Some(179),
        networks: vec![],
        peers: peers.into_iter().map(|peer| (peer.address, peer)).collect(),
        ranges: vec![],
        links: Default::default(),
        transit: false,
        next_hops: Default::default(),
        drain: None,
        guard: valid::Guard::default(),
    }
}

/// `prefix ge min le max`.
pub fn rule(prefix: &str, min_length: u8, max_length: u8) -> valid::Term {
    valid::PrefixRule { prefix: prefix.parse().unwrap(), min_length, max_length }.into()
}

/// The speaker and what it has said so far.
pub struct Edge {
    pub handle: BgpHandle,
    events: mpsc::Receiver<BgpEvent>,
    pub routes: RouteSet,
    pub seen: Vec<BgpEvent>,
}

impl Edge {
    pub async fn start(config: valid::Bgp) -> Self {
        // A short channel, so that coalescing under backpressure is part of every test.
        let (sender, events) = mpsc::channel(1);
        let handle = bgp::spawn(config, sender).await.unwrap();
        Self { handle, events, routes: RouteSet::default(), seen: vec![] }
    }

    /// Takes events until `done` says so.
    pub async fn until(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !done(self) {
            match timeout_at(end, self.events.recv()).await {
                Ok(Some(BgpEvent::Routes(updates))) => {
                    for update in updates {
                        self.routes.apply(update);
                    }
                }
                Ok(Some(event)) => self.seen.push(event),
                Ok(None) => panic!("{what}: the speaker ended"),
                Err(_) => {
                    let summary = self.handle.summary().await;
                    panic!("{what}: not in time; events {:?}; routes {:?}; {summary:#?}", self.seen, self.routes)
                }
            }
        }
    }

    pub async fn converged(&mut self) {
        self.until("converged", |edge| edge.seen.contains(&BgpEvent::Converged)).await;
    }

    /// The next hops of exactly this prefix.
    pub fn hops(&self, prefix: &str) -> Vec<String> {
        let prefix = prefix.parse().unwrap();
        let found = self.routes.iter().find(|(candidate, _)| **candidate == prefix);
        found.map(|(_, hops)| hops.iter().map(IpAddr::to_string).collect()).unwrap_or_default()
    }

    /// The summary's row of a peer.
    pub async fn row(&self, peer: &str) -> BgpPeerRow {
        self.handle.summary().await.into_iter().find(|row| row.neighbor == peer).unwrap()
    }

    /// Waits until a peer's row satisfies `done`, taking events meanwhile.
    pub async fn row_until(&mut self, peer: &str, what: &str, done: impl Fn(&BgpPeerRow) -> bool) -> BgpPeerRow {
        let end = Instant::now() + PATIENCE;
        loop {
            let row = self.row(peer).await;
            if done(&row) {
                return row;
            }
            assert!(Instant::now() < end, "{what}: {row:#?}");
            while let Ok(event) = self.events.try_recv() {
                match event {
                    BgpEvent::Routes(updates) => updates.into_iter().for_each(|update| {
                        self.routes.apply(update);
                    }),
                    event => self.seen.push(event),
                }
            }
            sleep(Duration::from_millis(20)).await;
        }
    }
}

/// Waits until `ask` yields a text that contains `text`.
pub async fn says(what: &str, text: &str, ask: impl Fn() -> String) {
    let end = Instant::now() + PATIENCE;
    loop {
        let answer = ask();
        if answer.contains(text) {
            return;
        }
        assert!(Instant::now() < end, "{what} never said `{text}`; last: {answer}");
        sleep(Duration::from_millis(50)).await;
    }
}
