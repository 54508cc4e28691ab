//! The access log of connections that real clients made to real pods, and what the program's own view of them tells about
//! backends.

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::Path,
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use edge_tests::{
    lab::{
        Lab, Speaker,
        edge::{one, vip},
        exec::{program, run, wait_for},
        pods::SERVICE_NAME,
        topology::{EDGE, NODES, ingress},
    },
    needs_namespaces,
};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(10);
/// A port of the VIP behind which no pod listens.
const CLOSED: u16 = 8099;

/// Of the VIP and of pods: DNS over UDP, and iperf3 over TCP and UDP.
const DNS: u16 = 5300;
const IPERF: u16 = 5201;
/// What iperf3 sends one way over TCP.
const BULK: u64 = 8 << 20;

/// The lab's configuration with an access log, a service to a port on which no pod listens, and two to servers that
/// [`serve`] starts.
fn configuration(lab: &Lab, access: &Path) -> String {
    format!(
        "{2}\n[service.closed]\nlisten = [\"{EDGE}:{CLOSED}/tcp\"]\nbackends = {{ dns = \"{SERVICE_NAME}\", port = 81, \
         resolver = \"kube-dns\", record = \"a\" }}\n\n[service.dns]\nlisten = [\"{EDGE}:{DNS}/udp\"]\none_reply = true\n\
         backends = {{ static = [\"{0}:{DNS}\", \"{1}:{DNS}\"] }}\n\n[service.iperf]\nlisten = [\"{EDGE}:{IPERF}/tcp\", \
         \"{EDGE}:{IPERF}/udp\"]\nbackends = {{ static = [\"{0}:{IPERF}\"] }}\n\n[log]\naccess = \"{3}\"\nformat = \"$service $client $vip $backend \
         $packets_in $bytes_in $bytes_out $duration $connect_time $first_byte_time $end\"\n",
        ingress(1).address,
        ingress(2).address,
        lab.edge_configuration("1s"),
        access.display()
    )
}

/// dnsmasq in both pods, each with an answer of its own, and iperf3 in the first.
fn serve(lab: &Lab) -> Result<()> {
    for pod in 1..=2 {
        let mut dnsmasq = Command::new(program("dnsmasq", "dnsmasq-base")?);
        dnsmasq.args(["--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--user=root"]);
        dnsmasq.args(["--pid-file=", "--bind-interfaces", &format!("--port={DNS}")]);
        dnsmasq.arg(format!("--host-record={SERVICE_NAME},192.0.2.{pod}"));
        lab.spawn(&ingress(pod).name, "dnsmasq", &mut dnsmasq)?;
    }
    let mut iperf = Command::new(program("iperf3", "iperf3")?);
    lab.spawn(&ingress(1).name, "iperf3", iperf.args(["--server", "--port", &IPERF.to_string()]))?;
    Ok(())
}

/// The fields of every line of a service, in the order of the format.
fn lines(access: &Path, service: &str) -> Result<Vec<Vec<String>>> {
    let text = fs::read_to_string(access).with_context(|| access.display().to_string())?;
    let fields = text.lines().map(|line| line.split(' ').map(str::to_owned).collect::<Vec<_>>());
    Ok(fields.filter(|fields| fields.first().is_some_and(|first| first == service)).collect())
}

#[test]
fn every_finished_connection_has_one_line_that_tells_what_happened() -> Result<()> {
    needs_namespaces!("every_finished_connection_has_one_line_that_tells_what_happened");
    let lab = Lab::up(Speaker::Bird, 2)?;
    let access = lab.folder().join("access.log");
    let mut daemon = lab.start_edge(&configuration(&lab, &access))?;
    daemon.wait_ready(&lab, NODES.len() as u64, Duration::from_secs(30))?;

    lab.http("client", vip(vip::HTTP), 20)?;
    wait_for("20 lines", LIMIT, || Ok(lines(&access, "ingress-http")?.len() >= 20))?;
    let http = lines(&access, "ingress-http")?;
    ensure!(http.len() == 20, "more lines than connections: {http:?}");
    for line in &http {
        let number = |field: usize| line[field].parse::<f64>().with_context(|| format!("field {field} of {line:?}"));
        let backend: SocketAddr = line[3].parse()?;
        let known = (1..=2).any(|pod| SocketAddr::from((ingress(pod).address, 80)) == backend);
        ensure!(known && line[2] == vip(vip::HTTP).to_string(), "{line:?}");
        // At least SYN, ACK, request, FIN; a request and an answer of some hundred bytes.
        ensure!(number(4)? >= 4.0 && number(5)? > 200.0 && number(6)? > 300.0, "{line:?}");
        let (duration, connect, first_byte) = (number(7)?, number(8)?, number(9)?);
        ensure!(0.0 < connect && connect < first_byte, "connect time and first byte: {line:?}");
        // The end is told by a clock that ticks.
        ensure!(first_byte <= duration + 0.011 && duration < 10.0, "{line:?}");
        ensure!(line[10] == "fin", "{line:?}");
    }
    refused_connections_are_told_and_counted(&lab, &access)?;
    serve(&lab)?;
    each_dns_query_is_a_flow_of_its_own(&lab, &access)?;
    bulk_comes_through_and_is_counted(&lab, &access)?;
    logrotate(&lab, &daemon, &access)?;
    daemon.stop()
}

