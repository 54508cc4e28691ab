//! Views that are no table: `status`, `describe`, one peer, and routes as vtysh prints them. Pure.

use std::fmt::Write;

use serde_json::Value;

use super::{
    table::{Column, age, clock, plain, render},
    views,
};

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
            ("Flows", format!("{} established", text(row, "flows"))),
            ("Attached", format!("{} interfaces", text(row, "attached"))),
            ("Map writes", text(row, "map_writes")),
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
                ("Backends", format!("{} eligible", text(&frontend, "backends"))),
                ("Announced", text(&frontend, "announced")),
                (
                    "Connections",
                    format!("{} active, {} in all", text(&frontend, "active"), text(&frontend, "connections")),
                ),
                ("Packets", both("packets_in", "packets_out")),
                ("Bytes", both("bytes_in", "bytes_out")),
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
    let connect = row.get("connect").and_then(Value::as_f64).map_or_else(|| "-".to_owned(), |ms| format!("{ms:.1}ms"));
    fields(
        &mut out,
        "  ",
        &[
            ("State", text(row, "state")),
            ("Node", text(row, "node")),
            ("Weight", text(row, "w")),
            ("Flows", format!("{} active, {} in all", text(row, "active"), text(row, "connections"))),
            ("Checks", format!("{} failed, {} times unavailable", text(row, "fails"), text(row, "unavail"))),
            ("Last check", seconds(row, "last-check", age)),
            ("Connect", connect),
        ],
    );
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
            ("Capabilities", list(row, "capabilities").join(", ")),
            (
                "Prefixes",
                format!(
                    "{} received, {} accepted, {} announced",
                    text(row, "pfx_received"),
                    text(row, "pfx_rcd"),
                    text(row, "pfx_snt")
                ),
            ),
            ("Sessions", format!("{} established so far", text(row, "established_count"))),
            ("Last reset", text(row, "last_reset")),
            ("Next connect", seconds(row, "next_connect", age)),
            ("Messages", format!("{} received, {} sent", text(row, "msg_rcvd"), text(row, "msg_sent"))),
        ],
    );
    for (kind, count) in counts(row, "messages") {
        let _ = writeln!(out, "    {kind:<28}{count:>10}");
    }
    out
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
}
