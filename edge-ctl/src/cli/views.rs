//! The columns of every view.

use serde_json::Value;

use super::table::{Column, Show, age, clock, column, plain, wide};
use crate::model::{SnatLevel, SnatRow};

/// A list that can be shown.
pub(super) struct View {
    /// For `-o name`: KIND/NAME.
    pub kind: &'static str,
    /// Keys whose values make the NAME.
    pub names: &'static [&'static str],
    pub columns: &'static [Column],
}

pub(super) static SERVICES: View = View {
    kind: "service",
    names: &["name"],
    columns: &[
        column("NAME", "name", Show::Text),
        column("VIP", "vip", Show::Text),
        column("PROTO", "proto", Show::Text),
        column("MODE", "mode", Show::Text),
        column("BALANCE", "balance", Show::Text),
        column("BACKENDS", "backends", Show::Text),
        column("CONN/S", "conn/s", Show::Rate),
        column("ACTIVE", "active", Show::Number),
        column("RX/S", "rx/s", Show::Bytes),
        column("TX/S", "tx/s", Show::Bytes),
        column("ANNOUNCED", "announced", Show::Text),
        column("AGE", "age", Show::Age),
        wide("CONNECTIONS", "connections", Show::Number),
        wide("RX", "bytes_in", Show::Bytes),
        wide("TX", "bytes_out", Show::Bytes),
        wide("ATTEMPTS", "attempts", Show::Number),
        wide("DISCARDED", "discarded", Show::Number),
        wide("AFFINITY", "affinity", Show::Row(affinity)),
        wide("SLOTS", "slots", Show::Number),
        wide("DROPS", "drops", Show::Counts),
    ],
};

pub(super) static ACL: View = View {
    kind: "acl",
    names: &["service", "prefix"],
    columns: &[
        column("SERVICE", "service", Show::Text),
        column("PREFIX", "prefix", Show::Text),
        column("ACTION", "action", Show::Text),
        column("SOURCE", "source", Show::Text),
        column("EXPIRES", "expires", Show::Age),
        column("HITS", "hits", Show::Number),
    ],
};

pub(super) static BACKENDS: View = View {
    kind: "backend",
    names: &["service", "backend"],
    columns: &[
        column("SERVICE", "service", Show::Text),
        column("BACKEND", "backend", Show::Text),
        column("NODE", "node", Show::Text),
        column("STATE", "state", Show::Text),
        column("W", "w", Show::Number),
        column("ACTIVE", "active", Show::Number),
        column("LIMIT", "limit", Show::RowRight(limit)),
        column("CONN/S", "conn/s", Show::Rate),
        column("FAILS", "fails", Show::Number),
        column("UNAVAIL", "unavail", Show::Number),
        wide("DOWNTIME", "downtime", Show::Age),
        wide("EJECTIONS", "ejections", Show::Number),
        column("LAST-CHECK", "last-check", Show::Age),
        column("CONNECT", "connect", Show::Row(connect_time)),
        column("SOURCE", "source", Show::Text),
        wide("FIRST-BYTE", "first_byte", Show::Row(first_byte)),
        wide("UNANSWERED", "unanswered", Show::Number),
        wide("REFUSED", "refused", Show::Number),
        wide("RESET-EARLY", "reset_early", Show::Number),
        wide("LAST-FAILURE", "last_failure", Show::Age),
        wide("TIER", "tier", Show::Text),
        wide("SHARE", "share", Show::RowRight(share)),
        wide("SNAT", "snat", Show::RowRight(snat)),
        wide("RX/S", "rx/s", Show::Bytes),
        wide("TX/S", "tx/s", Show::Bytes),
        wide("VIP", "vip", Show::Text),
        wide("PROTO", "proto", Show::Text),
        wide("CONNECTIONS", "connections", Show::Number),
        wide("RX", "bytes_in", Show::Bytes),
        wide("TX", "bytes_out", Show::Bytes),
    ],
};

