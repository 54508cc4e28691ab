//! Views: the maps say the same with the daemon dead, metrics are what the tables show, and `-w` follows a change.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    process::{Child, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use edge_tests::{
    lab::{
        Lab, Speaker,
        client::exchange_all,
        edge::vip,
        exec::{self, wait_for},
        pods::http_get_path,
        topology::EDGE,
    },
    needs_namespaces,
};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(5);

/// Views of which the pins know everything but these columns.
const VIEWS: [(&[&str], &[&str]); 6] = [
    (&["service", "list"], &["conn/s", "rx/s", "tx/s", "announced", "age"]),
    (&["backend", "list"], &["conn/s", "node", "source", "snat", "conditions"]),
    (&["flow", "list"], &["idle", "age"]),
    // The daemon has the flow tables counted by its sweep, a moment ago.
    (&["map", "list"], &["entries", "counted"]),
    (&["map", "dump", "SERVICES"], &[]),
    (&["xdp", "status"], &["state", "reason"]),
];

/// Rows without columns that only the daemon knows, in an order of their own: a hash has none.
fn known_to_the_kernel(rows: Value, unknown: &[&str]) -> Result<Vec<String>> {
    let Value::Array(rows) = rows else { anyhow::bail!("no array: {rows}") };
    let strip = |mut row: Value| {
        if let Value::Object(columns) = &mut row {
            columns.retain(|name, _| !unknown.contains(&name.as_str()));
        }
        row.to_string()
    };
    let mut rows: Vec<String> = rows.into_iter().map(strip).collect();
    rows.sort();
    Ok(rows)
}

/// `name{labels}` -> value, of every sample; a sample that appears twice is an error, as it is to a scraper.
fn scrape(lab: &Lab) -> Result<BTreeMap<String, f64>> {
    let text = lab.within("edge", || http_get_path(([127, 0, 0, 1], 9180).into(), "/metrics", SOON))?;
    ensure!(text.ends_with("# EOF"), "the exposition is cut short: {text}");
    let mut samples = BTreeMap::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (name, value) = line.rsplit_once(' ').with_context(|| format!("no value: {line}"))?;
        let before = samples.insert(name.to_owned(), value.parse().with_context(|| line.to_owned())?);
        ensure!(before.is_none(), "{name} appears twice");
    }
    Ok(samples)
}

fn metrics_are_the_tables(lab: &Lab) -> Result<()> {
    let samples = scrape(lab)?;
    let services = lab.edge_ctl(&["service", "list"])?;
    let backends = lab.edge_ctl(&["backend", "list"])?;
    let text = |row: &Value, key: &str| row[key].as_str().unwrap_or_default().to_owned();
    let mut compared = 0;
    let mut same = |name: String, row: &Value, key: &str| {
        let seen = samples.get(&name).with_context(|| format!("{name} is not among the metrics: {samples:?}"))?;
        ensure!(row[key].as_f64() == Some(*seen), "{name} is {seen}, the table's {key}: {row}");
        compared += 1;
        Ok(())
    };
    for (kind, rows) in [("service", &services), ("backend", &backends)] {
        for row in rows.as_array().context("no array")? {
            let mut labels = format!(
                "service=\"{}\",vip=\"{}\",proto=\"{}\"",
                text(row, "service"),
                text(row, "vip"),
                text(row, "proto")
            );
            if kind == "service" {
                labels = labels.replacen("service=\"\"", &format!("service=\"{}\"", text(row, "name")), 1);
            } else {
                labels += &format!(",backend=\"{}\",node=\"{}\"", text(row, "backend"), text(row, "node"));
            }
            same(format!("edge_{kind}_connections_total{{{labels}}}"), row, "connections")?;
            same(format!("edge_{kind}_active{{{labels}}}"), row, "active")?;
            for way in ["in", "out"] {
                let labels = format!("{labels},direction=\"{way}\"");
                same(format!("edge_{kind}_bytes_total{{{labels}}}"), row, &format!("bytes_{way}"))?;
                same(format!("edge_{kind}_packets_total{{{labels}}}"), row, &format!("packets_{way}"))?;
            }
        }
    }
    ensure!(compared > 50, "only {compared} samples were compared");
    let failed: Vec<_> =
        samples.iter().filter(|(name, value)| name.starts_with("edge_scrape_errors") && **value != 0.0).collect();
    ensure!(failed.is_empty(), "{failed:?}");
    Ok(())
}

