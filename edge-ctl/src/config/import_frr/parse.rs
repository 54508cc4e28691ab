//! The lines of an FRR configuration that concern BGP, with or without their indentation.

use super::Named;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Action {
    #[default]
    Permit,
    Deny,
}

/// One entry of an `ip prefix-list`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ListEntry {
    pub line: usize,
    pub action: Action,
    pub prefix: String,
    /// ` ge N le M`, as written.
    pub lengths: String,
}

impl ListEntry {
    pub fn text(&self) -> String {
        format!("{}{}", self.prefix, self.lengths)
    }

    /// It matches a network alone, and no host in it.
    pub fn is_exact(&self) -> bool {
        let host = if self.prefix.contains(':') { "/128" } else { "/32" };
        self.lengths.is_empty() && !self.prefix.ends_with(host) && !self.prefix.ends_with("/0")
    }

    pub fn is_everything(&self) -> bool {
        matches!((self.prefix.as_str(), self.lengths.as_str()), ("0.0.0.0/0", " le 32") | ("::/0", " le 128"))
            || self.prefix == "any"
    }
}

/// One entry of a `route-map`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct MapEntry {
    pub line: usize,
    pub action: Action,
    pub sequence: u32,
    pub prefix_list: Option<String>,
    /// `local_pref = 200` and so on.
    pub set: Vec<String>,
}

/// A neighbour or peer group.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Neighbour {
    pub line: usize,
    pub is_group: bool,
    /// Named by the interface that it is found on.
    pub on_link: bool,
    /// The interface of a link-local one.
    pub interface: Option<String>,
    pub group: Option<String>,
    pub remote_asn: Option<u32>,
    pub description: Option<String>,
    pub password: Option<usize>,
    pub port: Option<(usize, u16)>,
    pub timers: Option<(u32, u32)>,
    pub update_source: Option<String>,
    pub multihop: Option<u32>,
    pub passive: bool,
    pub maximum: Option<(u32, u32, Option<u32>)>,
    pub map_in: Option<(usize, String)>,
    pub map_out: Option<(usize, String)>,
    pub list_in: Option<(usize, String)>,
    pub list_out: Option<(usize, String)>,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Configuration {
    pub asn: Option<u32>,
    pub router_id: Option<String>,
    pub networks: Vec<(usize, String)>,
    pub neighbours: Named<Neighbour>,
    pub lists: Named<Vec<ListEntry>>,
    pub maps: Named<Vec<MapEntry>>,
    pub findings: Vec<(usize, String)>,
}

/// What the lines at hand belong to.
enum Context {
    None,
    Map(String),
    Bgp,
    /// Something that is not BGP's: an interface, a line, another protocol.
    Foreign,
}

/// Lines that say nothing about routing, or what we do anyway.
const SILENT: [&str; 24] = [
    "frr version",
    "frr defaults",
    "hostname",
    "log",
    "service",
    "Building configuration",
    "Current configuration",
    "exit",
    "end",
    "address-family",
    "bgp log-neighbor-changes",
    "bgp default",
    "no bgp default",
    "no bgp ebgp-requires-policy",
    "bgp bestpath",
    "no bgp network import-check",
    "ip forwarding",
    "ipv6 forwarding",
    "password",
    "enable password",
    "line vty",
    "maximum-paths",
    "agentx",
    "no ipv6 forwarding",
];

pub(super) fn parse(text: &str) -> Configuration {
    let mut configuration = Configuration::default();
    let mut context = Context::None;
    for (number, raw) in (1..).zip(text.lines()) {
        let line = raw.split(" #").next().unwrap_or_default().trim();
        let words: Vec<&str> = line.split_whitespace().collect();
        if words.is_empty() || line.starts_with('!') || line.starts_with('#') {
            continue;
        }
        if let Some(next) = opens(&words, number, &mut configuration) {
            context = next;
            continue;
        }
        let understood = match (&words[..], &context) {
            (["ip" | "ipv6", "prefix-list", name, rest @ ..], _) => list_entry(&mut configuration, number, name, rest),
            (_, Context::Map(name)) => map_line(&mut configuration, name, &words),
            (_, Context::Bgp) => bgp_line(&mut configuration, number, &words),
            (_, Context::Foreign) => true,
            (_, Context::None) => false,
        };
        let silent = || SILENT.iter().any(|known| line.starts_with(known));
        if !understood && !silent() {
            configuration.findings.push((number, format!("`{line}` has no counterpart and is left out")));
        }
    }
    for entries in configuration.maps.values_mut() {
        entries.sort_by_key(|entry| entry.sequence);
    }
    configuration
}

/// A line that begins something of its own.
fn opens(words: &[&str], line: usize, configuration: &mut Configuration) -> Option<Context> {
    match words {
        ["router", "bgp", asn, ..] => {
            configuration.asn = asn.parse().ok();
            Some(Context::Bgp)
        }
        ["router", ..] | ["interface", ..] | ["line", ..] | ["vrf", ..] => Some(Context::Foreign),
        ["route-map", name, action, sequence] => {
            let action = if *action == "deny" { Action::Deny } else { Action::Permit };
            let entry = MapEntry { line, action, sequence: sequence.parse().unwrap_or(0), ..MapEntry::default() };
            configuration.maps.entry((*name).to_owned()).or_default().push(entry);
            Some(Context::Map((*name).to_owned()))
        }
        ["end"] => Some(Context::None),
        _ => None,
    }
}

