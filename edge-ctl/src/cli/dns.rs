//! `dns`: names, resolvers and their servers.

use clap::{Subcommand, ValueEnum};
use serde_json::Value;

use crate::model::{RecordType, query::Query};

#[derive(Debug, Subcommand)]
pub(super) enum DnsVerb {
    /// Names that services ask for, with the addresses in use
    #[command(alias = "ls")]
    List,
    /// Requests and answers of each resolver, by type and class
    Stats,
    /// The servers of each resolver
    Servers,
    /// Ask a resolver, as the daemon would
    Query {
        /// A name, or an address whose name is asked for
        name: String,
        /// Record type
        #[arg(long = "type", value_enum, ignore_case = true)]
        record: Option<Record>,
        /// The resolver's name [default: the one that services ask for this name, else the first]
        #[arg(long)]
        resolver: Option<String>,
    },
    /// Ask for a name, or for all of them, now
    Refresh {
        /// The name
        name: Option<String>,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum Record {
    A,
    Aaaa,
    Srv,
}

impl DnsVerb {
    /// What a verb has the daemon do; `None` where it only lists.
    pub fn order(&self) -> Option<Query> {
        match self {
            Self::List | Self::Stats | Self::Servers => None,
            Self::Query { name, record, resolver } => {
                let record = record.map(|record| match record {
                    Record::A => RecordType::A,
                    Record::Aaaa => RecordType::Aaaa,
                    Record::Srv => RecordType::Srv,
                });
                Some(Query::DnsQuery { name: name.clone(), record, resolver: resolver.clone() })
            }
            Self::Refresh { name } => Some(Query::DnsRefresh { name: name.clone() }),
        }
    }
}

/// Resolvers with their requests and responses as fields of their own, for columns.
pub(super) fn flat_stats(zones: Vec<Value>) -> Vec<Value> {
    let flat = |mut zone: Value| {
        let Some(fields) = zone.as_object_mut() else { return zone };
        for group in ["requests", "responses"] {
            if let Some(Value::Object(counts)) = fields.get(group).cloned() {
                fields.extend(counts);
            }
        }
        zone
    };
    zones.into_iter().map(flat).collect()
}

/// The servers of all resolvers, each with its resolver's name.
pub(super) fn flat_servers(zones: Vec<Value>) -> Vec<Value> {
    let servers = zones.into_iter().flat_map(|mut zone| {
        let resolver = zone["resolver"].take();
        let servers = zone["servers"].as_array().cloned().unwrap_or_default();
        servers.into_iter().map(move |mut server| {
            server["resolver"] = resolver.clone();
            server
        })
    });
    servers.collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn counts_become_columns_and_servers_rows_with_their_resolver() {
        let zone = json!({"resolver": "kube-dns", "requests": {"name": 3}, "responses": {"success": 2},
            "servers": [{"server": "10.1.0.41:53"}, {"server": "10.1.0.42:53"}]});
        let stats = flat_stats(vec![zone.clone()]);
        assert_eq!((&stats[0]["name"], &stats[0]["success"]), (&json!(3), &json!(2)));
        let servers = flat_servers(vec![zone]);
        assert_eq!(servers.len(), 2);
        assert_eq!((&servers[1]["server"], &servers[1]["resolver"]), (&json!("10.1.0.42:53"), &json!("kube-dns")));
    }
}
