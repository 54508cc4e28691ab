//! Scaling 1 -> 2 -> 3 -> 2 -> 1 under long-lived connections.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use edge_tests::{
    lab::{
        Lab, Speaker,
        edge::vip,
        exec::wait_for,
        pods::TCP_ECHO,
        smoke::reached,
        topology::{EDGE, ingress},
    },
    needs_namespaces,
    scenario::Traffic,
    skip::count,
};

/// `valid` of the resolver is 1 s; new connections follow a second after that.
const FOLLOWED: Duration = Duration::from_secs(2);

#[test]
fn scaling_leaves_long_lived_connections_alone_and_new_ones_follow_dns() -> Result<()> {
    needs_namespaces!("scaling_leaves_long_lived_connections_alone_and_new_ones_follow_dns");
    let total = count("long-lived connections", 50, 200);
    let mut lab = Lab::up(Speaker::Bird, 1)?;
    let mut daemon = lab.start_ready_edge("1s")?;
    let (echo, pod) = ((EDGE, vip::ECHO).into(), ingress(1).address);
    // As many routed connections: what the machine does to them, it does to the others.
    let control = lab.open_many("client", (pod, TCP_ECHO).into(), total)?;
    let traffic = Traffic::start(lab.open_many("client", echo, total - 2 * (total / 3))?, control);
    for replicas in [2, 3, 2, 1] {
        lab.scale(replicas)?;
        let scaled = Instant::now();
        wait_for("new connections to follow DNS", FOLLOWED, || reached(&lab, replicas))
            .with_context(|| format!("scaled to {replicas}"))?;
        println!("scaled to {replicas}: followed after {:?}", scaled.elapsed());
        if replicas > 1 && lab.state.pods.len() == replicas {
            // On the way up: some of these are on the pods that leave later.
            traffic.add(lab.open_many("client", echo, total / 3)?);
        }
    }
    let stalls = traffic.stop()?;
    println!("{stalls:?}");
    stalls.compare()?;
    let spread = lab.http("client", (EDGE, vip::HTTP).into(), 60)?;
    ensure!(spread.len() == 1 && spread.contains_key(&ingress(1).name), "after scaling to 1: {spread:?}");
    // Their connections have ended, so the pods that left may go.
    lab.terminate(2)?;
    lab.terminate(3)?;
    lab.http("client", (EDGE, vip::HTTP).into(), 60).context("after the pods that left were terminated")?;
    daemon.stop()
}
