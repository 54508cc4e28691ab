//! Reloads under many established flows, each of which changes something: none of them is touched.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use edge_tests::{
    lab::{
        Lab, Speaker,
        client::exchange_all,
        edge::{self, vip},
        pods::TCP_ECHO,
        topology::{EDGE, NODES, ingress},
    },
    needs_namespaces,
    scenario::Traffic,
    skip::count,
};

/// What each reload changes, in turn: a service comes, changes, goes; the service of the flows is balanced otherwise.
fn variant(base: &str, number: usize) -> String {
    let extra = |more: &str| {
        format!(
            "\n[service.extra]\nlisten = [\"{EDGE}:7201/tcp\"]\nbackends = {{ static = [\"{}:{TCP_ECHO}\"] }}\n{more}",
            ingress(1).address
        )
    };
    let balanced = |how: &str| {
        let (head, tail) = base.split_once("[service.echo]").unwrap_or((base, ""));
        format!("{head}[service.echo]{}", tail.replacen("balance = \"maglev\"", &format!("balance = \"{how}\""), 1))
    };
    match number % 4 {
        0 => base.to_owned() + &extra(""),
        1 => base.to_owned() + &extra("balance = \"least-conn\"\n"),
        2 => balanced("round-robin"),
        _ => base.to_owned(),
    }
}

#[test]
fn a_hundred_reloads_under_ten_thousand_flows_touch_none_of_them() -> Result<()> {
    needs_namespaces!("a_hundred_reloads_under_ten_thousand_flows_touch_none_of_them");
    let (flows, reloads) = (count("established flows", 500, 10_000), count("reloads", 12, 100));
    let lab = Lab::up(Speaker::Bird, 3)?;
    let base = lab.edge_configuration("1s");
    let mut daemon = lab.start_edge(&base)?;
    daemon.wait_ready(&lab, NODES.len() as u64, Duration::from_secs(30))?;
    // A tenth of them without pause, to see stalls; all of them before and after.
    let mut idle = lab.open_many("client", vip(edge::vip::ECHO), flows - flows / 10)?;
    exchange_all(&mut idle).context("before")?;
    let control = lab.open_many("client", (ingress(1).address, TCP_ECHO).into(), flows / 10)?;
    let traffic = Traffic::start(lab.open_many("client", vip(edge::vip::ECHO), flows / 10)?, control);
    let mut longest = Duration::ZERO;
    for number in 0..reloads {
        daemon.configure(&variant(&base, number))?;
        let start = Instant::now();
        let answer = daemon.reload()?;
        longest = longest.max(start.elapsed());
        let said = String::from_utf8_lossy(&answer.stdout).into_owned();
        ensure!(answer.status.success() && said.contains("service"), "reload {number} changed nothing: {answer:?}");
    }
    println!("{reloads} reloads under {flows} flows, the longest {longest:?}");
    let stalls = traffic.stop().context("while reloading")?;
    println!("{stalls:?}");
    stalls.compare()?;
    exchange_all(&mut idle).context("after the reloads")?;
    let rows = lab.edge_ctl(&["flow", "count", "echo"])?;
    ensure!(rows[0]["active"].as_u64() >= Some(idle.len() as u64), "{} flows are open: {rows}", idle.len());
    daemon.stop()
}
