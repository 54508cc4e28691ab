//! Who may use a service, with real clients: at run time, by configuration, over a restart; and the MSS that both ends
//! agree on.

use std::{net::TcpStream, time::Duration};

use anyhow::{Context, Result, ensure};
use edge_tests::{
    lab::{
        Lab, Speaker,
        edge::vip,
        exec::{run, wait_for},
    },
    needs_namespaces,
    skip::full,
};
use serde_json::Value;

const SERVICE: &str = "echo";
const CLIENT: &str = "172.16.1.50/32";

fn ranges(lab: &Lab) -> Result<Vec<Value>> {
    Ok(lab.edge_ctl(&["acl", "list"])?.as_array().cloned().unwrap_or_default())
}

fn drops(lab: &Lab) -> Result<u64> {
    let rows = lab.edge_ctl(&["xdp", "stats"])?;
    let of = |row: &&Value| row["service"] == SERVICE && row["reason"] == "source-denied";
    Ok(rows.as_array().into_iter().flatten().find(of).map_or(0, |row| row["packets"].as_u64().unwrap_or(0)))
}

fn gets_in(lab: &Lab, host: &str) -> bool {
    lab.open(host, vip(vip::ECHO)).is_ok()
}

/// Whether the first SYN and a second one after a second stay without an answer; who is let in has one at once.
fn is_kept_out(lab: &Lab, host: &str) -> Result<bool> {
    lab.within(host, || Ok(TcpStream::connect_timeout(&vip(vip::ECHO), Duration::from_millis(1500)).is_err()))
}

#[test]
fn a_source_denied_at_run_time_stays_out_over_a_restart_until_its_time_is_over() -> Result<()> {
    needs_namespaces!("a_source_denied_at_run_time_stays_out_over_a_restart_until_its_time_is_over");
    let lab = Lab::up(Speaker::Bird, 3)?;
    let mut daemon = lab.start_ready_edge("1s")?;
    let mut before = lab.open("client", vip(vip::ECHO))?;
    let answer = lab.edge_ctl(&["acl", "add", SERVICE, "172.16.1.50", "--deny", "--for", "40s"])?;
    ensure!(answer[0]["prefix"] == CLIENT && answer[0]["action"] == "deny", "{answer}");
    wait_for("the denial to be in the map", Duration::from_secs(5), || Ok(!ranges_in_kernel(&lab)?.is_empty()))?;
    ensure!(is_kept_out(&lab, "client")?, "denied, and yet in");
    ensure!(gets_in(&lab, "client2"), "somebody else was refused");
    before.exchange().context("the flow that was there before")?;
    let row = ranges(&lab)?.pop().context("no range is listed")?;
    ensure!(row["hits"].as_u64() == Some(drops(&lab)?) && row["hits"].as_u64() > Some(0), "{row}");
    ensure!(row["source"] == "runtime" && row["expires"].as_u64() <= Some(40), "{row}");

    daemon.kill()?;
    ensure!(is_kept_out(&lab, "client")?, "in while the daemon is dead");
    daemon.start(&lab)?;
    daemon.wait_ready(&lab, 3, Duration::from_secs(30))?;
    let row = ranges(&lab)?.pop().context("the restart forgot the range")?;
    ensure!(row["expires"].as_u64() < Some(40), "a restart makes nothing last longer: {row}");
    if !full() {
        // What is left of the forty seconds is waited for with full counts; the order that replaces it ends alike.
        lab.edge_ctl(&["acl", "add", SERVICE, "172.16.1.50", "--deny", "--for", "3s"])?;
    }
    wait_for("the denial to be over", Duration::from_secs(45), || Ok(ranges_in_kernel(&lab)?.is_empty()))?;
    ensure!(gets_in(&lab, "client") && ranges(&lab)?.is_empty(), "it did not end by itself");

    for (arguments, code) in [
        (["acl", "rm", SERVICE, CLIENT], 1),
        (["acl", "add", "nobody", CLIENT], 1),
        (["acl", "add", SERVICE, "172.16.1.50/24"], 2),
    ] {
        let socket = lab.edge_socket();
        let output = lab.edge_ctl_raw(&[&arguments[..], &["--socket", socket.to_str().context("path")?]].concat())?;
        ensure!(output.status.code() == Some(code), "{arguments:?}: {output:?}");
    }
    daemon.stop()
}

fn ranges_in_kernel(lab: &Lab) -> Result<Vec<Value>> {
    let rows = lab.edge_ctl(&["map", "dump", "SOURCE_RANGES"])?;
    Ok(rows.as_array().cloned().unwrap_or_default())
}

#[test]
fn only_configured_sources_get_in_and_both_ends_use_the_configured_mss_on_tc_too() -> Result<()> {
    needs_namespaces!("only_configured_sources_get_in_and_both_ends_use_the_configured_mss_on_tc_too");
    for hook in ["xdp-native", "tc"] {
        let lab = Lab::up(Speaker::Bird, 3)?;
        let configuration = lab.edge_configuration("1s").replace("xdp-native", hook);
        let mark = format!("[service.{SERVICE}]\n");
        ensure!(configuration.contains(&mark), "no {mark}");
        let protected =
            configuration.replace(&mark, &format!("{mark}source_ranges = [\"203.0.113.0/24\"]\nmss = 900\n"));
        let mut daemon = lab.start_edge(&protected)?;
        daemon.wait_ready(&lab, 3, Duration::from_secs(30))?;
        if hook == "tc" {
            // Sockets leave their checksums to the card again, so that the program meets partial ones.
            run(lab.command("client2", "ethtool")?.args(["-K", "eth0", "tx", "on"]))?;
        }
        ensure!(is_kept_out(&lab, "client")?, "{hook}: a source in no range got in");
        let mut echo = lab.open("client2", vip(vip::ECHO)).with_context(|| format!("{hook}: an allowed source"))?;
        echo.exchange()?;
        let sockets = run(lab.command("client2", "ss")?.args(["-tinH", "state", "established"]))?;
        let mss = sockets.split_whitespace().find_map(|word| word.strip_prefix("mss:")).context("no mss")?.to_owned();
        // Timestamps take 12 of them.
        ensure!(mss == "888" || mss == "900", "{hook}: the client sends segments of {mss}\n{sockets}");
        let advertised = sockets.split_whitespace().find_map(|word| word.strip_prefix("advmss:")).unwrap_or("");
        ensure!(advertised != "900", "what the client offered is its own business: {sockets}");

        daemon.configure(&configuration)?;
        ensure!(daemon.reload()?.status.success(), "the reload failed");
        wait_for("the ranges to go", Duration::from_secs(5), || Ok(ranges_in_kernel(&lab)?.is_empty()))?;
        ensure!(gets_in(&lab, "client"), "{hook}: refused after the ranges were taken out");
        daemon.stop()?;
    }
    Ok(())
}
