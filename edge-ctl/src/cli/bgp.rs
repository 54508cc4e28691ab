//! `bgp routes [PREFIX]`, `bgp policy test` and `config import frr`.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::Value;

use super::{
    Exit,
    args::{Direction, PolicyArgs},
    commands::{Failure, Outcome, Shown, Source, rows},
    views,
};
use crate::{
    config::import_frr,
    model::query::{PolicyQuestion, Query},
};

/// Prints the configuration, and on standard error what is wrong with the original; degraded where anything is.
pub(super) fn import_frr(file: &std::path::Path) -> Exit {
    let text = match std::fs::read_to_string(file) {
        Ok(text) => text,
        Err(error) => {
            eprintln!("edge-ctl: {}: {error}", file.display());
            return Exit::Error;
        }
    };
    match import_frr::import(&text) {
        Ok(imported) => {
            print!("{}", imported.toml);
            for finding in &imported.findings {
                eprintln!("{}: {finding}", file.display());
            }
            if imported.findings.is_empty() { Exit::Ok } else { Exit::Degraded }
        }
        Err(why) => {
            eprintln!("edge-ctl: {}: {why}", file.display());
            Exit::Usage
        }
    }
}

/// All paths, or those to one prefix: the one given, or the longest with the address in it.
pub(super) fn routes(source: &Source<'_>, wanted: Option<&str>) -> Outcome<Shown> {
    let mut found = source.rows(&Query::BgpRoutes)?;
    if let Some(text) = wanted {
        let prefix = match (text.parse::<IpNet>(), text.parse::<IpAddr>()) {
            (Ok(prefix), _) => prefix.trunc(),
            (Err(_), Ok(address)) => longest(&found, address)
                .ok_or_else(|| Failure::error(format!("no path covers {address}; `edge-ctl bgp routes` lists all")))?,
            (Err(_), Err(_)) => return Err(Failure::usage(format!("`{text}` is neither a prefix nor an address"))),
        };
        found.retain(|row| network(row) == Some(prefix));
        if found.is_empty() {
            let hint = "`edge-ctl bgp routes received` shows what policy refused";
            return Err(Failure::error(format!("there is no path to {prefix}; {hint}")));
        }
    }
    rows(source, &views::BGP_ROUTES, found)
}

fn network(row: &Value) -> Option<IpNet> {
    row.get("network").and_then(Value::as_str)?.parse().ok()
}

fn longest(rows: &[Value], address: IpAddr) -> Option<IpNet> {
    rows.iter().filter_map(network).filter(|prefix| prefix.contains(&address)).max_by_key(IpNet::prefix_len)
}

/// The question as the command line has it.
pub(super) fn policy(source: &Source<'_>, given: &PolicyArgs) -> Outcome<Shown> {
    let number = |text: &str| {
        text.parse::<u32>().map_err(|_| Failure::usage(format!("--as-path: `{text}` is not an AS number")))
    };
    let as_path = given.as_path.as_ref().map(|path| path.split_whitespace().map(number).collect::<Result<_, _>>());
    let question = PolicyQuestion {
        peer: given.peer,
        export: given.direction == Direction::Out,
        prefix: given.prefix.trunc(),
        as_path: as_path.transpose()?,
        communities: given.communities.clone(),
        next_hop: given.next_hop,
    };
    let found = source.rows(&Query::BgpPolicy(question))?;
    rows(source, &views::BGP_POLICY, found)
}