pub(super) static HEALTH: View = View {
    kind: "health",
    names: &["service", "backend"],
    columns: &[
        column("SERVICE", "service", Show::Text),
        column("BACKEND", "backend", Show::Text),
        column("CHECK", "check", Show::Text),
        column("STATE", "state", Show::Text),
        column("SINCE", "since", Show::Age),
        column("CHECKS", "checks", Show::Number),
        column("FAILS", "fails", Show::Number),
        column("UNAVAIL", "unavail", Show::Number),
        wide("EJECTIONS", "ejections", Show::Number),
        column("LAST-CHECK", "last-check", Show::Age),
        column("CONNECT", "connect", Show::Row(connect_time)),
        wide("NEXT", "next", Show::Age),
        wide("SOURCE", "source", Show::Text),
        wide("INCONCLUSIVE", "inconclusive", Show::Number),
        column("ERROR", "error", Show::Text),
    ],
};

pub(super) static HEALTH_HISTORY: View = View {
    kind: "event",
    names: &["service", "backend", "age"],
    columns: &[
        column("AGE", "age", Show::Age),
        column("SERVICE", "service", Show::Text),
        column("BACKEND", "backend", Show::Text),
        column("FROM", "from", Show::Text),
        column("TO", "to", Show::Text),
        column("REASON", "reason", Show::Text),
    ],
};

pub(super) fn limit(row: &Value) -> String {
    match row.get("limit").and_then(Value::as_u64) {
        None | Some(0) => "-".to_owned(),
        Some(limit) => limit.to_string(),
    }
}

pub(super) fn affinity(row: &Value) -> String {
    row.get("affinity").and_then(Value::as_u64).filter(|seconds| *seconds != 0).map_or_else(|| "-".to_owned(), age)
}

fn share(row: &Value) -> String {
    row.get("share").and_then(Value::as_u64).map_or_else(|| "-".to_owned(), |percent| format!("{percent}%"))
}

/// The fill of the source address that has the fewest ports left, with its alarm.
fn snat(row: &Value) -> String {
    let rows = row.get("snat").cloned().unwrap_or_default();
    let rows: Vec<SnatRow> = serde_json::from_value(rows).unwrap_or_default();
    let Some(worst) = rows.iter().max_by_key(|row| (row.percent(), row.level)) else { return "-".to_owned() };
    match worst.level {
        SnatLevel::Ok => format!("{}%", worst.percent()),
        level => format!("{level}:{}%", worst.percent()),
    }
}

pub(super) fn connect_time(row: &Value) -> String {
    milliseconds(row, "connect")
}

pub(super) fn first_byte(row: &Value) -> String {
    milliseconds(row, "first_byte")
}

/// Two digits after the point: on one machine a pod answers within tens of microseconds.
fn milliseconds(row: &Value, key: &str) -> String {
    row.get(key).and_then(Value::as_f64).map_or_else(|| "-".to_owned(), |ms| format!("{ms:.2}ms"))
}

pub(super) static EVENTS: View = View {
    kind: "event",
    names: &["time", "source"],
    columns: &[
        column("TIME", "time", Show::Text),
        column("KIND", "kind", Show::Text),
        column("SERVICE", "service", Show::Text),
        column("SOURCE", "source", Show::Text),
        column("DESTINATION", "destination", Show::Text),
        column("REASON", "reason", Show::Text),
        column("BYTES", "bytes", Show::Bytes),
    ],
};

pub(super) static FLOWS: View = View {
    kind: "flow",
    names: &["proto", "client", "vip"],
    columns: &[
        column("SERVICE", "service", Show::Text),
        column("PROTO", "proto", Show::Text),
        column("CLIENT", "client", Show::Text),
        column("VIP", "vip", Show::Text),
        wide("SNAT", "snat", Show::Text),
        column("BACKEND", "backend", Show::Text),
        column("STATE", "state", Show::Text),
        wide("PACKETS-IN", "packets_in", Show::Number),
        wide("PACKETS-OUT", "packets_out", Show::Number),
        column("RX", "bytes_in", Show::Bytes),
        column("TX", "bytes_out", Show::Bytes),
        column("IDLE", "idle", Show::Age),
        column("AGE", "age", Show::Age),
    ],
};

pub(super) static AUDIT: View = View {
    kind: "write",
    names: &["write"],
    columns: &[column("WRITE", "write", Show::Text), column("DETAIL", "detail", Show::Text)],
};

