//! The pins' answers to the questions that users ask, for `--kernel` and for the daemon's own API.

use edge_common::maps::name;
use serde_json::Value;

use super::{acl_view::acl_rows, kernel_view::KernelView};
use crate::model::query::{Answer, MapEntryRow, Query, ReasonRow, ViewError};

/// Answers a question from the maps alone.
///
/// # Errors
/// [`ViewError::Unavailable`] for what only the daemon knows; [`ViewError::NotFound`] for a map there is not.
pub fn answer_from_pins(view: &KernelView, query: &Query) -> Result<Answer, ViewError> {
    let only_daemon = |what: &str| ViewError::Unavailable(format!("{what} is known to the running daemon only"));
    Ok(match query {
        Query::Services => Answer::Services(view.service_rows()?),
        Query::Backends => Answer::Backends(view.backend_rows()?.into_iter().map(|(_, row)| row).collect()),
        Query::Flows { service, limit } => Answer::Flows(view.flow_rows(service.as_deref(), *limit)?),
        Query::Maps => Answer::Maps(view.map_rows()?),
        Query::Map { name, limit } => {
            if !name::ALL.iter().chain(&name::DAEMON).any(|known| known.eq_ignore_ascii_case(name)) {
                return Err(ViewError::NotFound(format!("there is no map `{name}`; `map list` names them")));
            }
            Answer::MapEntries(view.dump(name, *limit)?.iter().map(entry).collect())
        }
        Query::Xdp => Answer::Xdp(view.xdp_rows()?),
        Query::Reasons => {
            let row = |(service, reason, dropped, packets): (String, &str, bool, u64)| ReasonRow {
                service,
                reason: reason.to_owned(),
                action: if dropped { "drop" } else { "pass" }.to_owned(),
                packets,
            };
            Answer::Reasons(view.reasons()?.into_iter().map(row).collect())
        }
        Query::Acl => Answer::Acl(acl_rows(view.tables())?),
        Query::AclAdd { .. } | Query::AclRemove { .. } => {
            return Err(ViewError::Unavailable("changing source ranges needs the running daemon".to_owned()));
        }
        Query::Audit => return Err(only_daemon("what should be in the maps")),
        Query::Status => return Err(only_daemon("the status")),
        Query::Dns | Query::DnsZones | Query::DnsQuery { .. } | Query::DnsRefresh { .. } => {
            return Err(only_daemon("what DNS answered"));
        }
        Query::BgpOrder(_) => {
            return Err(ViewError::Unavailable("an order for BGP sessions needs the running daemon".to_owned()));
        }
        Query::BgpPeers
        | Query::BgpRoutes
        | Query::BgpReceived(_)
        | Query::BgpAdvertised(_)
        | Query::BgpMessages(_)
        | Query::BgpPolicy(_) => {
            return Err(only_daemon("the state of BGP"));
        }
        Query::Routes => return Err(only_daemon("which routes are BGP's")),
        Query::Events => return Err(only_daemon("which events there were")),
        Query::Config => return Err(only_daemon("the configuration in force")),
        Query::Capture(_) => return Err(ViewError::Unavailable("a capture needs the running daemon".to_owned())),
        Query::Health | Query::HealthHistory => return Err(only_daemon("what checks found")),
        Query::FlowKill(_) => return Err(ViewError::Unavailable("ending flows needs the running daemon".to_owned())),
        Query::Order { .. } => {
            return Err(ViewError::Unavailable("an order for a backend needs the running daemon".to_owned()));
        }
        Query::Reload | Query::Change(_) => {
            return Err(ViewError::Unavailable("a reload needs the running daemon".to_owned()));
        }
    })
}

fn entry(dumped: &Value) -> MapEntryRow {
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    MapEntryRow { key: text(&dumped["key"]), value: text(&dumped["value"]) }
}
