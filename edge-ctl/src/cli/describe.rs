//! Views that are no table: `status`, `describe`, one peer, and routes as vtysh prints them. Pure.

use std::fmt::Write;

use serde_json::Value;

use super::{
    table::{Column, age, clock, plain, render},
    views,
};
use crate::model::SnatRow;

fn text(row: &Value, key: &str) -> String {
    plain(row.get(key).unwrap_or(&Value::Null))
}

fn seconds(row: &Value, key: &str, show: fn(u64) -> String) -> String {
    row.get(key).and_then(Value::as_u64).map_or_else(|| "-".to_owned(), show)
}

fn list(row: &Value, key: &str) -> Vec<String> {
    row.get(key).and_then(Value::as_array).map(|values| values.iter().map(plain).collect()).unwrap_or_default()
}

fn counts(row: &Value, key: &str) -> Vec<(String, String)> {
    let Some(counts) = row.get(key).and_then(Value::as_object) else { return Vec::new() };
    counts.iter().map(|(name, count)| (name.clone(), plain(count))).collect()
}

/// `NAME:  VALUE` lines, values aligned.
fn fields(out: &mut String, indent: &str, fields: &[(&str, String)]) {
    let width = fields.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0) + 1;
    for (name, value) in fields {
        let name = format!("{name}:");
        let _ = writeln!(out, "{indent}{name:<width$}  {value}");
    }
}

/// The daemon in one screen.
pub(super) fn status(row: &Value) -> String {
    let mut out = String::new();
    let problems = list(row, "problems");
    let of = |part, whole| format!("{} of {}", text(row, part), text(row, whole));
    fields(
        &mut out,
        "",
        &[
            ("State", text(row, "state")),
            ("Version", text(row, "version")),
            ("Pid", format!("{}, up {}", text(row, "pid"), seconds(row, "uptime", age))),
            ("Config", text(row, "config")),
            ("Frontends", text(row, "services")),
            ("Backends", format!("{} eligible", of("backends_eligible", "backends"))),
            (
                "BGP peers",
                format!("{} established, {} prefixes", of("peers_established", "peers"), text(row, "prefixes")),
            ),
            ("Next hops", format!("{} objects, {} groups", text(row, "next_hops"), text(row, "next_hop_groups"))),
            ("Flows", format!("{} established", text(row, "flows"))),
            ("Attached", format!("{} interfaces", text(row, "attached"))),
            ("Map writes", text(row, "map_writes")),
            ("Access log", format!("{} lines written, {} lost", text(row, "access_written"), text(row, "access_lost"))),
            ("Events", format!("{} lost", text(row, "events_lost"))),
            ("Unknown flows", unknown_flows(row)),
        ],
    );
    if !problems.is_empty() {
        out.push_str("Problems:\n");
        for problem in problems {
            let _ = writeln!(out, "  {problem}");
        }
    }
    out
}

/// What becomes of packets in the middle of a connection that nobody knows here.
fn unknown_flows(row: &Value) -> String {
    match (row["quiet"].as_u64().unwrap_or(0), row["edges_lost"].as_u64().unwrap_or(0)) {
        (0, _) => "answered with a RST".to_owned(),
        (left, 0) => format!("silent for {left} s more, since the program was attached"),
        (left, _) => format!("silent for {left} s more, since another edge was lost or the program attached"),
    }
}

