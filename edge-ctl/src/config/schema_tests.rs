//! The published schema is held to the parser: the same keys, and what the parser accepts it accepts.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use serde_json::Value as Json;

use super::{SCHEMA, raw::Merged, read::Report, validate};

/// Every key of every section, where one configuration cannot hold both of two.
const EVERYTHING: [&str; 2] = [
    r#"
[edge]
interfaces = ["ens33"]
pod_networks = ["10.1.0.0/16"]
tables = { established = 4096 }
[api]
http = ""
[log]
access = "journal"
[resolver.dns]
servers = ["10.1.0.41"]
valid = "10s"
follow = { dns = "dns.kube-system.svc.cluster.local", port = 53, record = "a" }
[bgp]
asn = 64512
router_id = "172.16.1.88"
[bgp.group.tor]
remote_asn = 65001
timers = { keepalive = "3s", hold = "9s" }
listen_range = ["198.51.100.0/24"]
[[bgp.peer]]
address = "192.0.2.1"
group = "tor"
password_file = "/etc/edge/tor.md5"
graceful_restart = { time = "60s" }
bfd = { interval = "50ms", multiplier = 3, multihop = false }
ttl_security = 1
role = "customer"
families = ["ipv4"]
import = ["10.0.0.0/8 ge 24 le 32", { prefixes = ["10.0.0.0/8 le 24"], as_path = "^65001_", set = { local_pref = 200 } }]
export = [{ communities = ["64512:1"], action = "deny" }]
max_prefixes = { limit = 1000, warning = 80, restart = "5m" }
[service.web]
listen = ["172.16.1.88:80/tcp"]
backends = { dns = "web.cluster.local", port = 80, resolver = "dns", record = "a" }
snat = { ports = "1024-32767" }
timeouts = { established = "1h", half_open = "10s", closing = "30s" }
announce = { min_backends = 2, communities = ["64512:100"] }
source_ranges = { deny = ["192.0.2.0/24"] }
limits = { new_flows_per_source = "100/s", new_flows_burst = 200 }
health = { https = { path = "/healthz", status = ["200-299"] }, passive = { failures = 3 } }
[service.every-port]
listen = ["203.0.113.10:*/tcp"]
backends = { dns = "web.cluster.local", port = "*", resolver = "dns" }
announce = true
"#,
    r#"
[edge]
interfaces = ["ens33"]
pod_networks = ["10.1.0.0/16"]
[service.a]
listen = ["172.16.1.88:80/tcp"]
backends = { static = ["10.1.0.4:80", { address = "10.1.0.5:80", weight = 2 }], backup = [{ address = "10.1.0.6:80" }] }
health = { tcp = { send = "x" } }
source_ranges = ["192.0.2.0/24"]
announce = false
[service.b]
listen = ["172.16.1.88:81/tcp"]
backends = { static = ["10.1.0.4:80"] }
health = { http = {} }
[service.c]
listen = ["172.16.1.88:82/tcp"]
backends = { static = ["10.1.0.4:80"] }
health = { tls = {} }
[service.d]
listen = ["172.16.1.88:83/tcp"]
backends = { static = ["10.1.0.4:80"] }
health = { grpc = {} }
[service.e]
listen = ["172.16.1.88:83/udp"]
backends = { static = ["10.1.0.4:80"] }
health = { udp = { send = "x" } }
timeouts = { udp = "60s", udp_unanswered = "5s" }
one_reply = false
on_down = "reselect"
"#,
];

/// Named tables are one and the same to the schema.
fn path(section: &str) -> Vec<String> {
    let mut path: Vec<String> = section.split('.').filter(|part| !part.is_empty()).map(str::to_owned).collect();
    match path.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["service" | "resolver", _, ..] => path[1] = "*".to_owned(),
        ["bgp", "group", _, ..] => path[2] = "*".to_owned(),
        _ => {}
    }
    path
}

/// The parts of the schema that may describe a value: behind a reference, or one of several.
fn alternatives<'a>(root: &'a Json, node: &'a Json) -> Vec<&'a Json> {
    if let Some(name) = node.get("$ref").and_then(Json::as_str) {
        return root.pointer(name.trim_start_matches('#')).into_iter().collect();
    }
    // A table with keys of its own says by `anyOf` which of them it needs.
    match node.get("anyOf").filter(|_| node.get("properties").is_none()).and_then(Json::as_array) {
        Some(several) => several.iter().flat_map(|one| alternatives(root, one)).collect(),
        None => vec![node],
    }
}

/// The properties of the tables at a path; arrays are looked into.
fn properties(root: &Json, path: &[String]) -> BTreeSet<String> {
    let mut nodes = vec![root];
    for part in path {
        let mut below = Vec::new();
        for node in nodes {
            let next = if part == "*" { node.get("additionalProperties") } else { node["properties"].get(part) };
            for alternative in next.into_iter().flat_map(|next| alternatives(root, next)) {
                match alternative.get("items") {
                    Some(items) => below.extend(alternatives(root, items)),
                    None => below.push(alternative),
                }
            }
        }
        nodes = below;
    }
    let keys = nodes.iter().filter_map(|node| node["properties"].as_object());
    keys.flat_map(|properties| properties.keys().cloned()).collect()
}

#[test]
fn the_schema_has_exactly_the_keys_that_the_parser_knows() {
    let root: Json = serde_json::from_str(SCHEMA).unwrap();
    let mut known: BTreeMap<Vec<String>, BTreeSet<String>> = BTreeMap::new();
    for text in EVERYTHING {
        let (report, mut merged) = (Report::default(), Merged::default());
        merged.add(Path::new("edge.toml"), text, &report);
        validate(&merged, super::Place::of_file(Path::new("edge.toml")), &report);
        let asked = report.known.borrow().clone();
        assert!(report.is_empty(), "{:#?}", report.into_problems());
        for (section, key) in asked {
            known.entry(path(&section)).or_default().insert(key.to_owned());
        }
    }
    assert!(known.len() > 25, "{} sections are too few to prove anything", known.len());
    for (path, keys) in known {
        assert_eq!(properties(&root, &path), keys, "at {path:?}");
    }
}

#[test]
fn the_schema_accepts_what_the_parser_accepts_and_refuses_unknown_keys_and_wrong_kinds() {
    let (mut schemas, mut compiler) = (boon::Schemas::new(), boon::Compiler::new());
    compiler.add_resource("edge.schema.json", serde_json::from_str(SCHEMA).unwrap()).unwrap();
    let schema = compiler.compile("edge.schema.json", &mut schemas).unwrap();
    let instance = |text: &str| -> Json { serde_json::to_value(toml::from_str::<toml::Table>(text).unwrap()).unwrap() };
    for text in [include_str!("../../../deploy/edge.toml"), EVERYTHING[0], EVERYTHING[1]] {
        schemas.validate(&instance(text), schema).unwrap();
    }
    for (good, bad) in [
        ("interfaces", "interface"),
        ("port = 80,", "port = \"80\","),
        ("port = \"*\"", "port = \"any\""),
        ("hook = \"auto\"", "hook = \"fast\""),
        ("failures = 3", "failures = 0"),
        ("asn = 64512", "asn = 0"),
    ] {
        let text =
            [include_str!("../../../deploy/edge.toml"), EVERYTHING[0]].into_iter().find(|text| text.contains(good));
        let text = text.unwrap().replacen(good, bad, 1);
        assert!(schemas.validate(&instance(&text), schema).is_err(), "{bad}");
    }
}
