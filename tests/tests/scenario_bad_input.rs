//! What is wrong is said, and changes nothing.

use std::{fs, net::Ipv4Addr, path::Path, time::Duration};

use anyhow::{Context, Result, ensure};
use edge_tests::{
    lab::{
        Lab, Speaker,
        dns::DnsMode,
        edge::vip,
        exec::wait_for,
        pods::{SERVICE, SERVICE_NAME},
        topology::{EDGE, ingress},
    },
    needs_namespaces,
};
use serde_json::Value;

/// `edge-ctl config check` on this text: exit code and everything it said.
fn check(lab: &Lab, text: &str) -> Result<(Option<i32>, String)> {
    let file = lab.folder().join("checked.toml");
    fs::write(&file, text)?;
    let output = lab.edge_ctl_raw(&["config", "check", "-c", file.to_str().context("path")?])?;
    let said = [output.stdout, output.stderr].concat();
    Ok((output.status.code(), String::from_utf8_lossy(&said).into_owned()))
}

#[test]
fn a_wrong_configuration_is_refused_with_its_line_by_check_and_by_run() -> Result<()> {
    needs_namespaces!("a_wrong_configuration_is_refused_with_its_line_by_check_and_by_run");
    let lab = Lab::up(Speaker::Bird, 1)?;
    let good = lab.edge_configuration("1s");
    let (code, said) = check(&lab, &good)?;
    ensure!(code == Some(0), "the lab's own configuration: exit {code:?}, {said}");
    let line = good.lines().position(|line| line.starts_with("balance")).context("no balance")? + 1;
    let broken = format!(".toml:{}:", good.lines().position(|line| line == "[bgp]").context("no [bgp]")? + 1);
    let twice = format!(
        "{good}\n[service.again]\nlisten = [\"{EDGE}:8080/tcp\"]\nbackends = {{ static = [\"10.1.0.4:80\"] }}\n"
    );
    for (what, text, expected) in [
        ("unknown key", good.replacen("balance = ", "balence = ", 1), vec!["balence", "balance", &line.to_string()]),
        ("wrong type", good.replacen("asn = 64512", "asn = \"x\"", 1), vec!["asn"]),
        ("not TOML", good.replacen("[bgp]", "[bgp", 1), vec![&*broken]),
        ("two services on one address", twice, vec!["8080", "again", "ingress-http"]),
        ("unknown resolver", good.replace("resolver = \"kube-dns\"", "resolver = \"kube\""), vec!["kube"]),
    ] {
        let (code, said) = check(&lab, &text)?;
        ensure!(code == Some(2), "{what}: config check exited with {code:?}: {said}");
        ensure!(expected.iter().all(|word| said.contains(word)), "{what}: expected {expected:?} in: {said}");
        let mut daemon = lab.start_edge(&text)?;
        let status = daemon.wait_end(Duration::from_secs(5)).with_context(|| what.to_owned())?;
        ensure!(status.code() == Some(2), "{what}: run exited with {status}: {}", daemon.log());
        ensure!(lab.bgp_routes()?.is_empty(), "{what}: routes were left");
    }
    let missing = lab.edge_ctl_raw(&["run", "-c", "/nonexistent/edge.toml"])?;
    let said = String::from_utf8_lossy(&missing.stderr).into_owned();
    ensure!(missing.status.code() == Some(2) && said.contains("/nonexistent/edge.toml"), "{missing:?}");
    Ok(())
}

#[test]
fn a_wrong_configuration_on_reload_leaves_the_running_one() -> Result<()> {
    needs_namespaces!("a_wrong_configuration_on_reload_leaves_the_running_one");
    let lab = Lab::up(Speaker::Bird, 1)?;
    let mut daemon = lab.start_ready_edge("1s")?;
    let good = lab.edge_configuration("1s");
    daemon.configure(&good.replacen("balance = ", "balence = ", 1))?;
    let answer = daemon.reload()?;
    let said = String::from_utf8_lossy(&answer.stderr).into_owned();
    ensure!(!answer.status.success() && said.contains("balence"), "{answer:?}");
    lab.http("client", (EDGE, vip::HTTP).into(), 30).context("after the refused reload")?;
    daemon.configure(&good)?;
    let answer = daemon.reload()?;
    ensure!(answer.status.success(), "{answer:?}");
    lab.http("client", (EDGE, vip::HTTP).into(), 30).context("after a reload that changed nothing")?;
    daemon.stop()
}

#[test]
fn a_host_that_cannot_forward_is_refused_with_the_fix() -> Result<()> {
    needs_namespaces!("a_host_that_cannot_forward_is_refused_with_the_fix");
    let lab = Lab::up(Speaker::Bird, 1)?;
    for (key, bad, good, expected) in [
        ("ip_forward", "0", "1", "ip_forward"),
        ("conf/ens33/rp_filter", "1", "2", "rp_filter"),
        ("conf/ens33/accept_local", "0", "1", "accept_local"),
    ] {
        set(&lab, key, bad)?;
        if key.ends_with("rp_filter") {
            // The kernel uses the higher of the interface's value and that of `all`, where 2 is loose.
            set(&lab, "conf/all/rp_filter", "1")?;
        }
        told(&lab, &lab.edge_configuration("1s"), &[expected])?;
        set(&lab, key, good)?;
        set(&lab, "conf/all/rp_filter", "2")?;
    }
    Ok(())
}

