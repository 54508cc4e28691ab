//! What the host lacks is named; the daemon refuses before it changes anything, or runs degraded until it is there.

use std::{fs, net::TcpListener, path::Path, time::Duration};

use anyhow::{Context, Result, ensure};
use edge_tests::{
    lab::{
        Lab, Speaker,
        edge::{EdgeDaemon, UNIT_CAPABILITIES, dedicated_service, one, tor_peer, vip},
        exec::{ip_batch, run, wait_for},
        topology::{DEDICATED_VIP, EDGE, EDGE_INTERFACE, NODES},
    },
    needs_namespaces,
};

/// The kernel's verification of the program is part of it.
const SOON: Duration = Duration::from_secs(60);

/// `edge-ctl status`, its exit code, and what is wrong.
fn status(lab: &Lab) -> Result<(Option<i32>, String)> {
    let socket = lab.edge_socket();
    let output = lab.edge_ctl_raw(&["status", "-o", "json", "--socket", socket.to_str().context("path")?])?;
    let row = one(serde_json::from_slice(&output.stdout).with_context(|| format!("{output:?}"))?)?;
    Ok((output.status.code(), row["problems"].to_string()))
}

fn degraded_by(lab: &Lab, words: &[&str]) -> Result<()> {
    wait_for(&format!("the status to name {words:?}"), SOON, || {
        let (code, problems) = status(lab)?;
        ensure!(code == Some(3) && words.iter().all(|word| problems.contains(word)), "exit {code:?}: {problems}");
        Ok(true)
    })?;
    Ok(())
}

fn attached(lab: &Lab, interface: &str) -> Result<bool> {
    let rows = lab.edge_ctl(&["xdp", "status"])?;
    let row = rows.as_array().and_then(|rows| rows.iter().find(|row| row["interface"] == interface).cloned());
    let row = row.with_context(|| format!("{interface} is not in {rows}"))?;
    ensure!(row["program"].is_u64() == (row["state"] != "missing"), "{row}");
    Ok(row["program"].is_u64())
}

/// The kernel id of the XDP program on the edge's interface.
fn program_on_interface(lab: &Lab) -> Result<Option<u64>> {
    let mut command = lab.command("edge", "ip")?;
    let links: serde_json::Value = serde_json::from_str(&run(command.args(["-j", "link", "show", EDGE_INTERFACE]))?)?;
    Ok(links[0]["xdp"]["prog"]["id"].as_u64())
}

fn announced(lab: &Lab) -> Result<bool> {
    let rows = lab.edge_ctl(&["service", "list"])?;
    let row = rows.as_array().and_then(|rows| rows.iter().find(|row| row["name"] == "front")).context("no front")?;
    let heard = lab.birdc("knode1", &["show", "route", &format!("{DEDICATED_VIP}/32")]);
    let heard = heard.is_ok_and(|text| text.contains(&DEDICATED_VIP.to_string()));
    ensure!((row["announced"] == "yes") == heard, "BIRD has the VIP: {heard}; {row}");
    Ok(heard)
}

fn not_announced(lab: &Lab) -> Result<()> {
    wait_for("the VIP not to be announced", SOON, || Ok(!announced(lab)?))?;
    Ok(())
}

/// All sessions up and a pool learnt, whatever is attached.
fn learnt(lab: &Lab) -> Result<()> {
    wait_for("sessions and pools", SOON, || {
        let row = one(lab.edge_ctl(&["status"])?)?;
        ensure!(row["peers_established"] == NODES.len() as u64 && row["backends_eligible"] == 6, "{row}");
        Ok(true)
    })?;
    Ok(())
}