/// Everything about one service: `ServiceDetail` as JSON.
pub(super) fn service(detail: &Value) -> String {
    let rows = |key: &str| detail.get(key).and_then(Value::as_array).cloned().unwrap_or_default();
    let mut out = String::new();
    fields(&mut out, "", &[("Name", text(detail, "name"))]);
    for frontend in rows("frontends") {
        let _ = writeln!(out, "Frontend {}/{}", text(&frontend, "vip"), text(&frontend, "proto"));
        let both = |inwards, outwards| format!("{} in, {} out", text(&frontend, inwards), text(&frontend, outwards));
        fields(
            &mut out,
            "  ",
            &[
                ("Mode", text(&frontend, "mode")),
                ("Balance", text(&frontend, "balance")),
                ("Affinity", views::affinity(&frontend)),
                ("Table", table(&frontend)),
                ("Backends", format!("{} eligible", text(&frontend, "backends"))),
                ("Announced", text(&frontend, "announced")),
                (
                    "Connections",
                    format!(
                        "{} active, {} in all, {} attempts, {}/s",
                        text(&frontend, "active"),
                        text(&frontend, "connections"),
                        text(&frontend, "attempts"),
                        rate(&frontend, "conn/s")
                    ),
                ),
                ("Discarded", format!("{} packets", text(&frontend, "discarded"))),
                ("Packets", both("packets_in", "packets_out")),
                ("Bytes", both("bytes_in", "bytes_out")),
                ("Bytes/s", format!("{} in, {} out", rate(&frontend, "rx/s"), rate(&frontend, "tx/s"))),
                ("Age", seconds(&frontend, "age", age)),
            ],
        );
        let drops = counts(&frontend, "drops");
        if !drops.is_empty() {
            out.push_str("  Drops:\n");
            for (reason, count) in drops {
                let _ = writeln!(out, "    {reason:<24}{count:>12}");
            }
        }
    }
    out.push_str("Backends\n");
    let backends = rows("backends");
    if backends.is_empty() {
        out.push_str("  none\n");
    }
    let columns: Vec<&Column> =
        views::BACKENDS.columns.iter().filter(|column| !column.wide && column.key != "service").collect();
    for line in render(&columns, &backends, true, None).lines().filter(|_| !backends.is_empty()) {
        let _ = writeln!(out, "  {line}");
    }
    out
}

/// Slots of the tables by which backends are chosen.
fn table(frontend: &Value) -> String {
    let slots = |key| frontend.get(key).and_then(Value::as_u64).unwrap_or(0);
    match (slots("slots"), slots("backup_slots")) {
        (0, _) => "-".to_owned(),
        (slots, 0) => format!("{slots} slots"),
        (slots, backup) => format!("{slots} slots, {backup} of the backup tier"),
    }
}

fn rate(row: &Value, key: &str) -> String {
    row.get(key).and_then(Value::as_f64).map_or_else(|| "-".to_owned(), |rate| format!("{rate:.1}"))
}

/// One backend of one frontend, and each condition for being given flows.
pub(super) fn backend(row: &Value) -> String {
    let mut out = String::new();
    let _ = writeln!(
        out,
        "Backend {} of {} ({}/{})",
        text(row, "backend"),
        text(row, "service"),
        text(row, "vip"),
        text(row, "proto")
    );
    fields(
        &mut out,
        "  ",
        &[
            ("State", text(row, "state")),
            ("Node", text(row, "node")),
            ("Weight", format!("{}, {}% of it", text(row, "w"), text(row, "share"))),
            ("Tier", text(row, "tier")),
            ("Limit", views::limit(row)),
            ("Flows", format!("{} active, {} in all", text(row, "active"), text(row, "connections"))),
            (
                "Checks",
                format!(
                    "{} failed, {} times unavailable, {} times ejected",
                    text(row, "fails"),
                    text(row, "unavail"),
                    text(row, "ejections")
                ),
            ),
            ("Downtime", seconds(row, "downtime", age)),
            ("Last check", seconds(row, "last-check", age)),
            ("Connect", views::connect_time(row)),
            ("First byte", views::first_byte(row)),
            (
                "Failures",
                format!(
                    "{} unanswered, {} refused, {} reset early, last {}",
                    text(row, "unanswered"),
                    text(row, "refused"),
                    text(row, "reset_early"),
                    seconds(row, "last_failure", age)
                ),
            ),
        ],
    );
    snat(&mut out, row);
    let conditions = row.get("conditions").and_then(Value::as_array).cloned().unwrap_or_default();
    if !conditions.is_empty() {
        out.push_str("  Conditions for new flows:\n");
    }
    for condition in conditions {
        let holds = condition.get("holds").and_then(Value::as_bool).unwrap_or(false);
        let mark = if holds { "yes" } else { "NO" };
        let _ = writeln!(out, "    {mark:<4}{:<16}{}", text(&condition, "condition"), text(&condition, "reason"));
    }
    out
}

fn snat(out: &mut String, row: &Value) {
    let rows: Vec<SnatRow> = serde_json::from_value(row.get("snat").cloned().unwrap_or_default()).unwrap_or_default();
    if !rows.is_empty() {
        out.push_str("  SNAT ports in use:\n");
    }
    for row in rows {
        let _ =
            writeln!(out, "    {:<40}{} of {} ({}%, {})", row.address, row.used, row.allowed, row.percent(), row.level);
    }
}

