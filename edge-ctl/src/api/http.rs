//! Routes, and how questions and answers look in HTTP.

mod bgp;

use std::{net::IpAddr, path::PathBuf, sync::Arc};

use axum::{
    Json, Router,
    extract::{
        Path, Query as Parameters, State,
        rejection::{PathRejection, QueryRejection},
    },
    http::{StatusCode, Uri, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde::Deserialize;

use super::{Answer, Query, ViewError, Views, metrics};
use crate::model::capture::CaptureOrder;
use crate::model::{
    BackendVerb, Endpoint, FlowSelector, MOST_CONNECTIONS, Protocol, RecordType,
    query::{ConfigChange, ConfigVerb, DEFAULT_LIMIT, PolicyQuestion, Refusal, ServiceDetail},
};

/// Rows that one answer may have; more would hold up the daemon.
const MOST_ROWS: usize = 1 << 20;

type Shared = Arc<dyn Views>;

/// What the unix socket serves.
pub(super) fn api(views: Shared) -> Router {
    let plain = [
        ("/v1/status", Query::Status),
        ("/v1/services", Query::Services),
        ("/v1/backends", Query::Backends),
        ("/v1/dns", Query::Dns),
        ("/v1/dns/stats", Query::DnsZones),
        ("/v1/bgp/peers", Query::BgpPeers),
        ("/v1/bgp/routes", Query::BgpRoutes),
        ("/v1/routes", Query::Routes),
        ("/v1/maps", Query::Maps),
        ("/v1/xdp", Query::Xdp),
        ("/v1/audit", Query::Audit),
        ("/v1/reasons", Query::Reasons),
        ("/v1/acl", Query::Acl),
        ("/v1/events", Query::Events),
        ("/v1/config", Query::Config),
        ("/v1/health", Query::Health),
        ("/v1/health/history", Query::HealthHistory),
    ];
    let router = plain.into_iter().fold(Router::new(), |router, (path, query)| {
        router.route(path, get(move |State(views): State<Shared>| ask(views, query)))
    });
    router
        .route("/v1/services/{name}", get(service))
        .route("/v1/flows", get(flows))
        .route("/v1/flows/kill", post(kill_flows))
        .route("/v1/maps/{name}", get(map))
        .route("/v1/bgp/peers/{peer}/received", get(received))
        .route("/v1/bgp/peers/{peer}/advertised", get(advertised))
        .route("/v1/bgp/peers/{peer}/messages", get(bgp::messages))
        .route("/v1/bgp/peers/{peer}/{verb}", post(bgp::order))
        .route("/v1/bgp/policy", get(policy))
        .route("/v1/acl/add", post(acl_add))
        .route("/v1/acl/remove", post(acl_remove))
        .route("/v1/capture", post(capture))
        .route("/v1/dns/query", post(dns_query))
        .route("/v1/dns/refresh", post(dns_refresh))
        .route("/v1/config/{verb}", post(change))
        .route("/v1/reload", post(|State(views): State<Shared>| ask(views, Query::Reload)))
        .route("/v1/backends/{service}/{backend}/{verb}", post(order))
        .route("/metrics", get(scrape))
        .fallback(not_found)
        .method_not_allowed_fallback(wrong_method)
        .with_state(views)
}

/// What the TCP address serves: nothing that changes anything.
pub(super) fn metrics(views: Shared) -> Router {
    let index = || async { "edge: metrics are at /metrics; everything else is `edge-ctl`\n" };
    Router::new().route("/metrics", get(scrape)).route("/", get(index)).fallback(not_found).with_state(views)
}

async fn ask(views: Shared, query: Query) -> Response {
    match views.answer(query).await {
        Ok(answer) => Json(answer).into_response(),
        Err(error) => refuse(error),
    }
}

fn refuse(error: ViewError) -> Response {
    let text = error.to_string();
    let (status, refusal) = match error {
        ViewError::NotFound(_) => (StatusCode::NOT_FOUND, Refusal { error: text, problems: Vec::new() }),
        ViewError::Invalid(problems) => {
            let error = problems.first().cloned().unwrap_or_default();
            (StatusCode::UNPROCESSABLE_ENTITY, Refusal { error, problems })
        }
        ViewError::Unavailable(_) => (StatusCode::SERVICE_UNAVAILABLE, Refusal { error: text, problems: Vec::new() }),
        ViewError::Internal(_) => (StatusCode::INTERNAL_SERVER_ERROR, Refusal { error: text, problems: Vec::new() }),
    };
    (status, Json(refusal)).into_response()
}

fn bad_request(error: String) -> Response {
    (StatusCode::BAD_REQUEST, Json(Refusal { error, problems: Vec::new() })).into_response()
}

async fn not_found(uri: Uri) -> Response {
    refuse(ViewError::NotFound(format!("there is nothing at {}", uri.path())))
}

async fn wrong_method(uri: Uri) -> Response {
    let error = format!(
        "{} does not take that method (GET everywhere, POST for /v1/reload, /v1/flows/kill, /v1/config/VERB, /v1/capture, \
         /v1/acl/add, /v1/acl/remove, /v1/dns/query, /v1/dns/refresh, /v1/bgp/peers/ADDRESS/VERB and /v1/backends/SERVICE/ADDRESS:PORT/VERB)",
        uri.path()
    );
    (StatusCode::METHOD_NOT_ALLOWED, Json(Refusal { error, problems: Vec::new() })).into_response()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ListParameters {
    service: Option<String>,
    limit: Option<usize>,
}

impl ListParameters {
    fn limit(&self) -> usize {
        self.limit.unwrap_or(DEFAULT_LIMIT).min(MOST_ROWS)
    }
}

type Listed = Result<Parameters<ListParameters>, QueryRejection>;
type Named = Result<Path<String>, PathRejection>;

async fn flows(State(views): State<Shared>, parameters: Listed) -> Response {
    match parameters {
        Ok(Parameters(parameters)) => {
            let limit = parameters.limit();
            ask(views, Query::Flows { service: parameters.service, limit }).await
        }
        Err(rejection) => bad_request(rejection.body_text()),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ChangeParameters {
    /// Seconds.
    confirm: Option<u64>,
}

async fn change(
    State(views): State<Shared>,
    verb: Named,
    parameters: Result<Parameters<ChangeParameters>, QueryRejection>,
    body: String,
) -> Response {
    let (verb, confirm) = match (verb, parameters) {
        (Ok(Path(verb)), Ok(Parameters(ChangeParameters { confirm }))) => (verb, confirm),
        (Err(rejection), _) => return bad_request(rejection.body_text()),
        (_, Err(rejection)) => return bad_request(rejection.body_text()),
    };
    let files = match serde_json::from_str::<Vec<(PathBuf, String)>>(&body) {
        _ if body.is_empty() => None,
        Ok(files) if !files.is_empty() => Some(files),
        Ok(_) => return bad_request("the body holds no file".to_owned()),
        Err(error) => return bad_request(format!("the body is not [[FILE, TEXT], ...]: {error}")),
    };
    let verb = match (verb.as_str(), confirm) {
        ("commit", Some(0)) => return bad_request("`confirm` is at least 1 s".to_owned()),
        ("commit", confirm) => ConfigVerb::Commit(confirm),
        (_, Some(_)) => return bad_request(format!("`{verb}` takes no `confirm`")),
        ("diff", None) => ConfigVerb::Diff,
        ("confirm", None) => ConfigVerb::Confirm,
        ("rollback", None) => ConfigVerb::Rollback,
        _ => return bad_request(format!("`{verb}` is not diff, commit, confirm or rollback")),
    };
    ask(views, Query::Change(ConfigChange { verb, files })).await
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct KillParameters {
    service: String,
    backend: Option<Endpoint>,
    client: Option<IpAddr>,
    port: Option<u16>,
    protocol: Option<Protocol>,
}

async fn kill_flows(
    State(views): State<Shared>,
    meant: Result<Parameters<KillParameters>, QueryRejection>,
) -> Response {
    match meant {
        Ok(Parameters(KillParameters { client: None, port: Some(_), .. })) => {
            bad_request("`port` is the client's: it needs `client`".to_owned())
        }
        Ok(Parameters(KillParameters { service, backend, client, port, protocol })) => {
            let (backend, client) = (backend.map(|Endpoint(address)| address), client.map(|address| (address, port)));
            ask(views, Query::FlowKill(FlowSelector { service, backend, client, protocol })).await
        }
        Err(rejection) => bad_request(rejection.body_text()),
    }
}

async fn capture(State(views): State<Shared>, order: Result<Parameters<CaptureOrder>, QueryRejection>) -> Response {
    match order {
        Ok(Parameters(order)) => ask(views, Query::Capture(order)).await,
        Err(rejection) => bad_request(rejection.body_text()),
    }
}

async fn map(State(views): State<Shared>, name: Named, parameters: Listed) -> Response {
    match (name, parameters) {
        (Ok(Path(name)), Ok(Parameters(parameters))) => {
            let limit = parameters.limit();
            ask(views, Query::Map { name, limit }).await
        }
        (Err(rejection), _) => bad_request(rejection.body_text()),
        (_, Err(rejection)) => bad_request(rejection.body_text()),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AclParameters {
    service: String,
    prefix: String,
    #[serde(default)]
    deny: bool,
    #[serde(rename = "for")]
    lifetime: Option<String>,
}

async fn acl_add(
    State(views): State<Shared>,
    parameters: Result<Parameters<AclParameters>, QueryRejection>,
) -> Response {
    match parameters {
        Ok(Parameters(AclParameters { service, prefix, deny, lifetime })) => {
            ask(views, Query::AclAdd { service, prefix, deny, lifetime }).await
        }
        Err(rejection) => bad_request(rejection.body_text()),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RangeParameters {
    service: String,
    prefix: String,
}

async fn acl_remove(
    State(views): State<Shared>,
    parameters: Result<Parameters<RangeParameters>, QueryRejection>,
) -> Response {
    match parameters {
        Ok(Parameters(RangeParameters { service, prefix })) => ask(views, Query::AclRemove { service, prefix }).await,
        Err(rejection) => bad_request(rejection.body_text()),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DnsParameters {
    name: String,
    record: Option<RecordType>,
    resolver: Option<String>,
}

async fn dns_query(
    State(views): State<Shared>,
    parameters: Result<Parameters<DnsParameters>, QueryRejection>,
) -> Response {
    match parameters {
        Ok(Parameters(DnsParameters { name, record, resolver })) => {
            ask(views, Query::DnsQuery { name, record, resolver }).await
        }
        Err(rejection) => bad_request(rejection.body_text()),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NameParameters {
    name: Option<String>,
}

async fn dns_refresh(
    State(views): State<Shared>,
    parameters: Result<Parameters<NameParameters>, QueryRejection>,
) -> Response {
    match parameters {
        Ok(Parameters(NameParameters { name })) => ask(views, Query::DnsRefresh { name }).await,
        Err(rejection) => bad_request(rejection.body_text()),
    }
}

async fn service(State(views): State<Shared>, name: Named) -> Response {
    let name = match name {
        Ok(Path(name)) => name,
        Err(rejection) => return bad_request(rejection.body_text()),
    };
    let services = match views.answer(Query::Services).await {
        Ok(Answer::Services(rows)) => rows,
        Ok(_) => return mismatch("services"),
        Err(error) => return refuse(error),
    };
    let backends = match views.answer(Query::Backends).await {
        Ok(Answer::Backends(rows)) => rows,
        Ok(_) => return mismatch("backends"),
        Err(error) => return refuse(error),
    };
    match ServiceDetail::pick(&name, services, backends) {
        Some(detail) => Json(detail).into_response(),
        None => refuse(ViewError::NotFound(format!("there is no service `{name}`"))),
    }
}

fn mismatch(what: &str) -> Response {
    refuse(ViewError::Internal(format!("the daemon answered another question than the one for {what}")))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OrderParameters {
    weight: Option<u16>,
    limit: Option<u32>,
}

type Ordered = Result<Parameters<OrderParameters>, QueryRejection>;
type Addressed = Result<Path<(String, String, String)>, PathRejection>;

async fn order(State(views): State<Shared>, path: Addressed, parameters: Ordered) -> Response {
    let (service, backend, verb, parameters) = match (path, parameters) {
        (Ok(Path((service, backend, verb))), Ok(Parameters(parameters))) => (service, backend, verb, parameters),
        (Err(rejection), _) => return bad_request(rejection.body_text()),
        (_, Err(rejection)) => return bad_request(rejection.body_text()),
    };
    let Ok(Endpoint(backend)) = backend.parse() else {
        return bad_request(format!("`{backend}` is not ADDRESS:PORT of a backend"));
    };
    match backend_verb(&verb, &parameters) {
        Ok(verb) => ask(views, Query::Order { service, backend, verb }).await,
        Err(why) => bad_request(why),
    }
}

fn backend_verb(verb: &str, parameters: &OrderParameters) -> Result<BackendVerb, String> {
    Ok(match (verb, parameters.weight, parameters.limit) {
        ("weight", Some(0), None) => return Err("a weight is from 1 to 65535; `down` takes a backend out".to_owned()),
        ("weight", weight, None) => BackendVerb::Weight(weight),
        ("limit", None, limit) if limit.is_none_or(|limit| (1..=MOST_CONNECTIONS).contains(&limit)) => {
            BackendVerb::Limit(limit)
        }
        ("limit", None, _) => return Err(format!("a limit is from 1 to {MOST_CONNECTIONS}")),
        (_, Some(_), _) => return Err(format!("`{verb}` takes no weight")),
        (_, _, Some(_)) => return Err(format!("`{verb}` takes no limit")),
        ("down", None, None) => BackendVerb::Down,
        ("up", None, None) => BackendVerb::Up,
        ("drain", None, None) => BackendVerb::Drain,
        ("undrain", None, None) => BackendVerb::Undrain,
        _ => return Err(format!("`{verb}` is not down, up, drain, undrain, weight or limit")),
    })
}

async fn received(State(views): State<Shared>, peer: Named) -> Response {
    peer_routes(views, peer, Query::BgpReceived).await
}

async fn advertised(State(views): State<Shared>, peer: Named) -> Response {
    peer_routes(views, peer, Query::BgpAdvertised).await
}

async fn peer_routes(views: Shared, peer: Named, query: fn(IpAddr) -> Query) -> Response {
    match peer {
        Ok(Path(peer)) => match peer.parse() {
            Ok(address) => ask(views, query(address)).await,
            Err(_) => bad_request(format!("`{peer}` is not the address of a peer")),
        },
        Err(rejection) => bad_request(rejection.body_text()),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PolicyParameters {
    peer: IpAddr,
    direction: String,
    prefix: ipnet::IpNet,
    as_path: Option<String>,
    communities: Option<String>,
    next_hop: Option<IpAddr>,
}

async fn policy(
    State(views): State<Shared>,
    parameters: Result<Parameters<PolicyParameters>, QueryRejection>,
) -> Response {
    let parameters = match parameters {
        Ok(Parameters(parameters)) => parameters,
        Err(rejection) => return bad_request(rejection.body_text()),
    };
    match policy_question(parameters) {
        Ok(question) => ask(views, Query::BgpPolicy(question)).await,
        Err(why) => bad_request(why),
    }
}

fn policy_question(parameters: PolicyParameters) -> Result<PolicyQuestion, String> {
    let export = match parameters.direction.as_str() {
        "in" => false,
        "out" => true,
        other => return Err(format!("direction `{other}` is not in or out")),
    };
    let number = |text: &str| text.parse::<u32>().map_err(|_| format!("`{text}` is not an AS number"));
    let as_path = parameters.as_path.map(|path| path.split_whitespace().map(number).collect()).transpose()?;
    let communities = parameters.communities.unwrap_or_default();
    let communities = communities.split_whitespace().map(|text| text.parse().map_err(|why| format!("`{text}`: {why}")));
    Ok(PolicyQuestion {
        peer: parameters.peer,
        export,
        prefix: parameters.prefix.trunc(),
        as_path,
        communities: communities.collect::<Result<_, String>>()?,
        next_hop: parameters.next_hop,
    })
}

async fn scrape(State(views): State<Shared>) -> Response {
    match metrics::render(views.as_ref()).await {
        Ok(text) => ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response(),
        Err(error) => refuse(ViewError::Internal(format!("metrics cannot be written: {error}"))),
    }
}
