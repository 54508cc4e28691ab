//! Changes at run time: what clients see takes a pod out, limits, ends of flows on order, and configurations that go back
//! by themselves. Real clients, pods and nodes; the daemon as it is installed.

use std::{
    collections::BTreeMap,
    fs,
    net::{SocketAddr, TcpStream},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use edge_tests::{
    lab::{
        Lab, Speaker,
        client::Echo,
        edge::{EdgeDaemon, vip},
        exec::wait_for,
        pods::TCP_ECHO,
        topology::{EDGE, NODES, ingress},
    },
    needs_namespaces,
    skip::count,
};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(20);
/// Maps that say where new flows go.
const MAPS: [&str; 6] = ["SERVICE_INDEX", "SERVICES", "BACKENDS", "BACKEND_STATE", "BACKEND_INDEX", "SELECTION"];

fn address(pod: usize) -> SocketAddr {
    (ingress(pod).address, TCP_ECHO).into()
}

fn backend(pod: usize) -> String {
    address(pod).to_string()
}

/// Three echo pods behind a port of the edge.
fn service(name: &str, port: u16, more: &str) -> String {
    let pods = (1..=3).map(|pod| format!("\"{}\"", backend(pod))).collect::<Vec<_>>().join(", ");
    format!("\n[service.{name}]\nlisten = [\"{EDGE}:{port}/tcp\"]\nbackends = {{ static = [{pods}] }}\n{more}\n")
}

fn state(lab: &Lab, service: &str, pod: usize) -> Result<String> {
    let row = lab.backend_row(service, address(pod))?;
    Ok(row["state"].as_str().unwrap_or_default().to_owned())
}

fn wait_state(lab: &Lab, service: &str, pod: usize, wanted: &str) -> Result<()> {
    lab.wait_backend(service, address(pod), wanted, SOON)
}

/// Connections of which some may not be answered: how many were, in `limit`.
fn try_many(lab: &Lab, port: u16, count: usize, limit: Duration) -> Result<usize> {
    lab.within("client", || {
        Ok(thread::scope(|scope| {
            let one = |_| scope.spawn(move || TcpStream::connect_timeout(&vip(port), limit).is_ok());
            let all: Vec<_> = (0..count).map(one).collect();
            all.into_iter().filter_map(|one| one.join().ok()).filter(|answered| *answered).count()
        }))
    })
}

fn on_pod(flows: &[Echo], pod: usize) -> usize {
    flows.iter().filter(|flow| flow.pod == format!("ingress-{pod}")).count()
}

fn started(lab: &Lab, more: &str) -> Result<(EdgeDaemon, String)> {
    let text = lab.edge_configuration("1s") + more;
    let mut daemon = lab.start_edge(&text)?;
    daemon.wait_ready(lab, NODES.len() as u64, Duration::from_secs(30))?;
    Ok((daemon, text))
}

#[test]
fn a_pod_that_answers_no_syn_is_ejected_by_what_clients_see_and_comes_back() -> Result<()> {
    needs_namespaces!("a_pod_that_answers_no_syn_is_ejected_by_what_clients_see_and_comes_back");
    let lab = Lab::up(Speaker::Bird, 3)?;
    let passive = "health = { passive = { failures = 3, share = 50, window = \"20s\", eject = \"4s\", limit = 50 } }";
    let (mut daemon, _) = started(&lab, &service("seen", 7101, passive))?;
    ensure!(try_many(&lab, 7101, 12, Duration::from_secs(3))? == 12, "every pod answers at first");
    let silence = |verb: &str| -> Result<()> {
        let mut ip = lab.command(&ingress(2).name, "ip")?;
        let done = ip.args(["route", verb, "blackhole", &format!("{EDGE}/32")]).status()?;
        ensure!(done.success(), "ip route {verb} failed");
        Ok(())
    };
    silence("add")?;
    // A SYN counts as unanswered once it is repeated, after a second.
    let answered = try_many(&lab, 7101, 30, Duration::from_millis(1600))?;
    ensure!(answered < 30, "nobody was sent to the silent pod");
    wait_state(&lab, "seen", 2, "ejected")?;
    let history = lab.edge_ctl(&["health", "history", "seen"])?;
    ensure!(history.to_string().contains("new flows failed; ejected for 4 s"), "{history}");
    let text = lab.edge_ctl_text(&["backend", "describe", "seen", &backend(2)])?;
    ensure!(text.contains("NO  health") && text.contains("too many connections of clients failed"), "{text}");
    for pod in [1, 3] {
        ensure!(state(&lab, "seen", pod)? == "up", "pod {pod} was touched");
    }
    silence("del")?;
    wait_state(&lab, "seen", 2, "up")?;
    wait_for("the pod to be given flows again", SOON, || Ok(on_pod(&lab.open_many("client", vip(7101), 12)?, 2) > 0))?;
    daemon.stop()
}

/// That flows of this pod have ended and no others. Those that have wait in vain, so all are asked at once.
fn only_flows_of_others_live(flows: &mut [Echo], pod: usize) -> Result<()> {
    let ended = format!("ingress-{pod}");
    let alive: Vec<(String, bool)> = thread::scope(|scope| {
        let asked: Vec<_> =
            flows.iter_mut().map(|flow| scope.spawn(|| (flow.pod.clone(), flow.exchange().is_ok()))).collect();
        asked.into_iter().filter_map(|asked| asked.join().ok()).collect()
    });
    ensure!(alive.len() == flows.len(), "a thread panicked");
    for (of, alive) in alive {
        ensure!(alive == (of != ended), "a flow of {of} is alive: {alive}");
    }
    Ok(())
}

#[test]
fn a_backend_at_its_run_time_limit_is_full_and_flows_end_on_order_and_when_their_backend_goes_down() -> Result<()> {
    needs_namespaces!(
        "a_backend_at_its_run_time_limit_is_full_and_flows_end_on_order_and_when_their_backend_goes_down"
    );
    let lab = Lab::up(Speaker::Bird, 3)?;
    let more = service("plain", 7101, "") + &service("resets", 7102, "on_down = \"reset\"");
    let (mut daemon, _) = started(&lab, &more)?;

    lab.edge_ctl(&["backend", "limit", "plain", &backend(1), "1"])?;
    let mut flows = lab.open_many("client", vip(7101), 30)?;
    for flow in &mut flows {
        flow.exchange()?;
    }
    wait_state(&lab, "plain", 1, "full")?;
    let full = on_pod(&flows, 1);
    let text = lab.edge_ctl_text(&["backend", "describe", "plain", &backend(1)])?;
    ensure!(text.contains("NO  limit") && text.contains("full: "), "{text}");
    let others = lab.open_many("client", vip(7101), 20)?;
    ensure!(on_pod(&others, 1) == 0, "a full backend got a new flow; it had {full}");
    daemon.stop()?;
    daemon.start(&lab)?;
    wait_state(&lab, "plain", 1, "full").context("the limit outlives the daemon")?;
    lab.edge_ctl(&["backend", "limit", "plain", &backend(1), "default"])?;
    wait_state(&lab, "plain", 1, "up")?;

    let pod = 2;
    let meant = on_pod(&flows, pod) + on_pod(&others, pod);
    let killed = lab.edge_ctl(&["flow", "kill", "plain", "--backend", &backend(pod)])?;
    ensure!(killed[0]["flows"] == meant || killed["flows"] == meant, "{meant} flows are with pod {pod}: {killed}");
    only_flows_of_others_live(&mut flows, pod)?;
    let left = (flows.len() + others.len() - meant) as u64;
    wait_for("the flows to be counted", SOON, || {
        let rows = lab.edge_ctl(&["flow", "count", "plain"])?;
        ensure!(rows[0]["active"] == left, "{left} are left: {rows}");
        Ok(true)
    })?;

    let mut flows = lab.open_many("client", vip(7102), 24)?;
    for flow in &mut flows {
        flow.exchange()?;
    }
    lab.edge_ctl(&["backend", "down", "resets", &backend(3)])?;
    wait_for("the flows of the backend that is down to end", SOON, || {
        let rows = lab.edge_ctl(&["flow", "count", "resets"])?;
        ensure!(rows[0]["active"] == (24 - on_pod(&flows, 3)) as u64, "{rows}");
        Ok(true)
    })?;
    only_flows_of_others_live(&mut flows, 3)?;
    daemon.stop()
}

#[test]
fn a_commit_rolls_back_by_itself_even_across_a_crash_and_one_that_was_confirmed_stays() -> Result<()> {
    needs_namespaces!("a_commit_rolls_back_by_itself_even_across_a_crash_and_one_that_was_confirmed_stays");
    let lab = Lab::up(Speaker::Bird, 3)?;
    let (mut daemon, text) = started(&lab, "")?;
    let mut flows = lab.open_many("client", vip(vip::ECHO), 10)?;
    let file = lab.folder().join("candidate").join("new.toml");
    fs::create_dir_all(file.parent().context("no folder")?)?;
    fs::write(&file, text + &service("coming", 7103, ""))?;
    let path = file.to_str().context("the path is no text")?;
    let serves = |wanted: bool| {
        wait_for(&format!("the new service to serve: {wanted}"), SOON, || {
            Ok(lab.open("client", vip(7103)).is_ok() == wanted)
        })
    };

    let told = lab.edge_ctl_text(&["config", "diff", path])?;
    ensure!(told.contains("would change") && told.contains("service coming added"), "{told}");
    ensure!(lab.open("client", vip(7103)).is_err(), "a diff changed something");
    let told = lab.edge_ctl_text(&["config", "commit", "--confirm", "3s", path])?;
    ensure!(told.contains("rolls back in 3 s"), "{told}");
    serves(true)?;
    serves(false)?;
    wait_for("the rollback to be told", SOON, || Ok(daemon.log().contains("nobody confirmed")))?;

    lab.edge_ctl(&["config", "commit", "--confirm", "6s", path])?;
    serves(true)?;
    let refused = lab.edge_ctl(&["reload"]).unwrap_err().to_string();
    ensure!(refused.contains("waits to be confirmed"), "{refused}");
    daemon.kill()?;
    daemon.start(&lab)?;
    serves(true).context("it waits across a crash")?;
    serves(false).context("and rolls back")?;

    lab.edge_ctl(&["config", "commit", "--confirm", "1h", path])?;
    let told = lab.edge_ctl_text(&["config", "commit"])?;
    ensure!(told.contains("kept") && told.contains("files still say otherwise"), "{told}");
    daemon.kill()?;
    daemon.start(&lab)?;
    daemon.wait_ready(&lab, NODES.len() as u64, SOON)?;
    serves(true).context("what was confirmed stays")?;
    lab.edge_ctl(&["reload"])?;
    serves(false).context("until the files are read again")?;
    for flow in &mut flows {
        flow.exchange().context("no flow was touched by any of it")?;
    }
    daemon.stop()
}

fn dumps(lab: &Lab) -> Result<BTreeMap<&'static str, Value>> {
    MAPS.into_iter().map(|map| Ok((map, lab.edge_ctl(&["map", "dump", map, "--limit", "100000"])?))).collect()
}

