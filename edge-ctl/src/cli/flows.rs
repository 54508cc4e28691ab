//! `flow get`, `flow count` and `flow kill`.

use std::{
    net::{IpAddr, SocketAddr},
    str::FromStr,
};

use clap::Args;
use serde_json::Value;

use super::{
    Exit,
    commands::{Failure, Outcome, Shown, Source, print, rows, single},
    table, views,
};
use crate::model::{Endpoint, FlowSelector, Protocol, query::Query};

/// More flows than any table holds.
const ALL: usize = 1 << 20;

/// A client's address, with its port where one is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Client(IpAddr, Option<u16>);

impl FromStr for Client {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text.parse::<IpAddr>(), text.parse::<SocketAddr>()) {
            (Ok(address), _) => Ok(Self(address, None)),
            (_, Ok(socket)) => Ok(Self(socket.ip(), Some(socket.port()))),
            _ => Err("expected ADDRESS or ADDRESS:PORT".to_owned()),
        }
    }
}

#[derive(Clone, Debug, Args)]
pub(super) struct KillArgs {
    /// The service's name
    pub service: String,
    /// Only flows with this backend, ADDRESS:PORT
    #[arg(long)]
    pub backend: Option<Endpoint>,
    /// Only flows of this client, ADDRESS or ADDRESS:PORT
    #[arg(long)]
    pub client: Option<Client>,
    /// Only tcp, or only udp
    #[arg(long, value_parser = protocol)]
    pub protocol: Option<Protocol>,
}

fn protocol(text: &str) -> Result<Protocol, String> {
    match text {
        "tcp" => Ok(Protocol::Tcp),
        "udp" => Ok(Protocol::Udp),
        _ => Err("expected tcp or udp".to_owned()),
    }
}

/// Ends flows, and says how many.
pub(super) fn kill(source: &Source<'_>, args: &KillArgs) -> Outcome<Exit> {
    if source.global.kernel {
        let message = "`flow kill` is for the daemon; `--kernel` only reads".into();
        return Err(Failure { exit: Exit::Usage, message });
    }
    let KillArgs { service, backend, client, protocol } = args.clone();
    let (backend, client) =
        (backend.map(|Endpoint(address)| address), client.map(|Client(address, port)| (address, port)));
    let row = source.ask(&Query::FlowKill(FlowSelector { service, backend, client, protocol }))?;
    let pretty = |row: &Value| format!("{} flows ended\n", row.get("flows").map(table::plain).unwrap_or_default());
    print(&single(source, &views::FLOWS, row, pretty)?);
    Ok(Exit::Ok)
}

/// All flows of one client.
pub(super) fn of_client(source: &Source<'_>, client: &Client) -> Outcome<Shown> {
    let mut found = source.rows(&Query::Flows { service: None, limit: ALL })?;
    found.retain(|row| {
        let own = row.get("client").and_then(Value::as_str).and_then(|text| text.parse::<SocketAddr>().ok());
        own.is_some_and(|own| own.ip() == client.0 && client.1.is_none_or(|port| port == own.port()))
    });
    if found.is_empty() {
        return Err(Failure::error(format!("{} has no flow", client.0)));
    }
    rows(source, &views::FLOWS, found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_is_an_address_with_or_without_a_port() {
        assert_eq!("203.0.113.7".parse(), Ok(Client("203.0.113.7".parse().unwrap(), None)));
        assert_eq!("[2001:db8::1]:80".parse(), Ok(Client("2001:db8::1".parse().unwrap(), Some(80))));
        assert!("edge:80".parse::<Client>().is_err());
    }
}
