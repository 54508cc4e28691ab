//! DNS that is wrong in every way, under running and steadily arriving connections: nobody's connection may notice.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use edge_tests::{
    lab::{
        Lab, Speaker,
        dns_faults::Fault,
        edge::vip,
        exec::{self, wait_for},
        pods::{SERVICE_NAME, TCP_ECHO},
        topology::{DNS_PODS, EDGE, NODES, ingress},
    },
    needs_namespaces,
    scenario::Traffic,
    skip::count,
};
use serde_json::Value;

/// The start of a daemon, whose program the kernel has to verify, is part of it.
const SOON: Duration = Duration::from_secs(60);
const PODS: usize = 5;

/// The name's row in `dns list`.
fn row(lab: &Lab, name: &str) -> Result<Value> {
    let rows = lab.edge_ctl(&["dns", "list"])?;
    let found = rows.as_array().and_then(|rows| rows.iter().find(|row| row["name"] == name));
    found.cloned().with_context(|| format!("{name} is not in {rows}"))
}

fn number(row: &Value, key: &str) -> Result<u64> {
    row[key].as_u64().with_context(|| format!("no number `{key}` in {row}"))
}

fn addresses(row: &Value) -> Vec<String> {
    row["addresses"].as_array().into_iter().flatten().filter_map(|text| text.as_str().map(str::to_owned)).collect()
}

fn pods(count: usize) -> Vec<String> {
    let mut pods: Vec<String> = (1..=count).map(|number| ingress(number).address.to_string()).collect();
    pods.sort_by_key(|text| text.parse::<Ipv4Addr>().ok());
    pods
}

fn fault(lab: &Lab, server: &str, fault: Option<Fault>) -> Result<()> {
    lab.change_zone(|zone| {
        zone.faults.clear();
        zone.faults.extend(fault.map(|fault| (server.to_owned(), fault)));
    })
}

/// Waits for what the service's row says, the name asked again as soon as the question before is answered.
fn wait_asking(lab: &Lab, what: &str, mut holds: impl FnMut(&Value) -> Result<bool>) -> Result<Value> {
    let (mut last, mut told) = (Value::Null, None);
    wait_for(what, SOON, || {
        last = row(lab, SERVICE_NAME)?;
        let requests = number(&last, "requests")?;
        if told != Some(requests) {
            lab.edge_ctl(&["dns", "refresh", SERVICE_NAME])?;
            told = Some(requests);
        }
        holds(&last)
    })?;
    Ok(last)
}

/// Waits until the daemon has asked `more` times since now.
fn asked(lab: &Lab, more: u64) -> Result<Value> {
    let before = number(&row(lab, SERVICE_NAME)?, "requests")?;
    wait_asking(lab, "the daemon to ask", |row| Ok(number(row, "requests")? >= before + more))
}