#[test]
fn a_vip_is_announced_only_while_every_interface_has_the_program() -> Result<()> {
    needs_namespaces!("a_vip_is_announced_only_while_every_interface_has_the_program");
    let lab = Lab::up(Speaker::Bird, 1)?;
    // Only the interface says so, as a careful administrator has it: one that is missing has no setting at all.
    set(&lab, "conf/all/accept_local", "0")?;
    set(&lab, "conf/default/accept_local", "1")?;
    lab.attach_foreign_xdp()?;
    let foreign = program_on_interface(&lab)?.context("the foreign program is not attached")?;
    let configuration = lab.edge_configuration("1s").replace("[\"ens33\"]", "[\"ens33\", \"late0\"]")
        + &dedicated_service("front", 80, 80, "full-nat");
    let mut daemon = lab.start_edge(&configuration)?;
    degraded_by(&lab, &["late0", "ens33 already runs the XDP program", &foreign.to_string()])?;
    ensure!(!attached(&lab, "ens33")? && !attached(&lab, "late0")?, "attached beside a foreign program");
    learnt(&lab)?;
    ensure!(!announced(&lab)?, "announced without a program");
    ensure!(program_on_interface(&lab)? == Some(foreign), "the foreign program was touched");
    for word in ["no interface `late0`", "not ours"] {
        ensure!(daemon.log().contains(word), "the log does not say `{word}`");
    }

    run(lab.command("edge", "ip")?.args(["link", "set", "dev", EDGE_INTERFACE, "xdp", "off"]))?;
    wait_for("the program to be attached once the foreign one has gone", SOON, || attached(&lab, EDGE_INTERFACE))?;
    ensure!(!announced(&lab)?, "announced with one of two interfaces");
    let edge = lab.namespace("edge");
    ip_batch(Some(&edge), &["link add late0 type veth peer name late1".into(), "link set late0 up".into()])?;
    wait_for("the program to be attached to the interface that came", SOON, || attached(&lab, "late0"))?;
    wait_for("the VIP to be announced", SOON, || announced(&lab))?;
    wait_for("the status to be good", SOON, || {
        let (code, problems) = status(&lab)?;
        ensure!(code == Some(0), "exit {code:?}: {problems}");
        Ok(true)
    })?;
    lab.http("client", (EDGE, vip::HTTP).into(), 10)?;

    a_wrong_setting_withdraws_the_vip(&lab)?;

    ip_batch(Some(&edge), &["link del late0".into()])?;
    not_announced(&lab)?;
    degraded_by(&lab, &["late0"])?;
    lab.http("client", (EDGE, vip::HTTP).into(), 10).context("the other interface goes on")?;

    // Another daemon with the same files is refused and disturbs nothing.
    let file = lab.folder().join("edge.toml");
    let second = lab.edge_ctl_raw(&["run", "-c", file.to_str().context("path")?])?;
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    ensure!(second.status.code() == Some(1) && said.contains("another edge already answers"), "{second:?}");
    ensure!(said.contains(lab.edge_socket().to_str().context("path")?), "{said}");
    learnt(&lab).context("after the second daemon")?;
    lab.http("client", (EDGE, vip::HTTP).into(), 10).context("after the second daemon")?;
    daemon.stop()
}

/// Settings that somebody breaks while the daemon runs: nothing is announced that would not be forwarded.
fn a_wrong_setting_withdraws_the_vip(lab: &Lab) -> Result<()> {
    for (key, bad, good) in [("ip_forward", "0", "1"), ("conf/ens33/accept_local", "0", "1")] {
        set(lab, key, bad)?;
        not_announced(lab).context(key)?;
        degraded_by(lab, &[&key.replace('/', ".")])?;
        let rows = lab.edge_ctl(&["service", "list"])?.to_string();
        ensure!(rows.contains("no: a setting of the host is wrong"), "{key}: {rows}");
        set(lab, key, good)?;
        wait_for("the VIP to be announced again", SOON, || announced(lab)).context(key)?;
    }
    lab.http("client", (EDGE, vip::HTTP).into(), 10).map(drop)
}

fn set(lab: &Lab, key: &str, value: &str) -> Result<()> {
    let path = Path::new("/proc/sys/net/ipv4").join(key);
    lab.within("edge", || fs::write(&path, value).with_context(|| format!("set {}", path.display())))
}

