//! Sessions with a real BIRD 2 (Calico's speaker) in a namespace of its own.

mod common;

use std::{fs, net::IpAddr, path::PathBuf, time::Duration};

use common::{Daemon, Namespace, eventually, veth, which};
use edge_ctl::{
    bgp::{self, BgpEvent, BgpHandle},
    config::valid,
    model::{PathAttributes, RouteSet},
};
use tempfile::TempDir;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, timeout_at},
};

const PATIENCE: Duration = Duration::from_secs(15);
const OURS: &str = "10.0.0.1";
const THEIRS: &str = "10.0.0.2";

/// One edge and one BIRD, back to back.
struct Lab {
    edge: Namespace,
    node: Namespace,
    folder: TempDir,
    bird: Option<Daemon>,
}

impl Lab {
    fn new() -> Self {
        let (edge, node) = (Namespace::new("edge"), Namespace::new("node"));
        veth(&edge, &node, "eth0");
        for (namespace, host) in [(&edge, "1"), (&node, "2")] {
            namespace.ip(&format!("addr add 10.0.0.{host}/24 dev eth0"));
            namespace.ip(&format!("addr add fd00::{host}/64 dev eth0 nodad"));
        }
        Self { edge, node, folder: TempDir::new().unwrap(), bird: None }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("bird.ctl")
    }

    /// Starts BIRD with two static pod routes and the given `protocol bgp` bodies.
    fn bird(&mut self, protocols: &str) {
        self.bird = None;
        let config = format!(
            "router id 10.0.0.2;\nprotocol device {{}}\n\
             protocol static pods4 {{ ipv4; route 10.1.2.0/26 blackhole; route 10.1.3.0/26 blackhole; }}\n\
             protocol static pods6 {{ ipv6; route fd01:2::/64 blackhole; }}\n{protocols}\n"
        );
        let file = self.folder.path().join("bird.conf");
        fs::write(&file, config).unwrap();
        let mut command = self.node.command("bird");
        command.arg("-f").arg("-c").arg(&file).arg("-s").arg(self.socket());
        command.arg("-P").arg(self.folder.path().join("bird.pid"));
        self.bird = Some(Daemon::start(&mut command, &self.folder.path().join("bird.log")));
        eventually("BIRD answers", PATIENCE, || self.birdc("show status").map(drop));
    }

    fn birdc(&self, command: &str) -> Result<String, String> {
        let output = std::process::Command::new("birdc").arg("-s").arg(self.socket()).args(command.split(' ')).output();
        let output = output.map_err(|error| error.to_string())?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() { Ok(text) } else { Err(text) }
    }
}

fn peer(address: &str, remote_asn: u32) -> valid::Peer {
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
        ebgp_multihop: 1,
        import: None,
        export: None,
    }
}

fn config(peers: impl IntoIterator<Item = valid::Peer>) -> valid::Bgp {
    valid::Bgp {
        asn: 64512,
        router_id: "10.0.0.1".parse().unwrap(),
        listen_port: Some(179),
        networks: vec![],
        peers: peers.into_iter().map(|peer| (peer.address, peer)).collect(),
    }
}

/// The speaker and what it has said so far.
struct Edge {
    handle: BgpHandle,
    events: mpsc::Receiver<BgpEvent>,
    routes: RouteSet,
    seen: Vec<BgpEvent>,
}

impl Edge {
    async fn start(config: valid::Bgp) -> Self {
        let (sender, events) = mpsc::channel(4);
        let handle = bgp::spawn(config, sender).await.unwrap();
        Self { handle, events, routes: RouteSet::default(), seen: vec![] }
    }

    /// Takes events until `done` says so.
    async fn until(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !done(self) {
            match timeout_at(end, self.events.recv()).await {
                Ok(Some(BgpEvent::Routes(updates))) => updates.into_iter().for_each(|u| drop(self.routes.apply(u))),
                Ok(Some(event)) => self.seen.push(event),
                Ok(None) => panic!("{what}: the speaker ended"),
                Err(_) => panic!(
                    "{what}: not within {PATIENCE:?}; events {:?}; routes {:?}; {:#?}",
                    self.seen,
                    self.routes,
                    self.handle.summary().await
                ),
            }
        }
    }

    fn hops(&self, prefix: &str) -> Vec<String> {
        let prefix = prefix.parse().unwrap();
        let found = self.routes.iter().find(|(candidate, _)| **candidate == prefix);
        found.map(|(_, hops)| hops.iter().map(IpAddr::to_string).collect()).unwrap_or_default()
    }
}

/// Waits for BIRD to say `text` in answer to `command`, off the runtime's thread.
async fn bird_says(lab: &Lab, command: &str, text: &str) {
    let end = Instant::now() + PATIENCE;
    loop {
        let answer = lab.birdc(command).unwrap_or_else(|error| error);
        if answer.contains(text) {
            return;
        }
        assert!(Instant::now() < end, "`{command}` never said `{text}`; last: {answer}");
        sleep(Duration::from_millis(50)).await;
    }
}

fn skipped(name: &str) -> bool {
    let missing = which("bird").is_none() || which("birdc").is_none();
    if missing {
        println!("SKIPPED {name}: bird is not installed");
    }
    missing
}

const IBGP: &str = "protocol bgp edge { local 10.0.0.2 as 64512; neighbor 10.0.0.1 as 64512; \
    ipv4 { import all; export where source = RTS_STATIC; next hop self; }; \
    ipv6 { import all; export where source = RTS_STATIC; next hop self; }; }";

#[test]
fn an_active_internal_session_learns_announces_and_withdraws() {
    if skipped("an_active_internal_session_learns_announces_and_withdraws") {
        return;
    }
    let mut lab = Lab::new();
    lab.bird(&IBGP.replace("local 10.0.0.2", "passive on; local 10.0.0.2"));
    lab.edge.block_on(|| async {
        let mut edge = Edge::start(config([peer(THEIRS, 64512)])).await;
        edge.until("converged", |edge| edge.seen.contains(&BgpEvent::Converged)).await;
        assert_eq!(edge.hops("10.1.2.0/26"), [THEIRS]);
        assert_eq!(edge.hops("10.1.3.0/26"), [THEIRS]);

        let attributes = PathAttributes { communities: vec![(64512, 100)], med: Some(10), local_pref: Some(200) };
        edge.handle.announce("10.9.0.1/32".parse().unwrap(), attributes).await;
        bird_says(&lab, "show route all 10.9.0.1/32", "BGP.local_pref: 200").await;
        let shown = lab.birdc("show route all 10.9.0.1/32").unwrap();
        for text in ["BGP.next_hop: 10.0.0.1", "BGP.med: 10", "(64512,100)", "BGP.as_path: \n", "BGP.origin: IGP"] {
            assert!(shown.contains(text), "{text} in {shown}");
        }
        edge.handle.withdraw("10.9.0.1/32".parse().unwrap()).await;
        bird_says(&lab, "show route 10.9.0.1/32", "Network not found").await;

        edge.handle.shutdown().await;
        bird_says(&lab, "show protocols all edge", "Received: Administrative shutdown").await;
    });
}
