//! `edge-lab smoke`: the main job without a person. One table, passed or failed.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::{
    Lab, Speaker,
    client::{Spread, exchange_all},
    edge::{EdgeDaemon, vip},
    exec::wait_for,
    topology::{EDGE, NODES, ingress},
};

/// How long a DNS answer counts in the smoke run.
const VALID: &str = "1s";
/// Within what a change of the service must show: `valid` and a second.
const FOLLOWED: Duration = Duration::from_secs(2);

/// Builds a lab, runs the daemon in it, checks the main job and prints the table, each line once it is known. True
/// where every check passed.
///
/// # Errors
/// Where the lab cannot be built; checks that fail are in the table.
pub fn run() -> Result<bool> {
    println!("{:<32} {:<6} DETAIL", "CHECK", "RESULT");
    let started = Instant::now();
    let mut lab = Lab::up(Speaker::Bird, 1)?;
    let built = format!("{} namespaces in {:.1} s", lab.namespaces().len(), started.elapsed().as_secs_f64());
    let mut table = Table { passed: true };
    table.add("lab", Ok(built));
    let mut daemon = lab.start_edge(&lab.edge_configuration(VALID))?;
    let ready = daemon.wait_ready(&lab, NODES.len() as u64, Duration::from_secs(30));
    let failed = ready.is_err();
    table.add("daemon ready", ready.map(|waited| format!("after {:.1} s", waited.as_secs_f64())));
    if !failed {
        table.add("pod networks in the kernel", routes(&lab));
        table.add("1 pod, through the VIP", reach(&lab, 1));
        for replicas in [2, 3, 2, 1] {
            table.add(&format!("scale to {replicas}"), follow(&mut lab, replicas));
        }
        table.add("traffic that is not ours", untouched(&lab));
        table.add("daemon stops", stop(&mut daemon));
    }
    drop(daemon);
    table.add("nothing left behind", leftovers(&mut lab));
    Ok(table.passed)
}

struct Table {
    passed: bool,
}

impl Table {
    fn add(&mut self, what: &str, result: Result<String>) {
        match result {
            Ok(detail) => println!("{what:<32} {:<6} {detail}", "ok"),
            Err(error) => {
                println!("{what:<32} {:<6} {error:#}", "FAILED");
                self.passed = false;
            }
        }
    }
}

fn routes(lab: &Lab) -> Result<String> {
    let found = lab.bgp_routes()?;
    let wanted: Vec<String> = NODES.iter().map(|node| format!("{} via {}", node.block(), node.address())).collect();
    ensure!(found == wanted, "protocol bgp routes are {found:?}, expected {wanted:?}");
    Ok(found.join(", "))
}

/// Requests on every port of the VIP; every pod in the service must answer on each, and no other.
pub fn reach(lab: &Lab, replicas: usize) -> Result<String> {
    let mut pods: Vec<String> = (1..=replicas).map(|number| ingress(number).name).collect();
    pods.sort();
    let each = 40 * replicas;
    let address = |port| (EDGE, port).into();
    let spreads = [
        ("http", lab.http("client", address(vip::HTTP), each)?),
        ("https", lab.https("client", address(vip::HTTPS), each)?),
        ("dnat", lab.http("client2", address(vip::HTTP_DNAT), each)?),
        ("udp", lab.udp("client", address(vip::UDP), each)?),
    ];
    for (what, spread) in &spreads {
        let seen: Vec<&String> = spread.keys().collect();
        ensure!(seen == pods.iter().collect::<Vec<_>>(), "{what}: answers from {spread:?}, expected from {pods:?}");
    }
    Ok(spreads.map(|(what, spread)| format!("{what} {}", counts(&spread))).join(", "))
}

fn counts(spread: &Spread) -> String {
    spread.values().map(usize::to_string).collect::<Vec<_>>().join("/")
}

/// Scales and waits until new connections reach exactly the pods of the service, while old connections live on.
fn follow(lab: &mut Lab, replicas: usize) -> Result<String> {
    let mut connections = lab.open_many("client", (EDGE, vip::ECHO).into(), 8)?;
    lab.scale(replicas)?;
    let scaled = Instant::now();
    wait_for("new connections to follow", FOLLOWED, || reached(lab, replicas))?;
    let followed = scaled.elapsed();
    // Each service asks DNS in its own time.
    let mut detail = String::new();
    wait_for("every service to follow", FOLLOWED, || {
        detail = reach(lab, replicas)?;
        Ok(true)
    })?;
    exchange_all(&mut connections).context("connections from before the change")?;
    Ok(format!("{detail}; followed in {:.1} s, {} old connections live", followed.as_secs_f64(), connections.len()))
}

/// True where new connections, 20 for each pod, reach every one of these pods and no other.
pub fn reached(lab: &Lab, replicas: usize) -> Result<bool> {
    let spread = lab.http("client", (EDGE, vip::HTTP).into(), 20 * replicas)?;
    let allowed = (1..=replicas).map(|number| ingress(number).name).collect::<Vec<_>>();
    ensure!(spread.keys().all(|pod| allowed.contains(pod)), "answers from {spread:?}");
    Ok(spread.len() == replicas)
}

fn untouched(lab: &Lab) -> Result<String> {
    let pod = ingress(1);
    let spread = lab.http("client", (pod.address, 80).into(), 20)?;
    ensure!(spread.contains_key(&pod.name), "answers from {spread:?}");
    Ok(format!("20 requests routed to {} directly", pod.address))
}

fn stop(daemon: &mut EdgeDaemon) -> Result<String> {
    daemon.stop().map(|()| "on SIGTERM, exit 0".to_owned())
}

fn leftovers(lab: &mut Lab) -> Result<String> {
    let (pins, folder) = (lab.pins(), lab.folder());
    lab.down()?;
    let left = lab.namespaces();
    ensure!(left.is_empty() && !pins.exists() && !folder.exists(), "left: {left:?}, {pins:?}, {folder:?}");
    Ok("no namespace, process, pin or folder".to_owned())
}