/// A command that runs on, ended with the value.
struct Watch(Child);

impl Drop for Watch {
    fn drop(&mut self) {
        // One that has ended by itself is in the test's error.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn watching_shows_a_change(lab: &mut Lab) -> Result<()> {
    let file = lab.folder().join("watched.txt");
    let mut command = lab.command("edge", exec::product("edge-ctl", "EDGE_CTL")?)?;
    command.args(["service", "list", "-w", "--socket"]).arg(lab.edge_socket());
    command.stdin(Stdio::null()).stdout(File::create(&file)?).stderr(File::create(lab.folder().join("watched.err"))?);
    let watch = Watch(command.spawn().context("start edge-ctl -w")?);
    let seen = |wanted: &str| {
        wait_for(&format!("`service list -w` to show {wanted}"), SOON, || {
            let text = fs::read_to_string(&file)?;
            ensure!(text.contains(wanted), "{text}");
            Ok(true)
        })
    };
    seen("2/2")?;
    lab.scale(3)?;
    seen("3/3")?;
    drop(watch);
    Ok(())
}

#[test]
fn the_pins_say_what_the_daemon_said_and_metrics_are_the_tables() -> Result<()> {
    needs_namespaces!("the_pins_say_what_the_daemon_said_and_metrics_are_the_tables");
    let mut lab = Lab::up(Speaker::Bird, 2)?;
    let mut daemon = lab.start_ready_edge("1s")?;
    watching_shows_a_change(&mut lab)?;
    let mut connections = lab.open_many("client", (EDGE, vip::ECHO).into(), 10)?;
    exchange_all(&mut connections)?;
    lab.http("client", (EDGE, vip::HTTP).into(), 100)?;
    lab.http("client2", (EDGE, vip::HTTP_DNAT).into(), 100)?;
    lab.udp("client", (EDGE, vip::UDP).into(), 50)?;

    // The last ACKs and FINs of the requests may still be under way: compared once they are not.
    wait_for("metrics and tables to agree", SOON, || metrics_are_the_tables(&lab).map(|()| true))?;
    let ask = |more: &[&str]| -> Result<Vec<Vec<String>>> {
        let answer = |(view, unknown): (&[&str], &[&str])| {
            known_to_the_kernel(lab.edge_ctl(&[view, more].concat())?, unknown).with_context(|| view.join(" "))
        };
        VIEWS.into_iter().map(answer).collect()
    };
    let drops = lab.edge_ctl(&["xdp", "stats"])?;
    let drops = drops.as_array().into_iter().flatten().filter(|row| row["action"] == "drop");
    ensure!(drops.clone().count() == 0, "dropped on an idle edge: {:?}", drops.collect::<Vec<_>>());
    let alive = ask(&[])?;
    ensure!(alive.iter().all(|rows| !rows.is_empty()), "a view is empty: {alive:?}");
    ensure!(alive[2].len() >= 10, "flow list has {:?}", alive[2]);
    let maps = lab.edge_ctl(&["map", "list"])?;
    for map in maps.as_array().into_iter().flatten().filter_map(|row| row["name"].as_str()) {
        lab.edge_ctl(&["map", "dump", map]).with_context(|| format!("{map} is in `map list`"))?;
    }

    daemon.kill()?;
    let pins = lab.pins();
    let dead = ask(&["--kernel", "--pin-path", pins.to_str().context("path")?])?;
    for ((view, _), (alive, dead)) in VIEWS.iter().zip(alive.iter().zip(&dead)) {
        ensure!(
            alive == dead,
            "{}:\nthe daemon said\n{}\nthe pins say\n{}",
            view.join(" "),
            alive.join("\n"),
            dead.join("\n")
        );
    }
    let said = lab.edge_ctl_raw(&["status", "--kernel", "--pin-path", pins.to_str().context("path")?])?;
    let text = String::from_utf8_lossy(&said.stderr).into_owned();
    ensure!(said.status.code() == Some(1) && text.contains("running daemon"), "{said:?}");
    exchange_all(&mut connections).context("with the daemon dead")?;
    Ok(())
}
