//! Two edges of one ECMP group in dnat mode, with real stacks: requests are spread over both, all replies cross to the second,
//! and when the first is lost its flows go on by way of the other.
//!
//! ```text
//!  client 203.0.113.10 -- router --+-- edge1 --+-- pods 10.1.0.4, .5, .6
//!                                  +-- edge2 --+   (clients by way of edge2)
//! ```

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use edge_tests::{
    lab::{
        exec::{ip_batch, product, wait_for},
        netns,
    },
    needs_namespaces,
};

const VIP: &str = "198.51.100.10";
const PORT: u16 = 8080;
const PODS: [Ipv4Addr; 3] = [Ipv4Addr::new(10, 1, 0, 4), Ipv4Addr::new(10, 1, 0, 5), Ipv4Addr::new(10, 1, 0, 6)];
const HOSTS: [&str; 5] = ["client", "router", "edge1", "edge2", "pods"];
const CONNECTIONS: usize = 24;
const SOON: Duration = Duration::from_secs(60);

/// The network and its daemons; gone on drop.
struct Group {
    prefix: String,
    folder: PathBuf,
    pins: PathBuf,
    daemons: Vec<Child>,
}

impl Group {
    fn up() -> Result<Self> {
        let prefix = format!("e2e{}", std::process::id());
        let group = Self {
            folder: std::env::temp_dir().join(&prefix),
            pins: PathBuf::from(format!("/sys/fs/bpf/{prefix}")),
            prefix,
            daemons: Vec::new(),
        };
        fs::create_dir_all(&group.folder)?;
        let seed = group.folder.join("seed");
        fs::write(&seed, "a secret that both edges share")?;
        fs::set_permissions(&seed, fs::Permissions::from_mode(0o600))?;
        for host in HOSTS {
            ip_batch(None, &[format!("netns add {}", group.namespace(host))])?;
        }
        for (a, b) in
            [("client", "router"), ("router", "edge1"), ("router", "edge2"), ("edge1", "pods"), ("edge2", "pods")]
        {
            let (inside, peer) = (group.namespace(a), group.namespace(b));
            ip_batch(Some(&inside), &[format!("link add {b} type veth peer name {a} netns {peer}")])?;
        }
        for host in HOSTS {
            group.sysctls(host)?;
            ip_batch(Some(&group.namespace(host)), &commands(host))?;
        }
        Ok(group)
    }

    fn namespace(&self, host: &str) -> String {
        format!("{}-{host}", self.prefix)
    }

    fn sysctls(&self, host: &str) -> Result<()> {
        netns::within(&self.namespace(host), || {
            let set = |name: &str, value: &str| {
                fs::write(format!("/proc/sys/net/ipv4/{name}"), value).with_context(|| format!("{host}: {name}"))
            };
            set("ip_forward", "1")?;
            // Both ports and both addresses say which way: connections of one client are spread.
            set("fib_multipath_hash_policy", "1")?;
            for interface in fs::read_dir("/proc/sys/net/ipv4/conf")? {
                let interface = interface?.file_name();
                let interface = interface.to_string_lossy();
                set(&format!("conf/{interface}/rp_filter"), "0")?;
                set(&format!("conf/{interface}/accept_local"), "1")?;
                set(&format!("conf/{interface}/send_redirects"), "0")?;
                // A next hop goes with its link, as on a router that speaks BGP over it; Linux alone would go on
                // spreading over a link without a carrier.
                set(&format!("conf/{interface}/ignore_routes_with_linkdown"), "1")?;
            }
            Ok(())
        })
    }