/// Thirty files, each with one fault: what is replaced by what, and a word of the message.
const FAULTS: [(&str, &str, &str); 30] = [
    ("[edge]", "[edge", "TOML"),
    ("[edge]", "[egde]", "egde"),
    ("interfaces =", "interface =", "interface"),
    ("hook = \"xdp-native\"", "hook = \"fast\"", "hook"),
    ("hook = \"xdp-native\"", "hook = 5", "hook"),
    ("pod_networks = [\"10.1.0.0/16\"]", "pod_networks = []", "pod_networks"),
    ("pod_networks = [\"10.1.0.0/16\"]", "pod_networks = [\"10.1.0.1/16\"]", "pod_networks"),
    ("pod_networks = [\"10.1.0.0/16\"]", "pod_networks = [\"0.0.0.0/0\"]", "pod_networks"),
    ("pin_path = \"/", "pin_path = \"", "pin_path"),
    ("socket = \"/", "socket = \"", "socket"),
    ("state_dir = \"/", "state_dir = \"", "state_dir"),
    ("[resolver.kube-dns]", "[resolver.kube-dnss]", "kube-dns"),
    ("servers = [", "servers = [\"dns.local\", ", "servers"),
    ("valid = \"1s\"", "valid = \"1\"", "valid"),
    ("valid = \"1s\"", "valid = \"2d\"", "valid"),
    ("asn = 64512", "asn = 0", "asn"),
    ("router_id = \"172.16.1.88\"", "router_id = \"edge\"", "router_id"),
    ("listen_port = 179", "listen_port = 70000", "listen_port"),
    ("remote_asn = 64512", "remote_asn = \"64512\"", "remote_asn"),
    ("le 32", "le 33", "import"),
    ("group = \"calico\"", "group = \"calicoo\"", "calicoo"),
    ("description = \"kcontrol\"", "descripton = \"kcontrol\"", "descripton"),
    ("8080/tcp", "8080/sctp", "listen"),
    ("8080/tcp", "0/tcp", "listen"),
    ("8080/tcp", "8443/tcp", "taken"),
    ("mode = \"dnat\"", "mode = \"nat\"", "mode"),
    ("balance = \"maglev\"", "balance = \"random\"", "balance"),
    ("balance = \"maglev\"", "health = {}", "health"),
    ("balance = \"maglev\"", "on_down = \"reselect\"", "on_down"),
    ("balance = \"maglev\"", "max_connections = 0", "max_connections"),
];