/// Everything about one peer.
pub(super) fn peer(row: &Value) -> String {
    let mut out = String::new();
    let _ = writeln!(
        out,
        "BGP neighbor is {}, remote AS {}, {} link",
        text(row, "neighbor"),
        text(row, "as"),
        if text(row, "kind") == "ibgp" { "internal" } else { "external" }
    );
    fields(
        &mut out,
        "  ",
        &[
            ("Description", text(row, "desc")),
            ("Group", text(row, "group")),
            ("Router ID", text(row, "router_id")),
            ("State", format!("{}, for {}", text(row, "state"), views::up_down(row))),
            ("Hold time", format!("{} s, keepalive {} s", text(row, "hold"), text(row, "keepalive"))),
            ("Timers", timers(row)),
            ("Connection", format!("{} to {}", text(row, "local"), text(row, "remote"))),
            ("Host name", text(row, "hostname")),
            ("Shut down", text(row, "shutdown")),
            ("In force", list(row, "capabilities").join(", ")),
            ("Offered", list(row, "capabilities_sent").join(", ")),
            ("It offers", list(row, "capabilities_received").join(", ")),
            (
                "Prefixes",
                format!(
                    "{} received{}, {} accepted, {} announced",
                    text(row, "pfx_received"),
                    row.get("max_prefixes").and_then(Value::as_u64).map(|max| format!(" of {max}")).unwrap_or_default(),
                    text(row, "pfx_rcd"),
                    text(row, "pfx_snt")
                ),
            ),
            ("Sessions", format!("{} established so far", text(row, "established_count"))),
            ("Last reset", text(row, "last_reset")),
            (
                "Next connect",
                format!("{}, after {} failures", seconds(row, "next_connect", age), text(row, "failures")),
            ),
            ("Error sent", told(row, "error_sent")),
            ("Error received", told(row, "error_received")),
            ("Messages", format!("{} received, {} sent", text(row, "msg_rcvd"), text(row, "msg_sent"))),
        ],
    );
    for (kind, count) in counts(row, "messages") {
        let _ = writeln!(out, "    {kind:<28}{count:>10}");
    }
    bfd(&mut out, row);
    sessions(&mut out, row);
    out
}

/// The BFD session that watches the peer.
fn bfd(out: &mut String, row: &Value) {
    let Some(bfd) = row.get("bfd").filter(|bfd| !bfd.is_null()) else { return };
    if bfd.get("error").is_some_and(Value::is_string) {
        let _ = writeln!(out, "  BFD: none, {}", text(bfd, "error"));
        return;
    }
    let flag = |key: &str| bfd.get(key).and_then(Value::as_bool) == Some(true);
    let _ = writeln!(
        out,
        "  BFD ({}): {} for {}, last down: {}; {} times down",
        if flag("multihop") { "multihop" } else { "single hop" },
        text(bfd, "state"),
        seconds(bfd, "age", age),
        text(bfd, "diagnostic"),
        text(bfd, "downs")
    );
    let _ = writeln!(
        out,
        "    a packet each {} ms, {} sent; silence of {} ms is an end, {} received",
        text(bfd, "transmit_ms"),
        text(bfd, "sent"),
        text(bfd, "detection_ms"),
        text(bfd, "received")
    );
    let _ = writeln!(
        out,
        "    the peer says {} ({}); its BFD {}",
        text(bfd, "remote_state"),
        text(bfd, "remote_diagnostic"),
        if flag("independent") { "outlives its BGP (C)" } else { "shares fate with its BGP (no C)" }
    );
}

fn timers(row: &Value) -> String {
    format!("hold runs out in {}, keepalive in {}", seconds(row, "hold_left", age), seconds(row, "keepalive_left", age))
}

/// A NOTIFICATION and how long ago it was.
fn told(row: &Value, key: &str) -> String {
    match row.get(key).filter(|error| !error.is_null()) {
        Some(error) => format!("{}, {} ago", text(error, "text"), seconds(error, "ago", age)),
        None => "-".to_owned(),
    }
}

/// Routes that outlive their session, and when sessions came and went.
fn sessions(out: &mut String, row: &Value) {
    let rows = |key: &str| row.get(key).and_then(Value::as_array).cloned().unwrap_or_default();
    for stale in rows("stale") {
        let left = seconds(&stale, "left", age);
        let _ = writeln!(out, "  Stale {}: {}, {left} left", text(&stale, "family"), text(&stale, "stage"));
    }
    let flaps = rows("flaps");
    if !flaps.is_empty() {
        out.push_str("  Sessions, newest first:\n");
    }
    for flap in flaps {
        let up = flap.get("up").and_then(Value::as_bool) == Some(true);
        let what = if up { "up".to_owned() } else { format!("down: {}", text(&flap, "reason")) };
        let _ = writeln!(out, "    {:>8} ago  {what}", seconds(&flap, "ago", age));
    }
}