/// What a fault must show: a state, and part of the error, the held change or a refused address.
type Case = (&'static str, Fault, &'static str, &'static str);

fn cases() -> Vec<Case> {
    let inside = Ipv4Addr::new(10, 1, 77, 7);
    let foreign = vec![
        Ipv4Addr::new(192, 0, 2, 1),
        Ipv4Addr::new(127, 0, 0, 1),
        Ipv4Addr::new(169, 254, 169, 254),
        Ipv4Addr::new(224, 0, 0, 5),
        EDGE,
    ];
    vec![
        ("late but in time", Fault::Delay(300), "fresh", ""),
        ("later than the timeout", Fault::Delay(1500), "last-good", "timed out"),
        ("no answer", Fault::Drop, "last-good", "timed out"),
        ("SERVFAIL", Fault::Servfail, "last-good", "SERVFAIL"),
        ("REFUSED", Fault::Refused, "last-good", "REFUSED"),
        ("NOTIMP", Fault::Notimp, "last-good", "NOTIMP"),
        ("no EDNS", Fault::NoEdns, "fresh", ""),
        ("NXDOMAIN", Fault::Nxdomain, "held", "NXDOMAIN"),
        ("no records", Fault::Empty, "held", "NODATA"),
        ("malformed", Fault::Malformed, "last-good", ""),
        ("truncated, TCP answers", Fault::Truncated, "fresh", ""),
        ("truncated, TCP closes", Fault::TruncatedForEver, "last-good", ""),
        ("wrong id", Fault::WrongId, "last-good", ""),
        ("wrong id before the right answer", Fault::WrongIdFirst(vec![inside]), "fresh", ""),
        ("wrong question", Fault::WrongQuestion, "last-good", ""),
        ("addresses that may not be backends", Fault::Lie(foreign.clone()), "last-good", "loopback"),
        ("the same beside the right ones", Fault::Add(foreign), "fresh", "a VIP of this edge"),
        ("records of another name", Fault::Stranger(vec![inside]), "fresh", ""),
        ("one of five", Fault::Only(1), "held", "1 of 5"),
        ("TTL 0", Fault::ZeroTtl, "fresh", ""),
        ("other case", Fault::OtherCase, "fresh", ""),
        ("10,000 records", Fault::Many(10_000), "last-good", "at most"),
        ("three aliases", Fault::Aliases(3), "fresh", ""),
        ("thirty aliases", Fault::Aliases(30), "last-good", "aliases"),
        ("an alias of itself", Fault::Loop, "last-good", "aliases"),
    ]
}

/// Opens connections at a steady pace until told to stop; how many, and the errors.
fn arrive(lab: &Lab, stop: &AtomicBool, pace: Duration) -> (usize, Vec<String>) {
    let (mut opened, mut failed) = (0, Vec::new());
    while !stop.load(Ordering::Relaxed) {
        let next = Instant::now() + pace;
        match lab.open("client", (EDGE, vip::ECHO).into()).and_then(|mut echo| echo.exchange()) {
            Ok(_) => opened += 1,
            Err(error) => failed.push(format!("{error:#}")),
        }
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    (opened, failed)
}

#[test]
fn no_fault_of_dns_changes_the_pool_resets_a_connection_or_fails_a_connect() -> Result<()> {
    needs_namespaces!("no_fault_of_dns_changes_the_pool_resets_a_connection_or_fails_a_connect");
    let total = count("running connections", 50, 500);
    let lab = Lab::up(Speaker::Bird, PODS)?;
    // Holds longer than any fault of this test.
    let configuration =
        lab.edge_configuration("1s").replace("valid = ", "hold = \"10m\"\nshrink_hold = \"10m\"\nvalid = ");
    let mut daemon = lab.start_edge(&configuration)?;
    daemon.wait_ready(&lab, 3, SOON)?;
    let control = lab.open_many("client", (ingress(1).address, TCP_ECHO).into(), total)?;
    let traffic = Traffic::start(lab.open_many("client", (EDGE, vip::ECHO).into(), total)?, control);
    let changes = number(&row(&lab, SERVICE_NAME)?, "changes")?;
    let stop = AtomicBool::new(false);
    let (arrived, judged) = thread::scope(|scope| {
        let arrivals = scope.spawn(|| arrive(&lab, &stop, Duration::from_millis(20)));
        let judged = cases().into_iter().try_for_each(|case| judge(&lab, case, changes));
        stop.store(true, Ordering::Relaxed);
        (arrivals.join(), judged)
    });
    judged?;
    let (opened, failed) = arrived.map_err(|_| anyhow::anyhow!("the arrivals' thread panicked"))?;
    println!("{opened} connections arrived meanwhile");
    ensure!(
        opened > 0 && failed.is_empty(),
        "{} of {} connects failed: {failed:?}",
        failed.len(),
        opened + failed.len()
    );
    let stalls = traffic.stop().context("running connections")?;
    println!("{stalls:?}");
    ensure!(stalls.rounds > 0, "no exchanges");
    let metrics =
        lab.within("edge", || edge_tests::lab::pods::http_get_path(([127, 0, 0, 1], 9180).into(), "/metrics", SOON))?;
    let held =
        format!("edge_dns_pool_changes_total{{name=\"{SERVICE_NAME}\",type=\"A\",resolver=\"kube-dns\"}} {changes}");
    ensure!(metrics.contains(&held), "no line `{held}` in the metrics");
    let stats = lab.edge_ctl(&["dns", "stats"])?;
    for class in [
        "success",
        "format_error",
        "server_failure",
        "host_not_found",
        "unimplemented",
        "refused",
        "unknown",
        "timed_out",
    ] {
        ensure!(number(&stats[0], class)? > 0, "no answer of class {class}: {stats}");
    }
    daemon.stop()
}

/// One fault on both servers: what must be shown, and that the pool stays.
fn judge(lab: &Lab, (what, kind, state, words): Case, changes: u64) -> Result<()> {
    fault(lab, "*", Some(kind))?;
    wait_asking(lab, "the state of the fault", |last| {
        let text = format!("{} {} {}", last["error"], last["held"], last["refused"]);
        ensure!(last["state"] == state && text.contains(words), "{last}");
        Ok(true)
    })
    .with_context(|| what.to_owned())?;
    // Not once, but as long as it lasts.
    let last = asked(lab, 3).with_context(|| what.to_owned())?;
    ensure!(addresses(&last) == pods(PODS), "{what}: {last}");
    ensure!(number(&last, "changes")? == changes, "{what}: the pool changed: {last}");
    if state == "held" {
        ensure!(
            last["held_age"].is_u64() && last["held_addresses"].as_array().is_some_and(|held| !held.is_empty()),
            "{last}"
        );
    }
    println!("{what}: {state}, error {}, held {}, refused {}", last["error"], last["held"], last["refused"]);
    fault(lab, "*", None)?;
    wait_asking(lab, "the right answer again", |last| {
        ensure!(
            last["state"] == "fresh" && last["held"].is_null() && last["refused"] == Value::Array(vec![]),
            "{last}"
        );
        Ok(true)
    })
    .with_context(|| what.to_owned())?;
    Ok(())
}

#[test]
fn one_good_server_of_two_is_enough_and_dns_servers_tells_which_fails() -> Result<()> {
    needs_namespaces!("one_good_server_of_two_is_enough_and_dns_servers_tells_which_fails");
    let mut lab = Lab::up(Speaker::Bird, 2)?;
    let mut daemon = lab.start_ready_edge("1s")?;
    for kind in [Fault::Drop, Fault::Servfail, Fault::Malformed] {
        for bad in DNS_PODS {
            fault(&lab, &bad.to_string(), Some(kind.clone()))?;
            // Followed through the other server.
            for replicas in [3, 2] {
                lab.scale(replicas)?;
                wait_asking(&lab, "the pool to follow", |row| Ok(addresses(row) == pods(replicas)))
                    .with_context(|| format!("{kind:?} at {bad}"))?;
            }
            ensure!(row(&lab, SERVICE_NAME)?["state"] == "fresh", "{kind:?} at {bad}");
        }
    }
    let servers = lab.edge_ctl(&["dns", "servers"])?;
    let states: Vec<&str> = servers.as_array().into_iter().flatten().filter_map(|row| row["state"].as_str()).collect();
    ensure!(states == ["up", "failing"], "{servers}");
    fault(&lab, "*", None)?;
    let records = lab.edge_ctl(&["dns", "query", SERVICE_NAME])?;
    ensure!(records.as_array().is_some_and(|records| records.len() == 2), "{records}");
    let refreshed = lab.edge_ctl(&["dns", "refresh", SERVICE_NAME])?;
    ensure!(refreshed.as_array().is_some_and(|rows| !rows.is_empty()), "{refreshed}");
    let unknown = lab.edge_ctl_raw(&[
        "dns",
        "refresh",
        "nobody.example.com",
        "--socket",
        lab.edge_socket().to_str().context("path")?,
    ])?;
    ensure!(unknown.status.code() == Some(1), "{unknown:?}");
    daemon.stop()
}

/// Knot with SRV records, of which the second priority is the backup tier, and dnsmasq with A records.
#[test]
fn knot_and_dnsmasq_are_followed_through_changes_and_outages() -> Result<()> {
    needs_namespaces!("knot_and_dnsmasq_are_followed_through_changes_and_outages");
    let lab = Lab::up(Speaker::Bird, 3)?;
    let folder = lab.folder().join("real-dns");
    fs::create_dir_all(&folder)?;
    let (knot, dnsmasq): (SocketAddr, SocketAddr) = ((DNS_PODS[0], 5301).into(), (DNS_PODS[1], 5302).into());
    write_zone(&folder, 1, 3)?;
    fs::write(folder.join("hosts"), hosts(3))?;
    fs::write(
        folder.join("knot.conf"),
        format!(
            "server:\n  listen: {}@{}\n  rundir: {f}\n  pidfile: {f}/knot.pid\ndatabase:\n  storage: {f}/db\n\
             zone:\n  - domain: real.test\n    file: {f}/real.test.zone\n    journal-content: none\n    zonefile-sync: -1\n",
            knot.ip(),
            knot.port(),
            f = folder.display()
        ),
    )?;
    let mut knotd = lab.spawn(
        "kube-dns-1",
        "knot",
        Command::new(exec::program("knotd", "knot")?).arg("-c").arg(folder.join("knot.conf")),
    )?;
    let mut masq = Command::new(exec::program("dnsmasq", "dnsmasq-base")?);
    masq.args([
        "--keep-in-foreground",
        "--no-resolv",
        "--no-hosts",
        "--bind-interfaces",
        "--user=root",
        "--local-ttl=1",
    ]);
    masq.arg(format!("--port={}", dnsmasq.port())).arg(format!("--listen-address={}", dnsmasq.ip()));
    masq.arg("--pid-file=").arg("--local=/real.test/").arg(format!("--addn-hosts={}", folder.join("hosts").display()));
    let mut masq = lab.spawn("kube-dns-2", "dnsmasq", &mut masq)?;
    let configuration = lab.edge_configuration("1s")
        + &format!(
            "\n[resolver.knot]\nservers = [\"{knot}\"]\nvalid = \"1s\"\nsearch = [\"none.real.test\", \"real.test\"]\n\
             [resolver.dnsmasq]\nservers = [\"{dnsmasq}\"]\nvalid = \"1s\"\n\
             [service.srv]\nlisten = [\"{EDGE}:7001/tcp\"]\n\
             backends = {{ dns = \"_echo._tcp\", resolver = \"knot\", record = \"srv\" }}\nmode = \"full-nat\"\n\
             [service.hosts]\nlisten = [\"{EDGE}:7002/tcp\"]\n\
             backends = {{ dns = \"web.real.test\", port = {TCP_ECHO}, resolver = \"dnsmasq\" }}\nmode = \"full-nat\"\n"
        );
    let mut daemon = lab.start_edge(&configuration)?;
    let follow = |name: &str, wanted: Vec<String>| {
        let mut last = Value::Null;
        wait_for(&format!("{name} to be {wanted:?}"), SOON, || {
            last = row(&lab, name)?;
            ensure!(addresses(&last) == wanted && last["state"] == "fresh", "{last}");
            Ok(true)
        })
        .map(drop)
    };
    let with_port = |pods: Vec<String>| pods.iter().map(|pod| format!("{pod}:{TCP_ECHO}")).collect::<Vec<_>>();
    follow("_echo._tcp", with_port(pods(3)))?;
    follow("web.real.test", pods(3))?;
    let (srv, web): (SocketAddr, SocketAddr) = ((EDGE, 7001).into(), (EDGE, 7002).into());
    // What DNS said is in the maps once the routes and our address towards the pods are known.
    daemon.wait_ready(&lab, NODES.len() as u64, SOON)?;
    // The third is of another priority: nobody is sent there while the others serve.
    for _ in 0..60 {
        let echo = lab.open("client", srv)?;
        ensure!(echo.pod != ingress(3).name, "a backup target was used");
    }
    let mut running = lab.open_many("client", srv, 10)?;
    running.extend(lab.open_many("client", web, 10)?);

    write_zone(&folder, 2, 2)?;
    fs::write(folder.join("hosts"), hosts(2))?;
    for child in [&knotd, &masq] {
        edge_tests::lab::netns::signal(child.id(), libc::SIGHUP)?;
    }
    follow("_echo._tcp", with_port(pods(2)))?;
    follow("web.real.test", pods(2))?;

    for child in [&mut knotd, &mut masq] {
        child.kill().context("kill a DNS server")?;
        child.wait().context("wait for a DNS server")?;
    }
    for name in ["_echo._tcp", "web.real.test"] {
        wait_for("the outage to show", SOON, || Ok(row(&lab, name)?["state"] == "last-good"))?;
        ensure!(addresses(&row(&lab, name)?).len() == 2, "{name} lost its pool with its server");
    }
    lab.open_many("client", srv, 20).context("with knot dead")?;
    lab.open_many("client", web, 20).context("with dnsmasq dead")?;
    edge_tests::lab::client::exchange_all(&mut running).context("connections from before")?;
    daemon.stop()
}

fn write_zone(folder: &Path, serial: u32, pods: usize) -> Result<()> {
    let mut zone = format!(
        "$ORIGIN real.test.\n$TTL 1\n@ SOA ns hostmaster {serial} 60 60 600 1\n@ NS ns\nns A {}\n",
        DNS_PODS[0]
    );
    for (number, (priority, weight)) in (1..=pods).zip([(10, 20), (10, 30), (20, 7)]) {
        zone += &format!(
            "_echo._tcp SRV {priority} {weight} {TCP_ECHO} p{number}\np{number} A {}\n",
            ingress(number).address
        );
    }
    fs::write(folder.join("real.test.zone"), zone).context("write the zone")
}

fn hosts(pods: usize) -> String {
    (1..=pods).map(|number| format!("{} web.real.test\n", ingress(number).address)).collect()
}