#[test]
fn a_reload_of_any_of_thirty_faulty_files_is_refused_with_its_line_and_leaves_every_map_as_it_was() -> Result<()> {
    needs_namespaces!("a_reload_of_any_of_thirty_faulty_files_is_refused_with_its_line_and_leaves_every_map_as_it_was");
    let lab = Lab::up(Speaker::Bird, 3)?;
    let (mut daemon, text) = started(&lab, "")?;
    let before = dumps(&lab)?;
    for (good, bad, word) in FAULTS {
        ensure!(text.contains(good), "the lab's configuration lacks `{good}`");
        let broken = text.replacen(good, bad, 1);
        let line = 1 + text.lines().position(|line| line.contains(good)).context("no line")?;
        daemon.configure(&broken)?;
        let answer = daemon.reload()?;
        let said = String::from_utf8_lossy(&answer.stderr).into_owned();
        ensure!(answer.status.code() == Some(2) && said.contains(word), "`{bad}`: {answer:?}");
        // Some faults are found where they matter: a resolver's name at the service that asks for it.
        let at_its_line = said.contains(&format!("edge.toml:{line}:"));
        ensure!(at_its_line || said.contains("edge.toml:"), "`{bad}` names no line: {said}");
        let now = dumps(&lab)?;
        ensure!(now == before, "`{bad}`: a map changed");
    }
    daemon.stop()
}

