//! Graceful restart on both sides: the daemon killed and started again under the eyes of its neighbours, and a node's
//! speaker killed under the eyes of the daemon.

use std::{fs, time::Duration};

use anyhow::{Context, Result, ensure};
use edge_tests::{
    lab::{
        Lab, Speaker,
        edge::{EdgeDaemon, dedicated_service, one, tor_peer, vip},
        exec::wait_for,
        pods::http_get_path,
        topology::{DEDICATED_VIP, EDGE, NODES, ingress},
    },
    needs_namespaces,
    unknown_flows::{counted, end_quiet_time, is_reset},
};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(30);

/// Whether every neighbour has the route to the VIP.
fn known_everywhere(lab: &Lab) -> Result<bool> {
    let network = format!("{DEDICATED_VIP}/32");
    for node in NODES {
        let text = lab.birdc(node.name, &["show", "route", &network]).unwrap_or_default();
        ensure!(text.contains(&network), "{} has no route to the VIP: {text}", node.name);
    }
    let text = lab.vtysh("router", &[&format!("show bgp ipv4 unicast {network} json")])?;
    let route: Value = serde_json::from_str(&text).context("read FRR's route")?;
    ensure!(
        route["paths"].as_array().is_some_and(|paths| !paths.is_empty()),
        "the router has no route to the VIP: {text}"
    );
    Ok(true)
}

/// Whether the session is up and the peer was told that forwarding went on over the restart.
fn has_restarted(row: &Value) -> bool {
    let told = row["capabilities_sent"].as_array().into_iter().flatten().filter_map(Value::as_str);
    row["state"] == "Established" && told.into_iter().any(|text| text.contains("(restarting) ipv4-unicast preserved"))
}

fn daemon_log(lab: &Lab) -> String {
    fs::read_to_string(lab.log("edge", "edge-ctl")).unwrap_or_default()
}

fn peers(lab: &Lab) -> Result<Vec<Value>> {
    Ok(lab.edge_ctl(&["bgp", "peers"])?.as_array().cloned().unwrap_or_default())
}

/// Waits until the daemon says that the kernel verifies its program, and that nothing of it is attached yet in this life.
fn answers_while_it_attaches(lab: &Lab, daemon: &EdgeDaemon, earlier: usize) -> Result<()> {
    wait_for("the status of a daemon that attaches", SOON, || {
        let status = one(lab.edge_ctl(&["status"])?)?;
        let metrics = lab.within("edge", || http_get_path(([127, 0, 0, 1], 9180).into(), "/metrics", SOON))?;
        let interfaces = lab.edge_ctl(&["xdp", "status"])?;
        // After the answers, which so were those of a daemon that had not finished.
        let finished = daemon.log().matches("the datapath holds the desired state").count();
        ensure!(finished == earlier, "it had finished before it answered: {status}");
        ensure!(status["problems"].to_string().contains("attaching") && status["attached"] == 0, "{status}");
        ensure!(interfaces.to_string().contains("\"attaching\""), "{interfaces}");
        ensure!(
            metrics.lines().any(|line| line.starts_with("edge_xdp_attached{") && line.ends_with(" 0")),
            "{metrics}"
        );
        Ok(true)
    })
    .map(drop)
}

/// Takes away what tells a daemon that the kernel has verified its program, as for one of another version. The link stays.
fn forget_programs(lab: &Lab) -> Result<()> {
    let folder = lab.pins().join("programs");
    for program in fs::read_dir(&folder).with_context(|| format!("read {}", folder.display()))? {
        fs::remove_file(program?.path()).context("remove the pin of a program")?;
    }
    Ok(())
}

#[test]
fn a_killed_daemon_that_starts_again_loses_no_route_at_its_neighbours_and_no_packet() -> Result<()> {
    needs_namespaces!("a_killed_daemon_that_starts_again_loses_no_route_at_its_neighbours_and_no_packet");
    let lab = Lab::up(Speaker::Bird, 1)?;
    lab.start_tor()?;
    let service = dedicated_service("front", 80, 80, "full-nat");
    let mut daemon = lab.start_edge(&[lab.edge_configuration("1s"), tor_peer(), service].concat())?;
    answers_while_it_attaches(&lab, &daemon, 0)?;
    daemon.wait_ready(&lab, NODES.len() as u64 + 1, SOON)?;
    wait_for("everyone to know the VIP", SOON, || known_everywhere(&lab))?;
    let unchanged = |when: &str| -> Result<()> {
        known_everywhere(&lab).with_context(|| when.to_owned())?;
        lab.http("client2", (DEDICATED_VIP, 80).into(), 20).with_context(|| format!("a request {when}")).map(drop)
    };

    for upgraded in [false, true] {
        let said = |text: &str| daemon_log(&lab).matches(text).count();
        let (finished, converged) = (said("the datapath holds the desired state"), said("BGP has converged"));
        daemon.kill()?;
        for _ in 0..5 {
            unchanged("while the daemon is dead")?;
        }
        if upgraded {
            forget_programs(&lab)?;
        }
        daemon.start(&lab)?;
        if upgraded {
            answers_while_it_attaches(&lab, &daemon, finished)?;
        }
        // Until every neighbour has heard the End-of-RIB of the new life.
        wait_for("the end of the restart", SOON, || {
            unchanged("while the daemon restarts")?;
            let rows = peers(&lab)?;
            ensure!(rows.len() == NODES.len() + 1 && rows.iter().all(has_restarted), "{rows:#?}");
            Ok(said("BGP has converged") > converged)
        })?;
        let restarts = || lab.birdc("kcontrol", &["show", "protocols", "all"]);
        wait_for("BIRD to end its help", SOON, || {
            unchanged("until the end of the restart")?;
            Ok(!restarts()?.contains("graceful restart active"))
        })?;
        wait_for("the program to be attached", SOON, || {
            unchanged("while the daemon attaches")?;
            Ok(said("the datapath holds the desired state") > finished)
        })?;
        unchanged("after the restart")?;
    }
    daemon.stop()
}

