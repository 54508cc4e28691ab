//! A rolling replacement of all pods, step by step as Kubernetes makes it, under constant load in both modes: nobody
//! notices. `tests/fixtures/dns/README.md` has the order of the steps as a real API server made them.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use edge_tests::{
    lab::{
        Lab, Speaker,
        edge::{self, vip},
        exec::{run, wait_for},
        pods::{SERVICE_NAME, TCP_ECHO},
        topology::{EDGE, NODES, ingress},
    },
    load::{Arrival, Load, Outcome},
    needs_namespaces,
    skip::count,
};

/// Pods of the deployment.
const PODS: usize = 10;
/// A pod that is in no service: its connections are routed only.
const BESIDE: usize = 2 * PODS + 1;
/// How long the resolver believes an answer.
const VALID: Duration = Duration::from_secs(1);
const DNAT: u16 = 9100;
/// Lines of a connection, one every 50 ms.
const LINES: u32 = 10;
const SOON: Duration = Duration::from_secs(30);

/// One pod replaced by another: when DNS said so.
struct Step {
    old: String,
    new: String,
    added: Instant,
    removed: Instant,
}

/// A new pod becomes ready and enters DNS; the old one leaves DNS at once, serves what it has and whoever still comes,
/// and ends when nobody is left, which is what the grace period is for.
fn replace(lab: &mut Lab, loads: [&Load; 2], published: &mut BTreeSet<usize>, old: usize, new: usize) -> Result<Step> {
    lab.start_pod(new)?;
    published.insert(new);
    let added = Instant::now();
    lab.publish_pods(published.iter().copied())?;
    wait_for("the new pod to be in use", SOON, || Ok(states(lab, new)?.iter().all(|state| state == "up")))?;
    wait_for("connections of both modes to come to the new pod", SOON, || {
        Ok(loads.iter().all(|load| load.has_reached(&ingress(new).name)))
    })?;
    published.remove(&old);
    let removed = Instant::now();
    lab.publish_pods(published.iter().copied())?;
    wait_for("the old pod to be out of use and its last connection to end", SOON, || {
        ensure!(states(lab, old)?.iter().all(|state| state != "up"), "it gets new connections");
        let mut ss = lab.command(&ingress(old).name, "ss")?;
        let left = run(ss.args(["-Htn", "state", "established", "sport", "=", &format!(":{TCP_ECHO}")]))?;
        ensure!(left.is_empty(), "{left}");
        Ok(true)
    })?;
    lab.end_pod(old)?;
    Ok(Step { old: ingress(old).name, new: ingress(new).name, added, removed })
}

/// STATE of a pod's rows in both services; one that is missing is drained and gone.
fn states(lab: &Lab, pod: usize) -> Result<Vec<String>> {
    let backend = format!("{}:{TCP_ECHO}", ingress(pod).address);
    let mut states = Vec::new();
    for service in ["echo", "echo-dnat"] {
        let rows = lab.edge_ctl(&["backend", "list", service])?;
        let row = rows.as_array().and_then(|rows| rows.iter().find(|row| row["backend"] == backend).cloned());
        states.push(row.map_or_else(|| "gone".to_owned(), |row| row["state"].as_str().unwrap_or("-").to_owned()));
    }
    Ok(states)
}

/// How long after DNS had changed the last connection was sent to the pod that left, and the first to the one that came.
fn convergence(step: &Step, arrivals: &[Arrival]) -> (Duration, Option<Duration>) {
    let of = |pod: &str, since: Instant| -> Vec<Duration> {
        let mine = arrivals.iter().filter(|arrival| arrival.pod == pod && arrival.at >= since);
        mine.map(|arrival| arrival.at - since).collect()
    };
    let last = of(&step.old, step.removed).into_iter().max().unwrap_or_default();
    (last, of(&step.new, step.added).into_iter().min())
}

fn judge(mode: &str, outcome: &Outcome, control: &Outcome, steps: &[Step]) -> Result<()> {
    let Outcome { arrivals, failed, broken, lines, longest } = outcome;
    println!(
        "{mode}: {} connections, {lines} lines, {} failed, {} broken, longest exchange {longest:?} (routed {:?})",
        arrivals.len(),
        failed.len(),
        broken.len(),
        control.longest
    );
    ensure!(failed.is_empty(), "{mode}: {} failed connects: {failed:?}", failed.len());
    ensure!(broken.is_empty(), "{mode}: {} broken connections: {broken:?}", broken.len());
    // An answer is believed for `valid`; asking and writing the maps takes what the machine takes.
    let allowed = VALID * 2 + control.longest * 2;
    for (number, step) in steps.iter().enumerate() {
        let (last, first) = convergence(step, arrivals);
        println!("{mode}: step {}: last to {} {last:?}, first to {} {first:?}", number + 1, step.old, step.new);
        ensure!(last <= allowed, "{mode}: {} got a connection {last:?} after it left, allowed {allowed:?}", step.old);
        ensure!(first.is_some(), "{mode}: {} never got a connection", step.new);
    }
    Ok(())
}

#[test]
fn all_ten_pods_are_replaced_one_by_one_and_no_connection_fails_or_is_reset() -> Result<()> {
    needs_namespaces!("all_ten_pods_are_replaced_one_by_one_and_no_connection_fails_or_is_reset");
    let clients = count("clients of each mode", 10, 50);
    let mut lab = Lab::up(Speaker::Bird, PODS)?;
    lab.start_pod(BESIDE)?;
    let dnat = format!(
        "\n[service.echo-dnat]\nlisten = [\"{EDGE}:{DNAT}/tcp\"]\nbackends = {{ dns = \"{SERVICE_NAME}\", port = \
         {TCP_ECHO}, resolver = \"kube-dns\" }}\nmode = \"dnat\"\n"
    );
    let mut daemon = lab.start_edge(&(lab.edge_configuration("1s") + &dnat))?;
    daemon.wait_ready(&lab, NODES.len() as u64, SOON)?;
    let control = Load::start(&lab, "client", (ingress(BESIDE).address, TCP_ECHO).into(), 4, LINES);
    let full_nat = Load::start(&lab, "client", vip(edge::vip::ECHO), clients, LINES);
    // The pods answer the client itself, by way of the edge: so its network has to lie behind the edge.
    let dnat = Load::start(&lab, "client2", vip(DNAT), clients, LINES);
    let mut published: BTreeSet<usize> = (1..=PODS).collect();
    let mut steps = Vec::new();
    for pod in 1..=PODS {
        let step = replace(&mut lab, [&full_nat, &dnat], &mut published, pod, PODS + pod)
            .with_context(|| format!("step {pod}"))?;
        steps.push(step);
    }
    let (full_nat, dnat, control) = (full_nat.stop()?, dnat.stop()?, control.stop()?);
    ensure!(
        control.failed.is_empty() && control.broken.is_empty(),
        "routed: {:?} {:?}",
        control.failed,
        control.broken
    );
    judge("full-nat", &full_nat, &control, &steps)?;
    judge("dnat", &dnat, &control, &steps)?;
    daemon.stop()
}
