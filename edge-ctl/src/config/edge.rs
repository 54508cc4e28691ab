//! `[edge]`, `[edge.tables]`, `[api]`.

use std::{collections::BTreeSet, net::SocketAddr, path::PathBuf};

use edge_common::maps::CACHE_BYTES_MIN;

use super::{
    read::Section,
    valid::{Edge, Hook, Tables},
    values,
};

/// Fewest entries of a flow table. An LRU map smaller than 128 elements for each CPU of a large machine evicts live ones.
const SMALLEST_TABLE: u32 = 1 << 10;
/// Most entries of a flow table: 2^26 of them take some 10 GiB.
const LARGEST_TABLE: u32 = 1 << 26;
/// Each backend has counters on every CPU: 2^20 of them take 150 MiB for each.
const MOST_BACKENDS: u32 = 1 << 20;
/// 1 GiB.
const MOST_CHUNKS: u32 = 1 << 22;
/// A socket path has 108 bytes with its final zero (unix(7)).
const LONGEST_SOCKET_PATH: usize = 107;

pub(super) fn edge(root: &Section<'_>) -> Option<Edge> {
    let Some(section) = root.table("edge") else {
        if !root.has("edge") {
            root.missing("[edge]", "a table with at least `interfaces` and `pod_networks`");
        }
        return None;
    };
    let edge = Edge {
        interfaces: interfaces(&section),
        hook: section
            .parse("hook", "\"auto\", \"xdp-native\", \"xdp-generic\" or \"tc\"", hook)
            .map_or(Hook::default(), |hook| hook.value),
        pod_networks: pod_networks(&section),
        pin_path: path(&section, "pin_path").unwrap_or_else(|| "/sys/fs/bpf/edge".into()),
        socket: socket(&section).unwrap_or_else(|| "/run/edge/edge.sock".into()),
        state_dir: path(&section, "state_dir").unwrap_or_else(|| "/var/lib/edge".into()),
        seed_file: path(&section, "seed_file"),
        tables: tables(&section),
    };
    section.finish();
    Some(edge)
}

fn interfaces(section: &Section<'_>) -> Vec<String> {
    let names = section.required_list(
        "interfaces",
        "the name of a network interface",
        "at least one name, such as [\"ens33\"]",
        interface,
    );
    let mut seen = BTreeSet::new();
    for name in &names {
        if !seen.insert(&name.value) {
            section.fault(&name.at, format!("`interfaces`: \"{}\" stands there twice", name.value));
        }
    }
    names.into_iter().map(|name| name.value).collect()
}

/// IFNAMSIZ is 16 with the final zero; the kernel refuses `/`, `:` and spaces (dev_valid_name).
fn interface(name: &str) -> Result<String, String> {
    let plain = name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/' && byte != b':');
    match name {
        "" | "." | ".." => Err("not an interface name".into()),
        _ if name.len() > 15 => Err("longer than 15 characters".into()),
        _ if !plain => Err("not an interface name".into()),
        _ => Ok(name.to_owned()),
    }
}

fn hook(text: &str) -> Result<Hook, String> {
    match text {
        "auto" => Ok(Hook::Auto),
        "xdp-native" => Ok(Hook::XdpNative),
        "xdp-generic" => Ok(Hook::XdpGeneric),
        "tc" => Ok(Hook::Tc),
        _ => Err(String::new()),
    }
}

fn pod_networks(section: &Section<'_>) -> Vec<ipnet::IpNet> {
    let example = "the networks that backends lie in, such as [\"10.1.0.0/16\"]";
    let networks = section.required_list("pod_networks", values::PREFIX, example, values::prefix);
    for network in networks.iter().filter(|network| network.value.prefix_len() == 0) {
        let why = "would let DNS name any host in the world as a backend; list the pods' own networks";
        section.fault(&network.at, format!("`pod_networks`: \"{}\" {why}", network.value));
    }
    networks.into_iter().map(|network| network.value).filter(|network| network.prefix_len() != 0).collect()
}

fn path(section: &Section<'_>, key: &'static str) -> Option<PathBuf> {
    let absolute = |text: &str| match PathBuf::from(text) {
        path if path.is_absolute() => Ok(path),
        _ => Err("not absolute".to_owned()),
    };
    section.parse(key, "an absolute path", absolute).map(|path| path.value)
}

fn socket(section: &Section<'_>) -> Option<PathBuf> {
    let socket = path(section, "socket")?;
    if socket.as_os_str().len() > LONGEST_SOCKET_PATH {
        let message = format!("`socket`: a socket path has at most {LONGEST_SOCKET_PATH} bytes");
        section.fault(section.place(), message);
    }
    Some(socket)
}

fn tables(section: &Section<'_>) -> Tables {
    let defaults = Tables::default();
    let Some(tables) = section.table("tables") else { return defaults };
    let entries = |key, default| tables.integer(key, SMALLEST_TABLE..=LARGEST_TABLE).unwrap_or(default);
    let read = Tables {
        established: entries("established", defaults.established),
        half_open: entries("half_open", defaults.half_open),
        closing: entries("closing", defaults.closing),
        established_v6: entries("established_v6", defaults.established_v6),
        half_open_v6: entries("half_open_v6", defaults.half_open_v6),
        closing_v6: entries("closing_v6", defaults.closing_v6),
        cache: tables.parse("cache", CACHE, memory).map_or(defaults.cache, |cache| cache.value),
        backends: tables.integer("backends", SMALLEST_TABLE..=MOST_BACKENDS).unwrap_or(defaults.backends),
        selection: tables.integer("selection", SMALLEST_TABLE..=MOST_CHUNKS).unwrap_or(defaults.selection),
    };
    tables.finish();
    read
}

const CACHE: &str = "\"0\", or memory from \"4KiB\" to \"64GiB\"";

/// Bytes from a number with a unit.
fn memory(text: &str) -> Result<u64, String> {
    if text == "0" {
        return Ok(0);
    }
    let (number, shift) = [("KiB", 10), ("MiB", 20), ("GiB", 30)]
        .into_iter()
        .find_map(|(unit, shift)| Some((text.strip_suffix(unit)?, shift)))
        .ok_or("no unit: KiB, MiB or GiB")?;
    let number: u64 = number.trim_end().parse().map_err(|_| "not a whole number".to_owned())?;
    let bytes = number.checked_mul(1 << shift).filter(|bytes| (CACHE_BYTES_MIN..=64 << 30).contains(bytes));
    bytes.ok_or_else(|| "out of range".to_owned())
}

/// `[api] http`; the default is on, on the loopback address only.
pub(super) fn http(root: &Section<'_>) -> Option<SocketAddr> {
    let default = Some(SocketAddr::from(([127, 0, 0, 1], 9180)));
    let Some(section) = root.table("api") else { return default };
    let parse = |text: &str| match text {
        "" => Ok(None),
        _ => text.parse().map(Some).map_err(|_| "not an address with a port".to_owned()),
    };
    let http = section.parse("http", "ADDRESS:PORT such as \"127.0.0.1:9180\", or \"\" to turn it off", parse);
    section.finish();
    http.map_or(default, |http| http.value)
}