/// Kills a speaker that stands for another edge, and what becomes of connections that nobody knows before and after.
fn an_edge_is_lost(lab: &Lab, node: &str) -> Result<()> {
    let status = || one(lab.edge_ctl(&["status"])?);
    let mut clients = lab.open_many("client", vip(vip::ECHO), 2)?;
    end_quiet_time(lab)?;
    ensure!(status()?["quiet"] == 0, "{}", status()?);
    lab.edge_ctl(&["flow", "kill", "echo"])?;
    is_reset(clients[0].exchange()).context("while all edges are there")?;
    let [reset, silent] = counted(lab, "echo", ["mid-flow-reset", "mid-flow-silent"])?;
    ensure!(reset > 0, "no RST was counted");

    lab.kill_bgp(node)?;
    wait_for("the loss of the other edge to be noticed", SOON, || {
        let status = status()?;
        ensure!(status["edges_lost"] == 1 && status["quiet"].as_u64() > Some(0), "{status}");
        Ok(true)
    })?;
    clients[1].wait_for_lines(Duration::from_secs(1))?;
    let told = clients[1].exchange().err().context("a connection without a flow was answered")?;
    ensure!(!format!("{told:#}").contains("reset"), "the client was told: {told:#}");
    let now = counted(lab, "echo", ["mid-flow-reset", "mid-flow-silent"])?;
    ensure!(now[0] == reset && now[1] > silent, "before {reset} and {silent}, now {now:?}");
    end_quiet_time(lab)?;
    clients[1].wait_for_lines(SOON)?;
    is_reset(clients[1].exchange()).context("once the time is over")
}

#[test]
fn the_backends_of_a_node_whose_speaker_was_killed_stay_in_use_while_it_restarts() -> Result<()> {
    needs_namespaces!("the_backends_of_a_node_whose_speaker_was_killed_stay_in_use_while_it_restarts");
    let lab = Lab::up(Speaker::Bird, 3)?;
    let edge = "description = \"knode1\"\n";
    let configuration = lab.edge_configuration("1s");
    ensure!(configuration.contains(edge), "no {edge}");
    let mut daemon = lab.start_edge(&configuration.replace(edge, &format!("{edge}peer_edge = true\n")))?;
    daemon.wait_ready(&lab, NODES.len() as u64, SOON)?;
    let routes = lab.bgp_routes()?;
    an_edge_is_lost(&lab, "knode1")?;
    wait_for("the session to be lost and its routes to be stale", SOON, || {
        let rows = peers(&lab)?;
        let row = rows.iter().find(|row| row["desc"] == "knode1").context("no peer knode1")?;
        Ok(row["state"] != "Established" && row["pfx_stale"].as_u64() > Some(0))
    })?;
    let spread = lab.http("client", (EDGE, vip::HTTP).into(), 100).context("while the speaker is away")?;
    ensure!(spread.len() == 3 && spread.contains_key("ingress-2"), "{spread:?}");
    ensure!(lab.bgp_routes()? == routes, "the kernel's routes changed");
    let backends = lab.edge_ctl(&["backend", "list", "ingress-http"])?;
    let address = format!("{}:80", ingress(2).address);
    let state = |rows: &Value| {
        let rows = rows.as_array().cloned().unwrap_or_default();
        rows.into_iter().find(|row| row["backend"] == address.as_str()).map(|row| row["state"].clone())
    };
    ensure!(state(&backends) == Some("up".into()), "{backends}");
    lab.start_bgp("knode1")?;
    wait_for("the session to be back and nothing stale", SOON, || {
        let rows = peers(&lab)?;
        Ok(rows.iter().all(|row| row["state"] == "Established" && row["pfx_stale"] == 0))
    })?;
    // This BIRD was started without -R: it does not say that it has preserved anything, and tells its table anew.
    wait_for("the backend to be in use by the new session's route", SOON, || {
        let backends = lab.edge_ctl(&["backend", "list", "ingress-http"])?;
        ensure!(state(&backends) == Some("up".into()), "{backends}");
        Ok(true)
    })?;
    daemon.stop()
}
