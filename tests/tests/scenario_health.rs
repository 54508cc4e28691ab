//! Active checks against real nginx pods: what fails is taken out within fall x interval, what serves again comes back
//! within rise x interval, nobody else is touched, and orders of an administrator hold.

use std::{
    cell::Cell,
    collections::BTreeSet,
    fs,
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use edge_tests::{
    lab::{
        Lab, Speaker,
        edge::{EdgeDaemon, vip},
        exec::{self, wait_for},
        pods::{SERVICE_NAME, TCP_ECHO, UDP_ECHO, http_get, http_get_path},
        topology::{EDGE, NODES, ingress},
    },
    needs_namespaces,
};
use serde_json::Value;

const INTERVAL: Duration = Duration::from_millis(200);
const TIMEOUT: Duration = Duration::from_millis(150);
const FALL: u32 = 3;
const RISE: u32 = 2;
/// What the machine may add to a change, reading it by the command line included.
const TOLERANCE: Duration = Duration::from_millis(2_000);
const SOON: Duration = Duration::from_secs(60);
/// Ports of the pods' test servers, one for each kind of check.
const WEB: u16 = 8090;
const WEBS: u16 = 8091;
const GRPC: u16 = 8092;
/// Where a pod's test nginx answers well and badly in turn.
const TURNS: [u16; 2] = [8093, 8094];
/// Between two checks of the service that sees pods flap, and what an answer may take: long, so that no answer is late.
const UNHURRIED: Duration = Duration::from_millis(400);

/// What the test nginx of a pod does at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Manner {
    Good,
    /// Status 503.
    Broken,
    /// Status 200 with another text.
    OtherText,
    /// Answers after longer than the timeout.
    Slow,
    /// Closes the connection without an answer.
    Closes,
    /// Resets it.
    Resets,
    /// Of `/turns`, every other request gets 503.
    EveryOther,
    /// Of `/turns`, three of four requests get 503, one after the other.
    ThreeOfFour,
    /// Speaks no TLS on the TLS port, and says NOT_SERVING.
    Plain,
}

struct Pods<'a> {
    lab: &'a Lab,
    /// Configurations written so far; each server tells its own number.
    generation: Cell<u32>,
}

