//! A reload, by SIGHUP or by `edge-ctl reload`, changes what changed and disturbs nothing else.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context, Result, ensure};
use edge_tests::{
    lab::{
        Lab, Speaker,
        client::{Echo, exchange_all},
        edge::{EdgeDaemon, dedicated_service, tor_peer, vip},
        exec::{ip_batch, run, wait_for},
        netns,
        pods::TCP_ECHO,
        topology::{DEDICATED_VIP, EDGE, NODES, ROUTER},
    },
    needs_namespaces,
};

const SOON: Duration = Duration::from_secs(5);
/// FRR's connect timer is part of it.
const SESSION: Duration = Duration::from_secs(20);

/// A service is gone from the lab's own configuration.
fn without_echo(text: &str) -> Result<String> {
    let start = text.find("\n[service.echo]").context("no [service.echo]")?;
    let end = text[start + 1..].find("\n[").map_or(text.len(), |length| start + 1 + length);
    Ok([&text[..start], &text[end..]].concat())
}

/// How often the session to each peer came up.
fn established(lab: &Lab) -> Result<BTreeMap<String, u64>> {
    let peers = lab.edge_ctl(&["bgp", "peers"])?;
    let rows = peers.as_array().context("bgp peers is no array")?.iter();
    rows.map(|row| {
        ensure!(row["state"] == "Established", "{row}");
        Ok((
            row["neighbor"].as_str().context("no neighbor")?.to_owned(),
            row["established_count"].as_u64().unwrap_or(0),
        ))
    })
    .collect()
}

fn service_names(lab: &Lab) -> Result<Vec<String>> {
    let rows = lab.edge_ctl(&["service", "list"])?;
    Ok(rows.as_array().into_iter().flatten().filter_map(|row| Some(row["name"].as_str()?.to_owned())).collect())
}

/// The number of the first line that holds `needle`.
fn line_of(text: &str, needle: &str) -> Result<usize> {
    Ok(text.lines().position(|line| line.contains(needle)).with_context(|| format!("no {needle}"))? + 1)
}

fn refused(lab: &Lab, port: u16) -> Result<()> {
    let answer = lab.open("client", (EDGE, port).into());
    let text = answer.as_ref().err().map(|error| format!("{error:#}")).unwrap_or_default();
    ensure!(text.contains("refused"), "a port without a service: {answer:?}");
    Ok(())
}

fn live_on(connections: &mut [Echo], what: &str) -> Result<()> {
    for round in 0..20 {
        exchange_all(connections).with_context(|| format!("{what}, round {round}"))?;
    }
    Ok(())
}

fn reload(daemon: &EdgeDaemon, text: &str) -> Result<String> {
    daemon.configure(text)?;
    let answer = daemon.reload()?;
    ensure!(answer.status.success(), "{answer:?}");
    Ok(String::from_utf8_lossy(&answer.stdout).into_owned())
}

/// A broken file: told by line, exit 2 from the command, and nothing else happens.
fn broken_files_change_nothing(lab: &Lab, daemon: &EdgeDaemon, good: &str) -> Result<()> {
    let before = (service_names(lab)?, established(lab)?);
    let twice = ["twice", "thrice"].map(|name| dedicated_service(name, 70, 80, "dnat")).concat();
    for (what, broken, needle) in [
        ("unknown key", good.replacen("balance = ", "balence = ", 1), "balence"),
        ("not TOML", format!("{good}\n[service.x\n"), "[service.x"),
        // Its listen line, the next one, is the fault.
        ("a listen address twice", format!("{good}{twice}"), "[service.thrice]"),
    ] {
        let below = usize::from(needle.contains("thrice"));
        let place = format!("edge.toml:{}:", line_of(&broken, needle)? + below);
        daemon.configure(&broken)?;
        let answer = daemon.reload()?;
        let said = String::from_utf8_lossy(&answer.stderr).into_owned();
        ensure!(answer.status.code() == Some(2) && said.contains(&place), "{what}, expected {place}: {answer:?}");
        let heard = daemon.log().len();
        netns::signal(daemon.pid().context("the daemon does not run")?, libc::SIGHUP)?;
        wait_for("SIGHUP to be answered in the log", SOON, || Ok(daemon.log()[heard..].contains(&place)))
            .with_context(|| what.to_owned())?;
        ensure!((service_names(lab)?, established(lab)?) == before, "{what}: something changed");
    }
    Ok(())
}