/// A backend's RST to a SYN is a line of its own, and a failure of that backend.
fn refused_connections_are_told_and_counted(lab: &Lab, access: &Path) -> Result<()> {
    for _ in 0..4 {
        ensure!(lab.open("client", vip(CLOSED)).is_err(), "a port that nobody listens on was reached");
    }
    wait_for("four refusals", LIMIT, || Ok(lines(access, "closed")?.len() >= 4))?;
    let refused = lines(access, "closed")?;
    ensure!(refused.len() == 4, "{refused:?}");
    ensure!(refused.iter().all(|line| line[10] == "refused" && line[8] == "-" && line[9] == "-"), "{refused:?}");
    let rows = lab.edge_ctl(&["backend", "list", "closed"])?;
    let rows = rows.as_array().context("backend list is no array")?;
    let fails: u64 = rows.iter().filter_map(|row| row["fails"].as_u64()).sum();
    ensure!(fails == 4, "four connections were refused: {rows:?}");
    let served = lab.edge_ctl(&["backend", "list", "ingress-http"])?;
    let served = served.as_array().context("backend list is no array")?;
    ensure!(served.iter().all(|row| row["fails"] == 0 && row["connect"].as_f64() > Some(0.0)), "{served:?}");
    let events = lab.edge_ctl(&["events"])?;
    let events = events.as_array().context("events is no array")?;
    let refusals = events.iter().filter(|row| row["reason"] == "refused" && row["service"] == "closed").count();
    ensure!(refusals == 4, "{events:?}");
    Ok(())
}

/// A flow of a one-reply service ends with the answer, so that one client's queries are spread.
fn each_dns_query_is_a_flow_of_its_own(lab: &Lab, access: &Path) -> Result<()> {
    const QUERIES: usize = 20;
    let ask = || lab.resolve_from("client", vip(DNS));
    let both: [IpAddr; 2] = [1, 2].map(|pod| Ipv4Addr::new(192, 0, 2, pod).into());
    let mut seen = BTreeSet::new();
    wait_for("answers of both servers", LIMIT, || {
        seen.extend(ask().unwrap_or_default());
        Ok(seen.len() == both.len())
    })?;
    for _ in 0..QUERIES {
        let answer = ask()?;
        ensure!(answer.len() == 1 && both.contains(&answer[0]), "{answer:?}");
    }
    wait_for("a line for each query", LIMIT, || Ok(lines(access, "dns")?.len() >= QUERIES + both.len()))?;
    for line in lines(access, "dns")? {
        ensure!(line[4] == "1", "a query is one packet: {line:?}");
    }
    Ok(())
}