/// The daemon must end with 1, say these words, and leave the host as it was.
fn refused(lab: &Lab, daemon: Result<EdgeDaemon>, words: &[&str]) -> Result<()> {
    let mut daemon = daemon?;
    let status = daemon.wait_end(SOON).with_context(|| format!("{words:?}"))?;
    let log = daemon.log();
    ensure!(status.code() == Some(1) && words.iter().all(|word| log.contains(word)), "{words:?}: {status}: {log}");
    let pins: Vec<_> = fs::read_dir(lab.pins())?.collect();
    ensure!(pins.is_empty(), "{words:?}: pins were left: {pins:?}");
    ensure!(!lab.edge_socket().exists(), "{words:?}: the socket was left");
    ensure!(lab.bgp_routes()?.is_empty(), "{words:?}: routes were left");
    ensure!(program_on_interface(lab)?.is_none(), "{words:?}: a program was left");
    let addresses = run(lab.command("edge", "ip")?.args(["addr", "show", "dev", "lo"]))?;
    ensure!(!addresses.contains(&DEDICATED_VIP.to_string()), "{words:?}: the VIP was left on lo");
    fs::remove_file(lab.log("edge", "edge-ctl")).context("forget the log")
}

#[test]
fn a_start_that_is_refused_names_the_reason_and_changes_nothing() -> Result<()> {
    needs_namespaces!("a_start_that_is_refused_names_the_reason_and_changes_nothing");
    let lab = Lab::up(Speaker::Bird, 1)?;
    let good = lab.edge_configuration("1s") + &tor_peer() + &dedicated_service("front", 80, 80, "full-nat");
    // The higher value of the interface and of `all` counts, so strict takes both.
    for (key, bad, fine, fix) in [
        ("ip_forward", "0", "1", "sysctl -w net.ipv4.ip_forward=1"),
        ("rp_filter", "1", "2", "sysctl -w net.ipv4.conf.ens33.rp_filter=2"),
        ("accept_local", "0", "1", "sysctl -w net.ipv4.conf.ens33.accept_local=1"),
    ] {
        let keys = match key {
            "ip_forward" => vec![key.to_owned()],
            _ => ["all", "ens33"].map(|whose| format!("conf/{whose}/{key}")).to_vec(),
        };
        keys.iter().try_for_each(|key| set(&lab, key, bad))?;
        refused(&lab, lab.start_edge(&good), &[fix])?;
        keys.iter().try_for_each(|key| set(&lab, key, fine))?;
    }
    for (missing, name) in [
        ("bpf", "CAP_BPF"),
        ("net_admin", "CAP_NET_ADMIN"),
        ("perfmon", "CAP_PERFMON"),
        ("net_bind_service", "CAP_NET_BIND_SERVICE"),
    ] {
        let left: Vec<&str> = UNIT_CAPABILITIES.into_iter().filter(|capability| *capability != missing).collect();
        refused(&lab, lab.start_edge_with(&good, &left), &[name])?;
    }
    let plain = lab.folder().join("not-a-bpffs");
    let pins = lab.pins();
    let elsewhere = good.replace(pins.to_str().context("path")?, plain.to_str().context("path")?);
    refused(&lab, lab.start_edge(&elsewhere), &["not-a-bpffs", "mount -t bpf"])?;
    ensure!(!plain.exists(), "the pin folder was made on a plain file system");
    let taken = lab.within("edge", || TcpListener::bind("0.0.0.0:179").context("take port 179"))?;
    refused(&lab, lab.start_edge(&good), &["0.0.0.0:179", "another BGP speaker", "bgp.listen_port"])?;
    drop(taken);
    let taken = lab.within("edge", || TcpListener::bind("127.0.0.1:9180").context("take port 9180"))?;
    refused(&lab, lab.start_edge(&good), &["[api] http", "127.0.0.1:9180"])?;
    drop(taken);
    Ok(())
}
