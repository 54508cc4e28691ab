//! The access log of connections that real clients made to real pods, and what the program's own view of them tells about
//! backends.

use std::{fs, net::SocketAddr, path::Path, time::Duration};

use anyhow::{Context, Result, ensure};
use edge_tests::{
    lab::{
        Lab, Speaker,
        edge::{one, vip},
        exec::wait_for,
        pods::SERVICE_NAME,
        topology::{EDGE, NODES, ingress},
    },
    needs_namespaces,
};

const LIMIT: Duration = Duration::from_secs(10);
/// A port of the VIP behind which no pod listens.
const CLOSED: u16 = 8099;

/// The lab's configuration with an access log, and a service to a port on which no pod listens.
fn configuration(lab: &Lab, access: &Path) -> String {
    format!(
        "{}\n[service.closed]\nlisten = [\"{EDGE}:{CLOSED}/tcp\"]\nbackends = {{ dns = \"{SERVICE_NAME}\", port = 81, \
         resolver = \"kube-dns\", record = \"a\" }}\n\n[log]\naccess = \"{}\"\nformat = \"$service $client $vip $backend \
         $packets_in $bytes_in $bytes_out $duration $connect_time $first_byte_time $end\"\n",
        lab.edge_configuration("1s"),
        access.display()
    )
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