/// Routes as vtysh prints them: `B>* 10.1.0.0/24 [20] via 172.16.1.80, ens33, 00:01:02`.
pub(super) fn routes(rows: &[Value], headers: bool) -> String {
    let mut out = String::new();
    if headers {
        out.push_str("Codes: B - BGP, C - connected, S - static, K - kernel, > - selected, * - in the kernel\n\n");
    }
    for row in rows {
        let installed = row.get("installed").and_then(Value::as_bool).unwrap_or(false);
        let head = format!(
            "{}>{} {} [{}]",
            text(row, "code"),
            if installed { '*' } else { ' ' },
            text(row, "prefix"),
            text(row, "metric")
        );
        let age = row.get("age").and_then(Value::as_u64).map(|age| format!(", {}", clock(age))).unwrap_or_default();
        let hops = list(row, "next_hops");
        let blanks = " ".repeat(head.chars().count());
        for (number, hop) in hops.iter().enumerate() {
            let start = if number == 0 { &head } else { &blanks };
            let _ = writeln!(out, "{start} {}{age}", hop.replace(" dev ", ", "));
        }
        if hops.is_empty() {
            let _ = writeln!(out, "{head} no next hop{age}");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn routes_look_as_in_vtysh() {
        let rows = [
            json!({"code": "B", "prefix": "10.1.0.0/24", "metric": 20, "next_hops": ["via 172.16.1.80 dev ens33"],
                "installed": true, "age": 62}),
            json!({"code": "B", "prefix": "10.96.0.0/12", "metric": 20, "installed": false, "age": null,
                "next_hops": ["via 172.16.1.80 dev ens33", "via 172.16.1.81 dev ens33"]}),
        ];
        let expected = "\
B>* 10.1.0.0/24 [20] via 172.16.1.80, ens33, 00:01:02
B>  10.96.0.0/12 [20] via 172.16.1.80, ens33
                      via 172.16.1.81, ens33
";
        assert_eq!(routes(&rows, false), expected);
    }

    #[test]
    fn a_degraded_status_says_why() {
        let text = status(&json!({"state": "degraded", "problems": ["peer 172.16.1.80 is down"], "uptime": 130}));
        assert!(text.starts_with("State:"), "{text}");
        assert!(text.contains("Problems:\n  peer 172.16.1.80 is down\n"), "{text}");
        assert!(text.contains("up 2m10s"), "{text}");
    }

    #[test]
    fn a_backend_is_described_with_its_times_its_tier_and_its_ports() {
        let text = backend(&json!({"backend": "10.1.0.4:80", "w": 3, "share": 40, "tier": "backup", "limit": 0,
            "connect": 0.25, "first_byte": 1.5, "unanswered": 2, "refused": 1, "reset_early": 0, "last_failure": 60,
            "snat": [{"address": "10.1.0.1", "used": 800, "allowed": 1000, "level": "warning"}]}));
        for part in ["3, 40% of it", "backup", "0.25ms", "1.50ms", "2 unanswered, 1 refused, 0 reset early, last 60s"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(text.contains("800 of 1000 (80%, warning)"), "{text}");
    }

    #[test]
    fn a_service_is_described_with_its_affinity_and_its_tables() {
        let frontend = json!({"vip": "172.16.1.88:80", "proto": "tcp", "balance": "maglev", "affinity": 600,
            "slots": 1021, "backup_slots": 0, "attempts": 9, "conn/s": 1.5});
        let text = service(&json!({"name": "web", "frontends": [frontend], "backends": []}));
        for part in ["10m", "1021 slots\n", "9 attempts, 1.5/s"] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[test]
    fn the_status_tells_what_records_were_lost() {
        let text = status(&json!({"state": "ok", "access_written": 12, "access_lost": 3, "events_lost": 4}));
        assert!(text.contains("12 lines written, 3 lost") && text.contains("4 lost\n"), "{text}");
    }

    #[test]
    fn the_status_tells_for_how_long_unknown_connections_are_told_nothing() {
        let text = |quiet: u64, lost: u64| status(&json!({"state": "ok", "quiet": quiet, "edges_lost": lost}));
        assert!(text(0, 2).contains("answered with a RST\n"));
        assert!(text(12, 0).contains("silent for 12 s more, since the program was attached\n"));
        assert!(text(12, 1).contains("silent for 12 s more, since another edge was lost"));
    }
}