    fn start_edge(&mut self, name: &str) -> Result<()> {
        let pins = self.pins.join(name);
        let state = self.folder.join(format!("{name}-state"));
        for folder in [&pins, &state] {
            fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
        }
        let backends = PODS.map(|pod| format!("\"{pod}:80\"")).join(", ");
        let configuration = format!(
            "[edge]\ninterfaces = [\"router\", \"pods\"]\nhook = \"tc\"\npod_networks = [\"10.1.0.0/16\"]\npin_path = \
             \"{}\"\nsocket = \"{}\"\nstate_dir = \"{}\"\nseed_file = \"{}\"\n\n[service.web]\nlisten = \
             [\"{VIP}:{PORT}/tcp\"]\nmode = \"dnat\"\nbackends = {{ static = [{backends}] }}\n",
            pins.display(),
            self.folder.join(format!("{name}.sock")).display(),
            state.display(),
            self.folder.join("seed").display(),
        );
        let file = self.folder.join(format!("{name}.toml"));
        fs::write(&file, configuration)?;
        let log = fs::File::create(self.folder.join(format!("{name}.log")))?;
        let mut command = Command::new(product("edge-ctl", "EDGE_CTL")?);
        command.arg("run").arg("-c").arg(&file).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        netns::start_inside(&mut command, &self.namespace(name), true)?;
        self.daemons.push(command.spawn().context("start edge-ctl")?);
        Ok(())
    }

    /// What an edge's program has counted under this reason.
    fn counted(&self, edge: &str, reason: &str) -> Result<u64> {
        let text = netns::within(&self.namespace(edge), || {
            let mut stream = TcpStream::connect("127.0.0.1:9180")?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: edge\r\nConnection: close\r\n\r\n")?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(text)
        })?;
        ensure!(text.contains("edge_backend_up"), "no metrics: {}", text.lines().next().unwrap_or_default());
        let wanted = format!("reason=\"{reason}\"");
        let lines = text.lines().filter(|line| line.starts_with("edge_reasons_total{") && line.contains(&wanted));
        Ok(lines.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum())
    }

    fn logs(&self) -> String {
        let read = |name: &str| fs::read_to_string(self.folder.join(name)).unwrap_or_default();
        format!("edge1:\n{}\nedge2:\n{}", read("edge1.log"), read("edge2.log"))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        for daemon in &mut self.daemons {
            // It may have ended by itself; then there is nothing to end.
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        for host in HOSTS {
            let _ = ip_batch(None, &[format!("netns del {}", self.namespace(host))]);
        }
        let _ = fs::remove_dir_all(&self.pins);
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn commands(host: &str) -> Vec<String> {
    let edge = |n: u8| {
        vec![
            format!("addr add 10.8.{n}.2/24 dev router"),
            format!("addr add 10.9.{n}.2/24 dev pods"),
            format!("addr add {VIP}/32 dev lo"),
            "link set router up".to_owned(),
            "link set pods up".to_owned(),
            format!("route add 203.0.113.0/24 via 10.8.{n}.1"),
            format!("route add 10.1.0.0/24 via 10.9.{n}.1"),
        ]
    };
    let lines = |lines: &[&str]| lines.iter().map(|line| (*line).to_owned()).collect::<Vec<_>>();
    let mut commands = match host {
        "client" => {
            lines(&["addr add 203.0.113.10/24 dev router", "link set router up", "route add default via 203.0.113.1"])
        }
        "router" => lines(&[
            "addr add 203.0.113.1/24 dev client",
            "link set client up",
            "addr add 10.8.1.1/24 dev edge1",
            "link set edge1 up",
            "addr add 10.8.2.1/24 dev edge2",
            "link set edge2 up",
        ]),
        "edge1" => edge(1),
        "edge2" => edge(2),
        _ => {
            let mut all = lines(&["addr add 10.9.1.1/24 dev edge1", "link set edge1 up"]);
            all.extend(lines(&["addr add 10.9.2.1/24 dev edge2", "link set edge2 up"]));
            all.extend(PODS.map(|pod| format!("addr add {pod}/32 dev lo")));
            all.push("route add default via 10.9.2.2".to_owned());
            all
        }
    };
    commands.push("link set lo up".to_owned());
    commands
}

/// Serves lines with the pod's address in front, in the pods' namespace, until the process ends.
fn serve(namespace: &str) -> Result<()> {
    for pod in PODS {
        let listener = netns::within(namespace, || Ok(TcpListener::bind((pod, 80))?))?;
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                thread::spawn(move || answer(pod, stream));
            }
        });
    }
    Ok(())
}