/// xorshift64*.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % limit
    }
}

#[test]
fn a_daemon_killed_at_random_moments_of_a_changing_scenario_finds_its_way_and_breaks_no_flow() -> Result<()> {
    needs_namespaces!("a_daemon_killed_at_random_moments_of_a_changing_scenario_finds_its_way_and_breaks_no_flow");
    let seed = std::env::var("EDGE_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(0x1234_5678_9abc);
    println!("seed {seed} (EDGE_SEED)");
    let mut random = Random(seed);
    let lab = Lab::up(Speaker::Bird, 3)?;
    let (mut daemon, text) = started(&lab, &service("changing", 7104, ""))?;
    let mut flows = lab.open_many("client", vip(vip::ECHO), 10)?;
    flows.extend(lab.open_many("client", vip(7104), 10)?);
    for round in 0..count("kills", 6, 200) {
        let pod = backend(1 + usize::try_from(random.below(3)).unwrap_or(0));
        let weight = (1 + random.below(9)).to_string();
        let extra = service("extra", 7105, if random.below(2) == 0 { "" } else { "balance = \"least-conn\"" });
        daemon.configure(&(text.clone() + if random.below(2) == 0 { "" } else { &extra }))?;
        let killed_after = Duration::from_micros(random.below(60_000));
        // Pods that leave DNS go on serving what they have.
        let replicas = 2 + usize::try_from(random.below(2)).unwrap_or(0);
        lab.publish_pods(1..=replicas)?;
        thread::scope(|scope| -> Result<()> {
            // It may die before it has answered either.
            scope.spawn(|| lab.edge_ctl_raw(&["backend", "weight", "changing", &pod, &weight]));
            scope.spawn(|| daemon.reload());
            thread::sleep(killed_after);
            let pid = daemon.pid().context("the daemon does not run")?;
            edge_tests::lab::netns::signal(pid, libc::SIGKILL)
        })?;
        daemon.kill()?;
        daemon.start(&lab)?;
        let what = || format!("round {round}, seed {seed}, killed after {killed_after:?}");
        daemon.wait_ready(&lab, NODES.len() as u64, Duration::from_secs(40)).with_context(what)?;
        wait_for("the maps to be as they should", SOON, || {
            let found = lab.edge_ctl(&["map", "audit"])?;
            ensure!(found.as_array().is_some_and(Vec::is_empty), "{found}");
            Ok(true)
        })
        .with_context(what)?;
        wait_for("the pool to be what DNS says", SOON, || {
            let rows = lab.edge_ctl(&["service", "list"])?;
            let row = rows.as_array().and_then(|rows| rows.iter().find(|row| row["name"] == "echo").cloned());
            let row = row.with_context(|| format!("no service echo in {rows}"))?;
            ensure!(row["backends"] == format!("{replicas}/{replicas}"), "{replicas} pods are in DNS: {row}");
            Ok(true)
        })
        .with_context(what)?;
        for flow in &mut flows {
            flow.exchange().with_context(what)?;
        }
    }
    daemon.stop()
}