pub(super) static FLOW_COUNTS: View = View {
    kind: "service",
    names: &["name", "vip", "proto"],
    columns: &[
        column("SERVICE", "name", Show::Text),
        column("VIP", "vip", Show::Text),
        column("PROTO", "proto", Show::Text),
        column("ESTABLISHED", "active", Show::Number),
    ],
};

pub(super) static DNS: View = View {
    kind: "dns",
    names: &["name", "type"],
    columns: &[
        column("NAME", "name", Show::Text),
        column("TYPE", "type", Show::Text),
        column("RESOLVER", "resolver", Show::Text),
        column("ADDRESSES", "addresses", Show::Text),
        column("STATE", "state", Show::Text),
        column("AGE", "age", Show::Age),
        column("NEXT", "next", Show::Age),
        column("REQUESTS", "requests", Show::Number),
        wide("CHANGES", "changes", Show::Number),
        wide("HOLDS", "holds", Show::Number),
        wide("REFUSALS", "refused_addresses", Show::Number),
        wide("RESPONSES", "responses", Show::Counts),
        column("HELD-FOR", "held_age", Show::Age),
        column("HELD", "held", Show::Text),
        wide("HELD-ADDRESSES", "held_addresses", Show::Text),
        column("REFUSED", "refused", Show::Text),
        column("ERROR", "error", Show::Text),
    ],
};

/// NGINX Plus's columns of the dashboard's Resolvers tab.
pub(super) static DNS_STATS: View = View {
    kind: "resolver",
    names: &["resolver"],
    columns: &[
        column("RESOLVER", "resolver", Show::Text),
        column("NAME", "name", Show::Number),
        column("SRV", "srv", Show::Number),
        column("ADDR", "addr", Show::Number),
        column("SUCCESS", "success", Show::Number),
        column("FORMAT-ERROR", "format_error", Show::Number),
        column("SERVER-FAILURE", "server_failure", Show::Number),
        column("NOT-FOUND", "host_not_found", Show::Number),
        column("UNIMPLEMENTED", "unimplemented", Show::Number),
        column("REFUSED", "refused", Show::Number),
        column("UNKNOWN", "unknown", Show::Number),
        column("TIMED-OUT", "timed_out", Show::Number),
    ],
};

pub(super) static DNS_SERVERS: View = View {
    kind: "dns-server",
    names: &["resolver", "server"],
    columns: &[
        column("RESOLVER", "resolver", Show::Text),
        column("SERVER", "server", Show::Text),
        column("STATE", "state", Show::Text),
        column("FAILURES", "failures", Show::Number),
        column("AGE", "age", Show::Age),
        column("MS", "took_ms", Show::Number),
        column("REQUESTS", "requests", Show::Number),
        wide("RESPONSES", "responses", Show::Counts),
        wide("SOURCE", "source", Show::Text),
        column("ERROR", "error", Show::Text),
    ],
};

pub(super) static DNS_RECORDS: View = View {
    kind: "record",
    names: &["name", "type"],
    columns: &[
        column("NAME", "name", Show::Text),
        column("TYPE", "type", Show::Text),
        column("TTL", "ttl", Show::Number),
        column("DATA", "data", Show::Text),
        column("RESOLVER", "resolver", Show::Text),
    ],
};

/// FRR's columns, in FRR's spelling.
pub(super) static BGP_SUMMARY: View = View {
    kind: "peer",
    names: &["neighbor"],
    columns: &[
        column("Neighbor", "neighbor", Show::Text),
        column("V", "v", Show::Number),
        column("AS", "as", Show::Number),
        column("MsgRcvd", "msg_rcvd", Show::Number),
        column("MsgSent", "msg_sent", Show::Number),
        column("TblVer", "tbl_ver", Show::Number),
        column("InQ", "in_q", Show::Number),
        column("OutQ", "out_q", Show::Number),
        column("Up/Down", "up_down", Show::RowRight(up_down)),
        column("State/PfxRcd", "pfx_rcd", Show::RowRight(state_or_prefixes)),
        column("PfxSnt", "pfx_snt", Show::RowRight(prefixes_sent)),
        column("Desc", "desc", Show::Text),
        wide("BFD", "bfd", Show::Row(bfd_state)),
    ],
};

