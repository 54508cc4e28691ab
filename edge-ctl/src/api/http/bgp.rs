//! Orders for BGP sessions, and their last messages.

use std::net::IpAddr;

use axum::{
    extract::{
        Path, Query as Parameters, State,
        rejection::{PathRejection, QueryRejection},
    },
    response::Response,
};
use serde::Deserialize;

use super::{Named, Query, Shared, ask, bad_request, peer_routes};
use crate::model::bgp_session::{Order, PeerOrder};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct OrderParameters {
    message: Option<String>,
}

/// `GET /v1/bgp/peers/ADDRESS/messages`.
pub(super) async fn messages(State(views): State<Shared>, peer: Named) -> Response {
    peer_routes(views, peer, Query::BgpMessages).await
}

/// `POST /v1/bgp/peers/ADDRESS|all/VERB`.
pub(super) async fn order(
    State(views): State<Shared>,
    path: Result<Path<(String, String)>, PathRejection>,
    parameters: Result<Parameters<OrderParameters>, QueryRejection>,
) -> Response {
    let (peer, verb, message) = match (path, parameters) {
        (Ok(Path((peer, verb))), Ok(Parameters(OrderParameters { message }))) => (peer, verb, message),
        (Err(rejection), _) => return bad_request(rejection.body_text()),
        (_, Err(rejection)) => return bad_request(rejection.body_text()),
    };
    let peer: Option<IpAddr> = match (peer.as_str(), peer.parse()) {
        ("all", _) => None,
        (_, Ok(peer)) => Some(peer),
        _ => return bad_request(format!("`{peer}` is neither the address of a peer nor `all`")),
    };
    let what = match (verb.as_str(), message) {
        ("shutdown", message) => Order::Shutdown(message.unwrap_or_default()),
        (_, Some(_)) => return bad_request(format!("`{verb}` takes no message")),
        ("clear", None) => Order::Clear,
        ("refresh", None) => Order::Refresh,
        ("enable", None) => Order::Enable,
        _ => return bad_request(format!("`{verb}` is not clear, refresh, shutdown or enable")),
    };
    ask(views, Query::BgpOrder(PeerOrder { peer, what })).await
}