impl Pods<'_> {
    fn folder(&self, pod: usize) -> PathBuf {
        self.lab.folder().join(format!("health-{pod}"))
    }

    /// Writes the configuration of a pod's test nginx.
    fn write(&self, pod: usize, manner: Manner) -> Result<()> {
        let folder = self.folder(pod);
        fs::create_dir_all(&folder)?;
        // A HealthCheckResponse with its framing, as gRPC servers send it: SERVING, NOT_SERVING.
        fs::write(folder.join("serving"), b"\0\0\0\0\x02\x08\x01")?;
        fs::write(folder.join("not-serving"), b"\0\0\0\0\x02\x08\x02")?;
        let location = match manner {
            Manner::Good | Manner::Plain | Manner::EveryOther | Manner::ThreeOfFour => "return 200 \"all is well\\n\";",
            Manner::Broken => "return 503;",
            Manner::OtherText => "return 200 \"maintenance\\n\";",
            // The address leads nowhere inside the pod's network, so nginx waits for it.
            Manner::Slow => "proxy_connect_timeout 30s; proxy_pass http://10.1.0.250:9;",
            Manner::Closes => "return 444;",
            Manner::Resets => "reset_timedout_connection on; return 444;",
        };
        // nginx takes servers in turn, smoothly by weight: good, bad, good, bad; or bad, bad, good, bad.
        let bad_weight = match manner {
            Manner::EveryOther => "weight=1",
            Manner::ThreeOfFour => "weight=3",
            _ => "backup",
        };
        let ssl = if manner == Manner::Plain { "" } else { "ssl" };
        let serving = if manner == Manner::Plain { "not-serving" } else { "serving" };
        self.generation.set(self.generation.get() + 1);
        let generation = self.generation.get();
        let (run, folder) = (self.lab.folder(), folder.display());
        let text = format!(
            r#"daemon off; master_process on; worker_processes 1; user root;
pid {folder}/nginx.pid;
events {{ worker_connections 1024; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  upstream turns {{
    server 127.0.0.1:{good} max_fails=0;
    server 127.0.0.1:{bad} max_fails=0 {bad_weight};
  }}
  server {{ listen 127.0.0.1:{good}; return 200; }}
  server {{ listen 127.0.0.1:{bad}; return 503; }}
  server {{
    listen {WEB};
    listen {WEBS} {ssl};
    ssl_certificate {run}/tls.crt; ssl_certificate_key {run}/tls.key;
    location = /generation {{ return 200 "{generation}\n"; }}
    location = /turns {{ proxy_pass http://turns; }}
    location / {{ {location} }}
  }}
  server {{
    listen {GRPC} http2;
    root {folder};
    default_type application/grpc;
    location = /grpc.health.v1.Health/Check {{ error_page 405 =200 /{serving}; return 405; }}
    location / {{ error_page 405 =200 $uri; add_trailer grpc-status 0; }}
  }}
}}
"#,
            run = run.display(),
            good = TURNS[0],
            bad = TURNS[1],
        );
        fs::write(self.folder(pod).join("nginx.conf"), text).context("write the test nginx's configuration")
    }

    fn start(&self, pod: usize) -> Result<()> {
        self.write(pod, Manner::Good)?;
        let folder = self.folder(pod);
        let mut nginx = Command::new(exec::program("nginx", "nginx")?);
        nginx.arg("-e").arg("stderr").arg("-p").arg(&folder).arg("-c").arg(folder.join("nginx.conf"));
        self.lab.serve(&ingress(pod).name, "health-nginx", &mut nginx)
    }

    fn signal(&self, pod: usize, signal: &str) -> Result<()> {
        let pid = fs::read_to_string(self.folder(pod).join("nginx.pid")).context("read the pid of the test nginx")?;
        exec::run(Command::new("kill").args([signal, pid.trim()])).map(|_| ())
    }

    fn behave(&self, pod: usize, manner: Manner) -> Result<()> {
        self.write(pod, manner)?;
        self.signal(pod, "-HUP")?;
        // nginx takes its time to reload: what is measured begins when a request of our own sees the new manner. Old
        // workers may still accept, so it has to be seen several times.
        let (server, wanted) = ((ingress(pod).address, WEB).into(), self.generation.get().to_string());
        self.lab.within("client", || {
            wait_for("nginx to behave otherwise", SOON, || {
                let seen = || http_get_path(server, "/generation", Duration::from_secs(1));
                Ok((0..5).all(|_| seen().is_ok_and(|seen| seen == wanted)))
            })
        })?;
        Ok(())
    }
}

fn service(name: &str, port: u16, target: u16, protocol: &str, health: &str) -> String {
    format!(
        "\n[service.{name}]\nlisten = [\"{EDGE}:{port}/{protocol}\"]\nbackends = {{ dns = \"{SERVICE_NAME}\", port = {target}, \
         resolver = \"kube-dns\" }}\nhealth = {{ {health}, interval = \"200ms\", timeout = \"150ms\", jitter = 0, \
         fall = {FALL}, rise = {RISE} }}\n"
    )
}

/// The same, checked without haste.
fn unhurried(name: &str, port: u16, health: &str) -> String {
    let pace = format!("{} ms", UNHURRIED.as_millis()).replace(' ', "");
    service(name, port, WEB, "tcp", health)
        .replace("interval = \"200ms\", timeout = \"150ms\"", &format!("interval = \"{pace}\", timeout = \"{pace}\""))
}

fn configuration(lab: &Lab) -> String {
    let ca = lab.folder().join("tls.crt");
    let services = [
        service("connect", 7001, WEB, "tcp", "tcp = {}"),
        service("http", 7002, WEB, "tcp", "http = { path = \"/healthz\", status = [\"200-299\"], body = \"well\" }"),
        service("https", 7003, WEBS, "tcp", "https = { path = \"/healthz\", server_name = \"ingress.demo.local\" }"),
        service("tls", 7004, WEBS, "tcp", "tls = {}"),
        service("grpc", 7005, GRPC, "tcp", "grpc = { service = \"web\" }"),
        service("ask", 7006, TCP_ECHO, "tcp", "tcp = { send = \"hello\\n\", expect = \"hello\" }"),
        service("ask-udp", 7007, UDP_ECHO, "udp", "udp = { send = \"hello\", expect = \"hello\" }"),
        service("stranger", 7008, WEBS, "tcp", &format!("tls = {{ ca = \"{}\" }}", ca.display())),
        service("dnat", 7009, WEB, "tcp", "tcp = {}") + "mode = \"dnat\"\n",
        service("panics", 7010, WEB, "tcp", "http = { body = \"well\" }, panic = 50"),
        unhurried("turns", 7011, "http = { path = \"/turns\" }"),
    ];
    lab.edge_configuration("1s") + &services.concat()
}

fn started(lab: &Lab) -> Result<(EdgeDaemon, Pods<'_>)> {
    let pods = Pods { lab, generation: Cell::new(0) };
    for pod in 1..=3 {
        pods.start(pod)?;
    }
    let daemon = lab.start_edge(&configuration(lab))?;
    // Checks go out while the kernel still verifies the program.
    wait_for("the program to be attached", SOON, || {
        let status = edge_tests::lab::edge::one(lab.edge_ctl(&["status"])?)?;
        ensure!(status["attached"].as_u64() > Some(0), "{status}");
        Ok(true)
    })?;
    wait_for("every backend to have been checked", SOON, || {
        let rows = lab.edge_ctl(&["health", "list"])?;
        let rows = rows.as_array().context("health list is no array")?;
        let others = rows.iter().filter(|row| row["service"] != "stranger");
        let good = others.filter(|row| row["checks"].as_u64() > Some(3) && row["state"] == "up").count();
        ensure!(good == 30 && rows.len() == 33, "{good} of {}: {rows:?}", rows.len());
        Ok(true)
    })?;
    Ok((daemon, pods))
}

/// STATE of a service's backend in a pod.
fn state(lab: &Lab, service: &str, pod: usize) -> Result<String> {
    let rows = lab.edge_ctl(&["backend", "list", service])?;
    let start = format!("{}:", ingress(pod).address);
    let mut rows = rows.as_array().context("backend list is no array")?.iter();
    let row = rows.find(|row| row["backend"].as_str().is_some_and(|backend| backend.starts_with(&start)));
    Ok(row.context("the pod is not in the list")?["state"].as_str().unwrap_or_default().to_owned())
}

fn wait_state(lab: &Lab, service: &str, pod: usize, wanted: &str) -> Result<Duration> {
    wait_for(&format!("{service} in pod {pod} to be {wanted}"), SOON, || {
        let state = state(lab, service, pod)?;
        ensure!(state == wanted, "it is {state}");
        Ok(true)
    })
}

/// Waits until all of these services see the pod so; one question for all of them.
fn wait_states(lab: &Lab, services: &[&str], pod: usize, wanted: &str) -> Result<()> {
    let start = format!("{}:", ingress(pod).address);
    let text = |row: &Value, key: &str| row[key].as_str().unwrap_or_default().to_owned();
    wait_for(&format!("{services:?} in pod {pod} to be {wanted}"), SOON, || {
        let rows = lab.edge_ctl(&["backend", "list"])?;
        let rows = rows.as_array().context("backend list is no array")?.iter();
        let mine = rows.filter(|row| {
            services.contains(&text(row, "service").as_str()) && text(row, "backend").starts_with(&start)
        });
        let states: Vec<String> = mine.map(|row| text(row, "state")).collect();
        ensure!(states.len() == services.len() && states.iter().all(|state| state == wanted), "{states:?}");
        Ok(true)
    })?;
    Ok(())
}

/// How long the command line itself takes, which every figure read by it contains.
fn control(lab: &Lab) -> Result<Duration> {
    let start = Instant::now();
    state(lab, "connect", 1)?;
    Ok(start.elapsed())
}

#[test]
fn a_pod_that_fails_its_check_is_out_within_fall_intervals_and_back_within_rise_and_no_other_is_touched() -> Result<()>
{
    needs_namespaces!(
        "a_pod_that_fails_its_check_is_out_within_fall_intervals_and_back_within_rise_and_no_other_is_touched"
    );
    let lab = Lab::up(Speaker::Bird, 3)?;
    let (mut daemon, pods) = started(&lab)?;
    let failing: [(Manner, &[&str], &str); 6] = [
        (Manner::Broken, &["http", "https"], "status 503"),
        (Manner::OtherText, &["http"], "the text is not in"),
        (Manner::Slow, &["http", "https"], "no good answer within 150 ms"),
        (Manner::Closes, &["http", "https"], ""),
        (Manner::Resets, &["http"], "reset by peer"),
        (Manner::Plain, &["https", "tls", "grpc"], ""),
    ];
    for (manner, services, reason) in failing {
        let slack = control(&lab)? * 2 + TOLERANCE;
        pods.behave(2, manner)?;
        let start = Instant::now();
        wait_states(&lab, services, 2, "unhealthy").with_context(|| format!("{manner:?}"))?;
        let (took, most) = (start.elapsed(), INTERVAL * FALL + TIMEOUT + slack);
        println!("{manner:?}: out after {took:?}, allowed {most:?}");
        ensure!(took <= most, "{manner:?}: {services:?} out after {took:?}, allowed {most:?}");
        let history = lab.edge_ctl(&["health", "history"])?;
        ensure!(history.to_string().contains(reason), "{manner:?}: no `{reason}` in {history}");
        for service in ["connect", "dnat", "ask", "ask-udp"] {
            ensure!(state(&lab, service, 2)? == "up", "{manner:?} took {service} out");
        }
        for pod in [1, 3] {
            ensure!(services.iter().all(|service| state(&lab, service, pod).is_ok_and(|state| state == "up")));
        }
        pods.behave(2, Manner::Good)?;
        let start = Instant::now();
        wait_states(&lab, services, 2, "up").with_context(|| format!("{manner:?}"))?;
        let (took, most) = (start.elapsed(), INTERVAL * RISE + TIMEOUT + slack);
        println!("{manner:?}: back after {took:?}, allowed {most:?}");
        ensure!(took <= most, "{manner:?}: back after {took:?}, allowed {most:?}");
    }
    flapping(&lab, &pods)?;
    // The pods' certificate signs itself, so it is its own authority; but it does not name the pod's address.
    ensure!(state(&lab, "stranger", 1)? == "unhealthy", "a certificate for another name was accepted");
    daemon.stop()
}

/// A row of `health list` for the service that sees the second pod flap: checks, failed ones, times out of use, state.
fn turns(lab: &Lab) -> Result<(u64, u64, u64, String)> {
    let rows = lab.edge_ctl(&["health", "list", "turns"])?;
    let backend = format!("{}:{WEB}", ingress(2).address);
    let row = rows.as_array().and_then(|rows| rows.iter().find(|row| row["backend"] == backend).cloned());
    let row = row.with_context(|| format!("{backend} is not in {rows}"))?;
    let number = |key: &str| row[key].as_u64().with_context(|| format!("no number `{key}` in {row}"));
    Ok((number("checks")?, number("fails")?, number("unavail")?, row["state"].as_str().unwrap_or_default().to_owned()))
}

/// Waits for as many more checks; what they have changed.
fn after_checks(lab: &Lab, more: u64) -> Result<(u64, u64, String)> {
    let before = turns(lab)?;
    let mut now = before.clone();
    wait_for(&format!("{more} checks"), SOON, || {
        now = turns(lab)?;
        Ok(now.0 >= before.0 + more)
    })?;
    Ok((now.1 - before.1, now.2 - before.2, now.3))
}

/// A pod that fails every other check never fails three in a row, and stays; one that fails three of four goes once, and
/// comes back only when it really does.
fn flapping(lab: &Lab, pods: &Pods<'_>) -> Result<()> {
    pods.behave(2, Manner::EveryOther)?;
    let (fails, unavailable, state) = after_checks(lab, 8)?;
    println!("every other check fails: {fails} failed, {unavailable} times out of use");
    ensure!(fails >= 3 && unavailable == 0 && state == "up", "{fails} fails, {unavailable} times out of use, {state}");
    pods.behave(2, Manner::ThreeOfFour)?;
    wait_state(lab, "turns", 2, "unhealthy")?;
    let (fails, unavailable, state) = after_checks(lab, 8)?;
    println!("three of four checks fail: {fails} failed, out of use once, {unavailable} times since");
    ensure!(fails >= 5 && unavailable == 0 && state == "unhealthy", "{fails} fails, {unavailable} times more, {state}");
    pods.behave(2, Manner::Good)?;
    let slack = control(lab)? * 2 + TOLERANCE;
    let took = wait_state(lab, "turns", 2, "up")?;
    ensure!(took <= UNHURRIED * (RISE + 1) + slack, "back after {took:?}");
    Ok(())
}

#[test]
fn a_pod_that_refuses_or_hangs_gets_no_connection_and_a_panic_ignores_that() -> Result<()> {
    needs_namespaces!("a_pod_that_refuses_or_hangs_gets_no_connection_and_a_panic_ignores_that");
    let lab = Lab::up(Speaker::Bird, 3)?;
    let (mut daemon, pods) = started(&lab)?;
    // A stopped process whose kernel still completes handshakes: connect passes, everything else does not.
    let hang = |signal: &str| -> Result<()> {
        let names = BTreeSet::from([lab.namespace(&ingress(2).name)]);
        let all = edge_tests::lab::netns::processes(names.iter().map(String::as_str));
        let own = all
            .into_iter()
            .filter(|pid| fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.contains("nginx")));
        own.into_iter().try_for_each(|pid| exec::run(Command::new("kill").args([signal, &pid.to_string()])).map(|_| ()))
    };
    let allowed = |times: u32| Ok::<_, anyhow::Error>(INTERVAL * times + TIMEOUT + control(&lab)? * 2 + TOLERANCE);
    let in_time = |what: &str, took: Duration, most: Duration| {
        println!("{what} after {took:?}, allowed {most:?}");
        ensure!(took <= most, "{what} after {took:?}, allowed {most:?}");
        Ok(())
    };
    let (out, back) = (allowed(FALL)?, allowed(RISE)?);
    hang("-STOP")?;
    in_time("hangs: out", wait_state(&lab, "http", 2, "unhealthy")?, out)?;
    wait_state(&lab, "panics", 2, "unhealthy")?;
    ensure!(state(&lab, "connect", 2)? == "up", "a connect check passes where only the process hangs");
    hang("-CONT")?;
    in_time("hangs no more: back", wait_state(&lab, "http", 2, "up")?, back)?;

    pods.signal(2, "-TERM")?;
    in_time("refuses: out", wait_state(&lab, "connect", 2, "unhealthy")?, out)?;
    for service in ["connect", "dnat", "http", "grpc"] {
        wait_state(&lab, service, 2, "unhealthy")?;
    }
    // nginx of the first seed still serves there, but not this port: a connection that went there would be refused.
    for number in 0..100 {
        lab.within("client", || http_get((EDGE, 7001).into(), Duration::from_secs(2)).map(|_| ()))
            .with_context(|| format!("connection {number}"))?;
    }
    ensure!(state(&lab, "panics", 2)? == "unhealthy", "2 of 3 are no panic");
    pods.signal(3, "-TERM")?;
    wait_state(&lab, "connect", 3, "unhealthy")?;
    wait_for("the panic", SOON, || Ok((1..=3).all(|pod| state(&lab, "panics", pod).is_ok_and(|it| it == "up"))))?;
    let status = edge_tests::lab::edge::one(lab.edge_ctl(&["status"])?)?;
    ensure!(status["problems"].to_string().contains("1 of 3 backends are healthy"), "{status}");
    ensure!(state(&lab, "connect", 2)? == "unhealthy", "without a threshold nobody panics");
    let text = lab.edge_ctl_text(&["backend", "describe", "connect", &format!("{}:{WEB}", ingress(2).address)])?;
    ensure!(text.contains("NO  health") && text.contains("checks say: unhealthy"), "{text}");
    daemon.stop()
}