fn set(lab: &Lab, key: &str, value: &str) -> Result<()> {
    let path = Path::new("/proc/sys/net/ipv4").join(key);
    lab.within("edge", || {
        if key == "conf/ens33/accept_local" {
            fs::write("/proc/sys/net/ipv4/conf/all/accept_local", value)?;
        }
        fs::write(&path, value).with_context(|| format!("set {}", path.display()))
    })
}

/// Starts the daemon and requires that it says these words, whether it ends or goes on degraded; then ends it.
fn told(lab: &Lab, configuration: &str, words: &[&str]) -> Result<()> {
    let _ = fs::remove_file(lab.log("edge", "edge-ctl"));
    let mut daemon = lab.start_edge(configuration)?;
    let said = wait_for(&format!("the daemon to name {words:?}"), Duration::from_secs(5), || {
        let log = daemon.log();
        ensure!(words.iter().all(|word| log.contains(word)), "it said:\n{log}");
        Ok(true)
    });
    daemon.kill()?;
    said.map(|_| ())
}

#[test]
fn a_missing_interface_and_a_pin_path_without_bpffs_are_named() -> Result<()> {
    needs_namespaces!("a_missing_interface_and_a_pin_path_without_bpffs_are_named");
    let lab = Lab::up(Speaker::Bird, 1)?;
    let good = lab.edge_configuration("1s");
    told(&lab, &good.replace("interfaces = [\"ens33\"]", "interfaces = [\"nosuch0\"]"), &["nosuch0"])?;
    let plain = lab.folder().join("not-a-bpffs");
    fs::create_dir_all(&plain)?;
    let pins = lab.pins();
    let elsewhere = good.replace(pins.to_str().context("path")?, plain.to_str().context("path")?);
    told(&lab, &elsewhere, &["bpffs", "not-a-bpffs"])?;
    Ok(())
}

fn dns_row(lab: &Lab) -> Result<Value> {
    let names = lab.edge_ctl(&["dns", "list"])?;
    let row = names.as_array().and_then(|rows| rows.iter().find(|row| row["name"] == SERVICE_NAME));
    row.cloned().with_context(|| format!("{SERVICE_NAME} is not in {names}"))
}

#[test]
fn an_address_outside_the_pod_networks_never_becomes_a_backend() -> Result<()> {
    needs_namespaces!("an_address_outside_the_pod_networks_never_becomes_a_backend");
    let lab = Lab::up(Speaker::Bird, 2)?;
    let mut daemon = lab.start_ready_edge("1s")?;
    let foreign = Ipv4Addr::new(192, 0, 2, 66);
    lab.change_zone(|zone| {
        let service = zone.services.entry(SERVICE.to_owned()).or_default();
        service.addresses = vec![ingress(1).address, foreign];
    })?;
    wait_for("the foreign address to be refused", Duration::from_secs(3), || {
        let row = dns_row(&lab)?;
        ensure!(row["refused_addresses"].as_u64() > Some(0), "{row}");
        Ok(true)
    })?;
    let backends = lab.edge_ctl(&["backend", "list"])?.to_string();
    ensure!(!backends.contains(&foreign.to_string()), "{backends}");
    ensure!(daemon.log().contains(&foreign.to_string()), "the log does not name {foreign}");
    lab.http("client", (EDGE, vip::HTTP).into(), 60).context("with a foreign address in the answer")?;
    daemon.stop()
}

#[test]
fn the_last_good_pool_stays_while_dns_fails() -> Result<()> {
    needs_namespaces!("the_last_good_pool_stays_while_dns_fails");
    let lab = Lab::up(Speaker::Bird, 2)?;
    let mut daemon = lab.start_ready_edge("1s")?;
    for mode in [DnsMode::Servfail, DnsMode::Refused, DnsMode::Silent] {
        lab.dns_mode(mode)?;
        wait_for(&format!("{mode:?} to be noticed"), Duration::from_secs(20), || {
            let row = dns_row(&lab)?;
            ensure!(row["state"] == "last-good" && row["error"].is_string(), "{row}");
            Ok(true)
        })?;
        let spread = lab.http("client", (EDGE, vip::HTTP).into(), 60).with_context(|| format!("{mode:?}"))?;
        ensure!(spread.len() == 2, "{mode:?}: {spread:?}");
        lab.dns_mode(DnsMode::Normal)?;
        wait_for("DNS to be good again", Duration::from_secs(20), || Ok(dns_row(&lab)?["state"] == "fresh"))?;
    }
    daemon.stop()
}