fn bfd_state(row: &Value) -> String {
    plain(row.pointer("/bfd/state").unwrap_or(&Value::Null))
}

/// FRR says `never` for a peer that was never up.
pub(super) fn up_down(row: &Value) -> String {
    row.get("up_down").and_then(Value::as_u64).map_or_else(|| "never".to_owned(), clock)
}

fn is_established(row: &Value) -> bool {
    row.get("state").and_then(Value::as_str).is_some_and(|state| state.eq_ignore_ascii_case("established"))
}

fn state_or_prefixes(row: &Value) -> String {
    let key = if is_established(row) { "pfx_rcd" } else { "state" };
    plain(row.get(key).unwrap_or(&Value::Null))
}

/// As FRR: without a session nothing was sent that still counts.
fn prefixes_sent(row: &Value) -> String {
    let key = if is_established(row) { "pfx_snt" } else { "" };
    row.get(key).map_or_else(|| "0".to_owned(), plain)
}

pub(super) static BGP_PEERS: View = View {
    kind: "peer",
    names: &["neighbor"],
    columns: &[
        column("NEIGHBOR", "neighbor", Show::Text),
        column("AS", "as", Show::Number),
        column("KIND", "kind", Show::Text),
        column("STATE", "state", Show::Text),
        column("UP/DOWN", "up_down", Show::RowRight(up_down)),
        column("HOLD", "hold", Show::Number),
        column("KEEPALIVE", "keepalive", Show::Number),
        column("RECEIVED", "pfx_received", Show::Number),
        column("ACCEPTED", "pfx_rcd", Show::Number),
        column("ANNOUNCED", "pfx_snt", Show::Number),
        column("DESC", "desc", Show::Text),
        column("LAST-RESET", "last_reset", Show::Text),
        wide("GROUP", "group", Show::Text),
        wide("ROUTER-ID", "router_id", Show::Text),
        wide("NEXT-CONNECT", "next_connect", Show::Age),
        wide("ESTABLISHED", "established_count", Show::Number),
        wide("BFD", "bfd", Show::Row(bfd_state)),
        wide("CAPABILITIES", "capabilities", Show::Text),
    ],
};

pub(super) static BGP_MESSAGES: View = View {
    kind: "message",
    names: &["time"],
    columns: &[
        column("TIME", "time", Show::RowRight(message_time)),
        column("DIRECTION", "sent", Show::Row(message_direction)),
        column("TYPE", "kind", Show::Text),
        column("LENGTH", "length", Show::Number),
        column("LOCAL", "local", Show::Text),
        column("REMOTE", "remote", Show::Text),
        wide("BYTES", "bytes", Show::Text),
    ],
};

fn message_time(row: &Value) -> String {
    let time = std::time::Duration::from_micros(row.get("time").and_then(Value::as_u64).unwrap_or_default());
    humantime::format_rfc3339_micros(std::time::UNIX_EPOCH + time).to_string()
}

fn message_direction(row: &Value) -> String {
    if row.get("sent").and_then(Value::as_bool) == Some(true) { "sent" } else { "received" }.to_owned()
}

pub(super) static BGP_ROUTES: View = View {
    kind: "path",
    names: &["network", "peer"],
    columns: &[
        column("", "status", Show::Text),
        column("Network", "network", Show::Text),
        column("Next Hop", "next_hop", Show::Text),
        column("Metric", "metric", Show::Number),
        column("LocPrf", "locprf", Show::Number),
        column("Path", "path", Show::Text),
        column("Peer", "peer", Show::Text),
        column("Age", "age", Show::Clock),
        column("Reason", "reason", Show::Text),
        wide("Communities", "communities", Show::Text),
        wide("PathId", "path_id", Show::Number),
        wide("Via", "via", Show::Text),
        wide("Selection", "steps", Show::Text),
    ],
};

