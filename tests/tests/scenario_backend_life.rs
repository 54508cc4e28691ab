//! The end of a backend's life: a drain that is waited for, flows that move when their backend goes down, and the time for
//! which it was down.

use std::{
    net::{SocketAddr, UdpSocket},
    process::{Child, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use edge_tests::{
    lab::{
        Lab, Speaker,
        edge::{self, vip},
        exec::{product, wait_for},
        pods::{TCP_ECHO, UDP_ECHO},
        topology::{EDGE, NODES, ingress},
    },
    needs_namespaces,
};

const SOON: Duration = Duration::from_secs(20);
const RESELECTS: u16 = 5454;

/// `backend drain --wait`, running.
fn drain_and_wait(lab: &Lab, backend: SocketAddr) -> Result<Child> {
    let mut command = lab.command("edge", product("edge-ctl", "EDGE_CTL")?)?;
    command.args(["backend", "drain", "--wait", "echo", &backend.to_string(), "--socket"]).arg(lab.edge_socket());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().context("start edge-ctl")
}

#[test]
fn a_drain_that_is_waited_for_returns_when_its_last_flow_has_ended_and_not_before() -> Result<()> {
    needs_namespaces!("a_drain_that_is_waited_for_returns_when_its_last_flow_has_ended_and_not_before");
    let lab = Lab::up(Speaker::Bird, 3)?;
    let mut daemon = lab.start_ready_edge("1s")?;
    let backend: SocketAddr = (ingress(2).address, TCP_ECHO).into();
    let (mut mine, mut others): (Vec<_>, Vec<_>) =
        lab.open_many("client", vip(edge::vip::ECHO), 24)?.into_iter().partition(|flow| flow.pod == "ingress-2");
    ensure!(mine.len() > 1 && !others.is_empty(), "{} of 24 flows are with ingress-2", mine.len());
    for flow in mine.iter_mut().chain(&mut others) {
        flow.exchange()?;
    }
    let mut drain = drain_and_wait(&lab, backend)?;
    lab.wait_backend("echo", backend, "draining", SOON)?;
    // One flow less each time: it is told exactly, and waited for still.
    while !mine.is_empty() {
        wait_for("the remaining flows to be told", SOON, || {
            let row = lab.backend_row("echo", backend)?;
            ensure!(row["active"] == mine.len() as u64 && row["state"] == "draining", "{} are left: {row}", mine.len());
            Ok(true)
        })?;
        ensure!(drain.try_wait()?.is_none(), "it returned with {} flows left", mine.len());
        for flow in &mut mine {
            flow.exchange().context("a drain touches no flow")?;
        }
        mine.pop();
    }
    wait_for("the drain to return", SOON, || Ok(drain.try_wait()?.is_some()))?;
    let output = drain.wait_with_output().context("read what it said")?;
    ensure!(output.status.success(), "{output:?}");
    ensure!(lab.backend_row("echo", backend)?["state"] == "drained", "it returned before the state said so");
    ensure!(daemon.log().contains("backend is drained"), "the end of the drain was not told");
    for flow in &mut others {
        flow.exchange().context("flows of other backends")?;
    }
    daemon.stop()
}

/// A socket that goes on asking, as a UDP client does that knows nothing of backends.
fn ask(lab: &Lab, socket: &UdpSocket) -> Result<String> {
    lab.within("client", || {
        socket.send(b"who").context("send")?;
        let mut buffer = [0; 256];
        let length = socket.recv(&mut buffer).context("no answer")?;
        let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
        Ok(text.split_once(' ').map_or(text.clone(), |(pod, _)| pod.to_owned()))
    })
}

#[test]
fn udp_flows_of_a_backend_that_goes_down_move_to_another_and_its_downtime_counts_but_for_orders() -> Result<()> {
    needs_namespaces!("udp_flows_of_a_backend_that_goes_down_move_to_another_and_its_downtime_counts_but_for_orders");
    let lab = Lab::up(Speaker::Bird, 3)?;
    let pods = (1..=3).map(|pod| format!("\"{}:{UDP_ECHO}\"", ingress(pod).address)).collect::<Vec<_>>().join(", ");
    let service = format!(
        "\n[service.moves]\nlisten = [\"{EDGE}:{RESELECTS}/udp\"]\nbackends = {{ static = [{pods}] }}\non_down = \"reselect\"\n"
    );
    let mut daemon = lab.start_edge(&(edge::without_graceful_restart(&lab.edge_configuration("1s")) + &service))?;
    daemon.wait_ready(&lab, NODES.len() as u64, Duration::from_secs(30))?;
    let sockets: Vec<UdpSocket> = lab.within("client", || {
        let open = |_| {
            let socket = UdpSocket::bind("0.0.0.0:0").context("make a UDP socket")?;
            socket.connect(vip(RESELECTS))?;
            socket.set_read_timeout(Some(Duration::from_secs(2)))?;
            Ok(socket)
        };
        (0..24).map(open).collect()
    })?;
    // The second datagram after an answer makes the flow an established one.
    let before: Vec<String> = sockets.iter().map(|socket| ask(&lab, socket)).collect::<Result<_>>()?;
    for (socket, pod) in sockets.iter().zip(&before) {
        ensure!(ask(&lab, socket)? == *pod, "a flow moved while nothing happened");
    }
    ensure!(before.iter().any(|pod| pod == "ingress-2"), "nobody is with ingress-2");

    let backend: SocketAddr = (ingress(2).address, UDP_ECHO).into();
    // Until the first route to it was learnt it was down, too.
    let downtime = || Ok::<_, anyhow::Error>(lab.backend_row("moves", backend)?["downtime"].as_u64());
    let at_first = downtime()?;
    lab.edge_ctl(&["backend", "down", "moves", &backend.to_string()])?;
    let with_second = before.iter().filter(|pod| *pod == "ingress-2").count();
    wait_for("the flows of the backend that is down to end", SOON, || {
        Ok(daemon.log().contains(&format!("flows={with_second}")))
    })?;
    for (socket, pod) in sockets.iter().zip(&before) {
        let now = ask(&lab, socket)?;
        ensure!(now != "ingress-2", "a flow stayed with the backend that is down");
        ensure!(pod == "ingress-2" || now == *pod, "a flow of {pod} moved to {now}");
    }
    ensure!(at_first.is_some() && downtime()? == at_first, "an order is no downtime");
    lab.edge_ctl(&["backend", "up", "moves", &backend.to_string()])?;

    // A lost route is downtime, until it is back.
    lab.kill_bgp("knode1")?;
    lab.wait_backend("moves", backend, "no-route", SOON)?;
    wait_for("the downtime to count", SOON, || {
        let row = lab.backend_row("moves", backend)?;
        ensure!(row["downtime"].as_u64() >= at_first.map(|seconds| seconds + 2), "{row}");
        Ok(true)
    })?;
    lab.start_bgp("knode1")?;
    lab.wait_backend("moves", backend, "up", SOON)?;
    let counted = downtime()?;
    let metrics =
        lab.within("edge", || edge_tests::lab::pods::http_get_path(([127, 0, 0, 1], 9180).into(), "/metrics", SOON))?;
    let line = metrics.lines().find(|line| {
        line.starts_with("edge_backend_downtime_seconds_total{service=\"moves\"") && line.contains(&backend.to_string())
    });
    let exported = line.and_then(|line| line.rsplit(' ').next()).and_then(|number| number.parse::<u64>().ok());
    ensure!(exported.is_some() && exported == counted, "the view says {counted:?}, the metric {line:?}");
    daemon.stop()
}