/// iperf3 over TCP both ways, of which the log has at least what was received, and over UDP.
fn bulk_comes_through_and_is_counted(lab: &Lab, access: &Path) -> Result<()> {
    let (address, port, bulk) = (EDGE.to_string(), IPERF.to_string(), BULK.to_string());
    let iperf = |more: &[&str]| -> Result<Value> {
        let mut command = lab.command("client", program("iperf3", "iperf3")?)?;
        let common = ["--client", &address, "--port", &port, "--json", "--connect-timeout", "5000"];
        let said = run(command.args(common).args(more))?;
        serde_json::from_str(&said).with_context(|| format!("iperf3 {more:?}: {said}"))
    };
    wait_for("iperf3", LIMIT, || Ok(iperf(&["--bytes", "1000"]).is_ok()))?;
    // The receiver stops reading when the sender says that it is done, so that the last of it may be missing.
    let got = |report: &Value| report["end"]["sum_received"]["bytes"].as_u64().filter(|bytes| *bytes > 1 << 20);
    for (field, way) in [(5, &["--bytes", &bulk][..]), (6, &["--bytes", &bulk, "--reverse"])] {
        let report = iperf(way)?;
        let received = got(&report).with_context(|| format!("{way:?}: {report}"))?;
        let counted = |line: &Vec<String>| line[field].parse::<u64>().is_ok_and(|bytes| bytes >= received);
        wait_for("the line of it", LIMIT, || Ok(lines(access, "iperf")?.iter().any(counted)))?;
    }
    let report = iperf(&["--udp", "--bitrate", "20M", "--bytes", "1000000"])?;
    let (sent, lost) = (&report["end"]["sum"]["packets"], &report["end"]["sum"]["lost_packets"]);
    ensure!(sent.as_u64() > lost.as_u64(), "no datagram came through: {report}");
    Ok(())
}

/// What logrotate does: move the file, then reload.
fn logrotate(lab: &Lab, daemon: &edge_tests::lab::edge::EdgeDaemon, access: &Path) -> Result<()> {
    let rotated = access.with_extension("log.1");
    let before = fs::read_to_string(access)?;
    fs::rename(access, &rotated)?;
    let reload = daemon.reload()?;
    ensure!(reload.status.success(), "{}", String::from_utf8_lossy(&reload.stderr));
    wait_for("the new file", LIMIT, || {
        lab.http("client", vip(vip::HTTP), 1)?;
        Ok(access.exists())
    })?;
    wait_for("a line in it", LIMIT, || Ok(!lines(access, "ingress-http")?.is_empty()))?;
    ensure!(fs::read_to_string(&rotated)?.starts_with(&before), "the old file lost lines");
    let status = one(lab.edge_ctl(&["status"])?)?;
    ensure!(status["access_lost"] == 0, "{status}");
    ensure!(status["access_written"].as_u64() >= Some(25), "{status}");
    Ok(())
}

#[test]
fn a_capture_holds_every_packet_as_it_came_and_as_it_left_and_tcpdump_reads_it() -> Result<()> {
    needs_namespaces!("a_capture_holds_every_packet_as_it_came_and_as_it_left_and_tcpdump_reads_it");
    let lab = Lab::up(Speaker::Bird, 1)?;
    let mut daemon = lab.start_ready_edge("1s")?;
    let file = lab.folder().join("capture.pcapng");
    let (path, socket, pins) = (file.display().to_string(), lab.edge_socket(), lab.pins());
    let (socket, pins) = (socket.display().to_string(), pins.display().to_string());
    let target = vip(vip::HTTP).to_string();
    let arguments =
        ["capture", &target, "-w", &path, "--count", "20", "--seconds", "20", "--socket", &socket, "--pin-path", &pins];
    let output = std::thread::scope(|scope| {
        let capture = scope.spawn(|| lab.edge_ctl_raw(&arguments));
        // Two interface descriptions are written at once, packets once the order stands.
        let captured = wait_for("captured packets", LIMIT, || {
            lab.http("client", vip(vip::HTTP), 1)?;
            Ok(capture.is_finished())
        });
        captured.and(capture.join().map_err(|_| anyhow::anyhow!("the capture's thread panicked"))?)
    })?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success() && said.contains("20 packets written, 0 lost"), "{said}");

    let mut tcpdump = std::process::Command::new("tcpdump");
    let read = edge_tests::lab::exec::run(tcpdump.args(["-n", "-r", &path]))?;
    let (client, pod) = (format!("> {EDGE}.{}:", vip::HTTP), format!("> {}.80:", ingress(1).address));
    let (before, after) = (
        read.lines().filter(|line| line.contains(&client)).count(),
        read.lines().filter(|line| line.contains(&pod)).count(),
    );
    ensure!(before > 0 && before.abs_diff(after) <= 1, "{before} to the VIP, {after} to the pod:\n{read}");
    ensure!(read.lines().count() == 20, "{read}");
    let control = || lab.edge_ctl(&["map", "dump", "CONTROL"]);
    wait_for("the end of the order", LIMIT, || Ok(control()?.to_string().contains("capture_until=0")))?;
    daemon.stop()
}