pub(super) static BGP_POLICY: View = View {
    kind: "verdict",
    names: &["peer", "network"],
    columns: &[
        column("PEER", "peer", Show::Text),
        column("DIRECTION", "direction", Show::Text),
        column("NETWORK", "network", Show::Text),
        column("PATH-FROM", "path_from", Show::Text),
        column("VERDICT", "verdict", Show::Text),
        column("TERM", "term", Show::Number),
        column("REASON", "reason", Show::Text),
        column("NEXT-HOP", "next_hop", Show::Text),
        column("MED", "metric", Show::Number),
        column("LOCPRF", "locprf", Show::Number),
        column("PATH", "path", Show::Text),
        column("COMMUNITIES", "communities", Show::Text),
    ],
};

pub(super) static ROUTES: View = View {
    kind: "route",
    names: &["prefix"],
    columns: &[
        column("CODE", "code", Show::Text),
        column("PREFIX", "prefix", Show::Text),
        column("METRIC", "metric", Show::Number),
        column("NEXT-HOPS", "next_hops", Show::Text),
        column("PROTOCOL", "protocol", Show::Text),
        column("INSTALLED", "installed", Show::Text),
        column("AGE", "age", Show::Clock),
    ],
};

pub(super) static MAPS: View = View {
    kind: "map",
    names: &["name"],
    columns: &[
        column("NAME", "name", Show::Text),
        column("TYPE", "type", Show::Text),
        column("ID", "id", Show::Number),
        column("KEY", "key", Show::Number),
        column("VALUE", "value", Show::Number),
        column("ENTRIES", "entries", Show::Number),
        column("MAX", "max_entries", Show::Number),
        column("FILL", "fill", Show::RowRight(fill)),
        column("COUNTED", "counted", Show::RowRight(counted)),
        column("MEMORY", "memory", Show::Bytes),
        wide("HITS", "hits", Show::Number),
        wide("MISSES", "misses", Show::Number),
        wide("DISPLACED", "displaced", Show::Number),
        wide("PIN", "pin", Show::Text),
    ],
};

fn fill(row: &Value) -> String {
    let number = |key| row.get(key).and_then(Value::as_f64);
    match (number("entries"), number("max_entries")) {
        (Some(entries), Some(max)) if max > 0.0 => format!("{:.1}%", 100.0 * entries / max),
        _ => "-".to_owned(),
    }
}

/// When the entries were counted: the flow tables by the sweep, the others for this view.
fn counted(row: &Value) -> String {
    match (row.get("counted").and_then(Value::as_u64), row.get("entries").and_then(Value::as_u64)) {
        (Some(seconds), _) => format!("{} ago", age(seconds)),
        (None, Some(_)) => "now".to_owned(),
        (None, None) => "-".to_owned(),
    }
}

pub(super) static MAP_ENTRIES: View = View {
    kind: "entry",
    names: &["key"],
    columns: &[column("KEY", "key", Show::Text), column("VALUE", "value", Show::Text)],
};

pub(super) static XDP: View = View {
    kind: "interface",
    names: &["interface"],
    columns: &[
        column("INTERFACE", "interface", Show::Text),
        column("HOOK", "hook", Show::Text),
        column("STATE", "state", Show::Text),
        column("PROGRAM", "program", Show::Number),
        column("TAG", "tag", Show::Text),
        wide("IFINDEX", "ifindex", Show::Number),
        wide("LINK", "link", Show::Number),
        column("REASON", "reason", Show::Text),
    ],
};

pub(super) static REASONS: View = View {
    kind: "reason",
    names: &["service", "reason"],
    columns: &[
        column("SERVICE", "service", Show::Text),
        column("REASON", "reason", Show::Text),
        column("ACTION", "action", Show::Text),
        column("PACKETS", "packets", Show::Number),
    ],
};

/// What deserves red: states and words that mean "not as configured".
pub(super) fn is_alarming(cell: &str) -> bool {
    let word = cell.split(':').next().unwrap_or(cell);
    matches!(
        word,
        "no-route"
            | "down"
            | "unhealthy"
            | "checking"
            | "ejected"
            | "drained"
            | "draining"
            | "last-good"
            | "unknown"
            | "missing"
            | "error"
            | "drop"
            | "degraded"
            | "warning"
            | "critical"
            | "never"
            | "Idle"
            | "Connect"
            | "Active"
            | "OpenSent"
            | "OpenConfirm"
    ) || cell.starts_with("0/")
}