fn list_entry(configuration: &mut Configuration, line: usize, name: &str, rest: &[&str]) -> bool {
    let rest = match rest {
        ["seq", _, rest @ ..] => rest,
        rest => rest,
    };
    let [action @ ("permit" | "deny"), prefix, lengths @ ..] = rest else {
        return rest.first() == Some(&"description");
    };
    let action = if *action == "deny" { Action::Deny } else { Action::Permit };
    let (prefix, any) = if *prefix == "any" { ("0.0.0.0/0", " le 32") } else { (*prefix, "") };
    let lengths = if lengths.is_empty() { any.to_owned() } else { format!(" {}", lengths.join(" ")) };
    let entry = ListEntry { line, action, prefix: prefix.to_owned(), lengths };
    configuration.lists.entry(name.to_owned()).or_default().push(entry);
    true
}

fn map_line(configuration: &mut Configuration, name: &str, words: &[&str]) -> bool {
    let Some(entry) = configuration.maps.get_mut(name).and_then(|entries| entries.last_mut()) else { return false };
    match words {
        ["match", "ip" | "ipv6", "address", "prefix-list", list] => entry.prefix_list = Some((*list).to_owned()),
        ["set", "local-preference", number] => entry.set.push(format!("local_pref = {number}")),
        ["set", "metric", number] => entry.set.push(format!("med = {number}")),
        ["set", "as-path", "prepend", numbers @ ..] => entry.set.push(format!("prepend = {}", numbers.len())),
        ["set", "ip" | "ipv6", "next-hop", address] => entry.set.push(format!("next_hop = \"{address}\"")),
        ["set", "community" | "large-community", list @ ..] => {
            let list = list.iter().filter(|word| **word != "additive").map(|word| format!("\"{word}\""));
            entry.set.push(format!("communities = [{}]", list.collect::<Vec<_>>().join(", ")));
        }
        ["description", ..] => {}
        _ => return false,
    }
    true
}

fn bgp_line(configuration: &mut Configuration, line: usize, words: &[&str]) -> bool {
    match words {
        ["bgp", "router-id", id, ..] => configuration.router_id = Some((*id).to_owned()),
        ["network", prefix, ..] => configuration.networks.push((line, (*prefix).to_owned())),
        ["neighbor", name, "peer-group"] => {
            let group = configuration.neighbours.entry((*name).to_owned()).or_default();
            (group.is_group, group.line) = (true, line);
        }
        ["neighbor", name, rest @ ..] => {
            let neighbour = configuration.neighbours.entry((*name).to_owned()).or_default();
            if neighbour.line == 0 {
                neighbour.line = line;
            }
            return match rest {
                // `neighbor fe80::1 interface eth0`: which one is meant.
                ["interface", interface] if name.parse::<std::net::IpAddr>().is_ok() => {
                    neighbour.interface = Some((*interface).to_owned());
                    true
                }
                // `neighbor eth0 interface [v6only] [remote-as N | peer-group G]`: whoever is there.
                ["interface", rest @ ..] => {
                    neighbour.on_link = true;
                    let rest = rest.strip_prefix(&["v6only"]).unwrap_or(rest);
                    rest.is_empty() || neighbour_line(neighbour, line, rest)
                }
                rest => neighbour_line(neighbour, line, rest),
            };
        }
        _ => return false,
    }
    true
}

fn neighbour_line(neighbour: &mut Neighbour, line: usize, words: &[&str]) -> bool {
    let named = |name: &&str| Some((line, (*name).to_owned()));
    match words {
        ["peer-group", group] => neighbour.group = Some((*group).to_owned()),
        ["remote-as", asn] if asn.parse::<u32>().is_ok() => neighbour.remote_asn = asn.parse().ok(),
        ["description", text @ ..] => neighbour.description = Some(text.join(" ").trim_matches('"').to_owned()),
        ["password", ..] => neighbour.password = Some(line),
        ["port", port] => neighbour.port = port.parse().ok().filter(|port| *port != 179).map(|port| (line, port)),
        ["timers", "connect", _] => return true,
        ["timers", keepalive, hold] => neighbour.timers = keepalive.parse().ok().zip(hold.parse().ok()),
        ["update-source", source] => neighbour.update_source = Some((*source).to_owned()),
        ["ebgp-multihop", hops] => neighbour.multihop = hops.parse().ok(),
        ["ebgp-multihop"] => neighbour.multihop = Some(255),
        ["passive"] => neighbour.passive = true,
        ["maximum-prefix", limit, rest @ ..] => {
            let number = |text: &&str| text.parse::<u32>().ok();
            let warning = rest.first().and_then(number).unwrap_or(75);
            let restart = rest.iter().position(|word| *word == "restart").and_then(|at| number(rest.get(at + 1)?));
            neighbour.maximum = number(limit).map(|limit| (limit, warning, restart));
        }
        ["route-map", map, "in"] => neighbour.map_in = named(map),
        ["route-map", map, "out"] => neighbour.map_out = named(map),
        ["prefix-list", list, "in"] => neighbour.list_in = named(list),
        ["prefix-list", list, "out"] => neighbour.list_out = named(list),
        // Always so here.
        ["soft-reconfiguration", "inbound"] | ["activate"] | ["next-hop-self", ..] | ["send-community", ..] => {}
        _ => return false,
    }
    true
}