#[test]
fn orders_of_an_administrator_hold_across_a_restart_and_a_drain_ends_with_its_last_flow() -> Result<()> {
    needs_namespaces!("orders_of_an_administrator_hold_across_a_restart_and_a_drain_ends_with_its_last_flow");
    let lab = Lab::up(Speaker::Bird, 3)?;
    let mut daemon = lab.start_ready_edge("1s")?;
    let backend = |pod: usize| format!("{}:{TCP_ECHO}", ingress(pod).address);
    let mut flows = lab.open_many("client", vip(vip::ECHO), 24)?;
    for flow in &mut flows {
        flow.exchange()?;
    }
    let on_second = flows.iter().filter(|flow| flow.pod == "ingress-2").count() as u64;
    ensure!(on_second > 0 && on_second < 24, "{on_second} of 24 flows are with ingress-2");
    lab.edge_ctl(&["backend", "drain", "echo", &backend(2)])?;
    ensure!(state(&lab, "echo", 2)? == "draining", "flows remain");
    let active = |lab: &Lab| -> Result<Value> {
        let rows = lab.edge_ctl(&["backend", "list", "echo"])?;
        let own = rows.as_array().and_then(|rows| rows.iter().find(|row| row["backend"] == backend(2)).cloned());
        Ok(own.context("no row")?["active"].clone())
    };
    wait_for("the remaining flows to be counted", SOON, || Ok(active(&lab)? == on_second))?;
    let more = lab.open_many("client", vip(vip::ECHO), 30)?;
    ensure!(more.iter().all(|flow| flow.pod != "ingress-2"), "a draining backend got a new flow");
    drop(more);
    for flow in &mut flows {
        flow.exchange().context("a drain touches no running flow")?;
    }

    lab.edge_ctl(&["backend", "weight", "echo", &backend(3), "7"])?;
    daemon.stop()?;
    daemon.start(&lab)?;
    wait_for("the restarted daemon to serve", SOON, || {
        let status = edge_tests::lab::edge::one(lab.edge_ctl(&["status"])?)?;
        ensure!(status["peers_established"] == NODES.len() as u64, "{status}");
        Ok(true)
    })?;
    wait_state(&lab, "echo", 2, "draining")?;
    wait_for("the weight of before", SOON, || {
        let rows = lab.edge_ctl(&["backend", "list", "echo"])?;
        Ok(rows.as_array().is_some_and(|rows| rows.iter().any(|row| row["backend"] == backend(3) && row["w"] == 7)))
    })?;

    for flow in &mut flows {
        flow.exchange().context("across the restart")?;
    }
    drop(flows);
    let drained = lab.edge_ctl(&["backend", "drain", "--wait", "echo", &backend(2)])?;
    ensure!(drained.to_string().contains("\"drained\""), "{drained}");
    ensure!(daemon.log().contains("backend is drained"), "the end of the drain was not told");
    lab.edge_ctl(&["backend", "undrain", "echo", &backend(2)])?;
    wait_state(&lab, "echo", 2, "up")?;
    lab.edge_ctl(&["backend", "down", "echo", &backend(1)])?;
    wait_state(&lab, "echo", 1, "down")?;
    let wrong = lab.edge_ctl(&["backend", "down", "echo", "10.1.9.9:1"]).unwrap_err().to_string();
    ensure!(wrong.contains("has no backend 10.1.9.9:1"), "{wrong}");
    daemon.stop()
}