#[test]
fn a_reload_adds_and_removes_services_and_peers_and_disturbs_no_flow_and_no_session() -> Result<()> {
    needs_namespaces!("a_reload_adds_and_removes_services_and_peers_and_disturbs_no_flow_and_no_session");
    let lab = Lab::up(Speaker::Bird, 2)?;
    lab.start_tor()?;
    ip_batch(Some(&lab.namespace("client")), &[format!("route add {DEDICATED_VIP} via {EDGE}")])?;
    let base = lab.edge_configuration("1s");
    let first = base.clone() + &dedicated_service("going", 9000, TCP_ECHO, "full-nat");
    let mut daemon = lab.start_edge(&first)?;
    daemon.wait_ready(&lab, NODES.len() as u64, Duration::from_secs(30))?;
    let mut connections = lab.open_many("client", (EDGE, vip::ECHO).into(), 20)?;
    connections.extend(lab.open_many("client", (DEDICATED_VIP, 9000).into(), 20)?);
    connections.extend(lab.open_many("client", (EDGE, vip::ECHO).into(), 5)?);
    live_on(&mut connections, "before")?;
    let sessions = established(&lab)?;
    ensure!(sessions.len() == NODES.len() && sessions.values().all(|count| *count == 1), "{sessions:?}");

    broken_files_change_nothing(&lab, &daemon, &first)?;
    live_on(&mut connections, "after refused reloads")?;

    // One service removed on the edge's own address, one with its VIP, one service and one peer added.
    let second = without_echo(&base)?
        + &tor_peer()
        + &format!(
            "\n[service.coming]\nlisten = [\"{EDGE}:9001/tcp\"]\nbackends = {{ static = [\"10.1.0.4:{TCP_ECHO}\"] }}\n"
        );
    let said = reload(&daemon, &second)?;
    for word in
        ["service coming added", "service echo removed", "service going removed", &format!("peer {ROUTER} added")]
    {
        ensure!(said.contains(word), "expected `{word}` in: {said}");
    }
    wait_for("the added service to serve", SOON, || lab.open("client", (EDGE, 9001).into()).map(|_| true))?;
    wait_for("the removed services to go", SOON, || {
        let names = service_names(&lab)?;
        ensure!(!names.iter().any(|name| name == "echo" || name == "going"), "{names:?}");
        Ok(true)
    })?;
    refused(&lab, vip::ECHO)?;
    live_on(&mut connections, "flows of removed services")?;
    lab.http("client", (EDGE, vip::HTTP).into(), 30).context("a service that stayed")?;
    wait_for("the added peer's session", SESSION, || {
        ensure!(established(&lab)?.get(&ROUTER.to_string()) == Some(&1), "{:?}", established(&lab)?);
        Ok(true)
    })?;
    wait_for("the removed VIP to leave lo", SOON, || {
        let mut command = lab.command("edge", "ip")?;
        Ok(!run(command.args(["-4", "addr", "show", "dev", "lo"]))?.contains(&DEDICATED_VIP.to_string()))
    })?;
    live_on(&mut connections, "flows of a VIP that the host no longer holds")?;

    // Back again, this time by signal.
    daemon.configure(&(first + &tor_peer()))?;
    netns::signal(daemon.pid().context("the daemon does not run")?, libc::SIGHUP)?;
    wait_for("SIGHUP to bring the services back", SOON, || {
        lab.open("client", (DEDICATED_VIP, 9000).into())?;
        lab.open("client", (EDGE, vip::ECHO).into()).map(|_| true)
    })?;
    refused(&lab, 9001)?;
    live_on(&mut connections, "flows of services that came back")?;
    let now = established(&lab)?;
    let kept = sessions.iter().all(|(peer, count)| now.get(peer) == Some(count));
    ensure!(kept && now.get(&ROUTER.to_string()) == Some(&1), "sessions before {sessions:?}, now {now:?}");
    daemon.stop()
}