fn answer(pod: Ipv4Addr, mut stream: TcpStream) {
    let Ok(reader) = stream.try_clone() else { return };
    for line in BufReader::new(reader).lines().map_while(Result::ok) {
        if writeln!(stream, "{pod} {line}").is_err() {
            return;
        }
    }
}

/// A client's connection, and the pod that it reached.
struct Connection {
    stream: TcpStream,
    pod: String,
}

impl Connection {
    fn open(namespace: &str) -> Result<Self> {
        let vip: SocketAddr = format!("{VIP}:{PORT}").parse()?;
        let stream = netns::within(namespace, || Ok(TcpStream::connect_timeout(&vip, Duration::from_secs(10))?))?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        let mut connection = Self { stream, pod: String::new() };
        connection.pod = connection.ask("hello")?;
        Ok(connection)
    }

    /// The pod that answers.
    fn ask(&mut self, word: &str) -> Result<String> {
        writeln!(self.stream, "{word}")?;
        let mut line = String::new();
        BufReader::new(self.stream.try_clone()?).read_line(&mut line)?;
        let (pod, echoed) = line.trim_end().split_once(' ').with_context(|| format!("an answer of {line:?}"))?;
        ensure!(echoed == word, "{word} came back as {echoed}");
        Ok(pod.to_owned())
    }
}

fn all_go_on(connections: &mut [Connection], word: &str) -> Result<()> {
    for (number, connection) in connections.iter_mut().enumerate() {
        let pod = connection.ask(word).with_context(|| format!("connection {number}, {word}"))?;
        ensure!(pod == connection.pod, "connection {number} went from {} to {pod}", connection.pod);
    }
    Ok(())
}

#[test]
fn replies_cross_to_the_other_edge_and_flows_survive_the_loss_of_one() -> Result<()> {
    needs_namespaces!("replies_cross_to_the_other_edge_and_flows_survive_the_loss_of_one");
    let mut group = Group::up()?;
    for edge in ["edge1", "edge2"] {
        group.start_edge(edge)?;
    }
    run(&group).with_context(|| group.logs())
}

fn run(group: &Group) -> Result<()> {
    serve(&group.namespace("pods"))?;
    let router = group.namespace("router");
    // Each edge alone first, so that the spreading router is known to have two edges that work.
    for n in [1, 2] {
        ip_batch(Some(&router), &[format!("route replace {VIP}/32 via 10.8.{n}.2")])?;
        wait_for(&format!("edge{n} to serve"), SOON, || Ok(Connection::open(&group.namespace("client")).is_ok()))?;
    }
    ip_batch(Some(&router), &[format!("route replace {VIP}/32 nexthop via 10.8.1.2 nexthop via 10.8.2.2")])?;
    let before = group.counted("edge2", "mid-flow-adopted")?;
    let mut connections =
        (0..CONNECTIONS).map(|_| Connection::open(&group.namespace("client"))).collect::<Result<Vec<_>>>()?;
    all_go_on(&mut connections, "by both edges")?;
    wait_for("replies to have crossed", SOON, || Ok(group.counted("edge2", "mid-flow-adopted")? > before))?;
    let crossed = group.counted("edge2", "mid-flow-adopted")? - before;
    ensure!(crossed < CONNECTIONS as u64, "every connection's replies crossed: the router did not spread");

    ip_batch(Some(&group.namespace("edge1")), &["link set router down".to_owned()])?;
    all_go_on(&mut connections, "by the one that is left")?;
    all_go_on(&mut connections, "and on")?;
    for edge in ["edge1", "edge2"] {
        let lost = group.counted(edge, "reply-without-flow")?;
        ensure!(lost == 0, "{edge} had {lost} replies that it did not know");
    }
    // Connections made now find the edge that is left.
    Connection::open(&group.namespace("client"))?;
    Ok(())
}
