//! What each command does: which question it asks, and how the answer is shown.

use std::{
    io::{self, IsTerminal, Write},
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::{Value, json};

use super::{
    CheckedConfig, DEFAULT_CONFIG, DEFAULT_PINS, DEFAULT_SOCKET, Exit, Wiring,
    acl::{self, AclVerb},
    args::{
        BackendVerb, BgpVerb, Cli, Colour, Command, ConfigVerb, DescribeNoun, FlowArgs, FlowVerb, GetNoun, Global,
        HealthVerb, MapVerb, Output, ServiceVerb, ShowIp, ShowNoun, Which, XdpVerb,
    },
    change, client, describe,
    dns::{self, DnsVerb},
    flows::{self, Client},
    orders::{self, One, Order},
    sessions,
    table::{self, Column},
    views::{self, View},
};
use crate::model::{
    query::{Query, ServiceDetail},
    scope,
};

const WATCH_INTERVAL: Duration = Duration::from_secs(1);

/// What is to be shown.
#[derive(Debug)]
enum Show {
    Status,
    Services(Option<String>),
    Service(String),
    Backends(Option<String>),
    Backend(One),
    Health(Option<String>),
    HealthHistory(Option<String>),
    Flows(FlowArgs),
    FlowCount(Option<String>),
    FlowsOf(Client),
    Acl(Option<String>),
    Dns,
    DnsStats,
    DnsServers,
    BgpSummary,
    BgpPeers,
    BgpPeer(IpAddr),
    BgpRoutes(Option<String>),
    BgpPolicy(super::args::PolicyArgs),
    BgpReceived(Option<IpAddr>),
    BgpAdvertised(Option<IpAddr>),
    Routes,
    Maps,
    Audit,
    Map(String, usize),
    Xdp,
    Events,
    Reasons,
    Config,
}

pub(super) fn execute(cli: Cli, wiring: &Wiring<'_>) -> Exit {
    let global = &cli.global;
    let config = global.config.clone().unwrap_or_else(|| DEFAULT_CONFIG.into());
    let show = match cli.command {
        Command::Run => return (wiring.run)(&config),
        Command::Config { verb: ConfigVerb::Check } => return check(&config, wiring, global),
        Command::Config { verb: ConfigVerb::Import { from: super::args::ImportFrom::Frr, file } } => {
            return super::bgp::import_frr(&file);
        }
        Command::Config { verb: ConfigVerb::Schema } => {
            print(crate::config::SCHEMA);
            return Exit::Ok;
        }
        Command::Config {
            verb: ref verb @ (ConfigVerb::Diff { .. } | ConfigVerb::Commit { .. } | ConfigVerb::Rollback),
        } => {
            return with_source(global, wiring, |source| change::change(source, verb));
        }
        Command::Reload => return with_source(global, wiring, |source| change::ask(source, &Query::Reload, "applied")),
        Command::Acl { verb: Some(ref verb) } if acl::change(verb).is_some() => {
            return with_source(global, wiring, |source| change_acl(source, verb));
        }
        Command::Dns { verb: Some(ref verb) } if verb.order().is_some() => {
            return with_source(global, wiring, |source| ask_dns(source, verb));
        }
        Command::Capture(args) => return with_source(global, wiring, |source| capture(source, &args)),
        Command::Version => return with_source(global, wiring, version),
        Command::Flow { verb: Some(FlowVerb::Kill(args)) } => {
            return with_source(global, wiring, |source| flows::kill(source, &args));
        }
        Command::Backend { verb: Some(BackendVerb::Order(given)) } => {
            return with_source(global, wiring, |source| order(source, &given));
        }
        Command::Bgp {
            verb:
                Some(
                    verb @ (BgpVerb::Clear { .. }
                    | BgpVerb::Shutdown { .. }
                    | BgpVerb::Enable { .. }
                    | BgpVerb::Messages(_)),
                ),
        } => return with_source(global, wiring, |source| sessions::run(source, &verb)),
        Command::Show { noun: ShowNoun::Version } => return with_source(global, wiring, version),
        other => view_of(other),
    };
    let Some(show) = show else { return Exit::Usage };
    with_source(global, wiring, |source| if global.watch { watch(source, &show) } else { once(source, &show) })
}

/// What a command shows; `None` for those that show nothing, which [`execute`] has dealt with.
fn view_of(command: Command) -> Option<Show> {
    Some(match command {
        Command::Run
        | Command::Reload
        | Command::Capture(_)
        | Command::Version
        | Command::Config {
            verb:
                ConfigVerb::Check
                | ConfigVerb::Diff { .. }
                | ConfigVerb::Commit { .. }
                | ConfigVerb::Rollback
                | ConfigVerb::Import { .. }
                | ConfigVerb::Schema,
        } => return None,
        Command::Status => Show::Status,
        Command::Service { verb: Some(ServiceVerb::Describe { service }) } => Show::Service(service),
        Command::Service { verb: Some(ServiceVerb::List { service }) } => Show::Services(service),
        Command::Service { verb: None } => Show::Services(None),
        Command::Backend { verb: Some(BackendVerb::List { service }) } => Show::Backends(service),
        Command::Backend { verb: Some(BackendVerb::Describe(one)) } => Show::Backend(one),
        Command::Backend { verb: Some(BackendVerb::Order(_)) } => return None,
        Command::Backend { verb: None } => Show::Backends(None),
        Command::Health { verb: Some(HealthVerb::List { service }) } => Show::Health(service),
        Command::Health { verb: Some(HealthVerb::History { service }) } => Show::HealthHistory(service),
        Command::Health { verb: None } => Show::Health(None),
        Command::Flow { verb: Some(FlowVerb::List(args)) } => Show::Flows(args),
        Command::Flow { verb: Some(FlowVerb::Count { service }) } => Show::FlowCount(service),
        Command::Flow { verb: Some(FlowVerb::Get { client }) } => Show::FlowsOf(client),
        Command::Flow { verb: Some(FlowVerb::Kill(_)) } => return None,
        Command::Flow { verb: None } => Show::Flows(all_flows()),
        Command::Acl { verb: Some(AclVerb::List { service }) } => Show::Acl(service),
        Command::Acl { .. } => Show::Acl(None),
        Command::Dns { verb: Some(DnsVerb::Stats) } => Show::DnsStats,
        Command::Dns { verb: Some(DnsVerb::Servers) } => Show::DnsServers,
        Command::Dns { .. } => Show::Dns,
        Command::Bgp { verb } => return bgp(verb),
        Command::Route { .. } => Show::Routes,
        Command::Map { verb: Some(MapVerb::Dump(args)) } => Show::Map(args.name, args.limit),
        Command::Map { verb: Some(MapVerb::Audit) } => Show::Audit,
        Command::Map { .. } => Show::Maps,
        Command::Xdp { verb: Some(XdpVerb::Stats) } => Show::Reasons,
        Command::Xdp { .. } => Show::Xdp,
        Command::Events => Show::Events,
        Command::Config { verb: ConfigVerb::Show } => Show::Config,
        Command::Get { noun } => get(noun),
        Command::Describe { noun: DescribeNoun::Service { service } } => Show::Service(service),
        Command::Describe { noun: DescribeNoun::Backend(one) } => Show::Backend(one),
        Command::Describe { noun: DescribeNoun::Peer { address } } => Show::BgpPeer(address),
        Command::Show { noun } => return vtysh(noun),
    })
}

fn all_flows() -> FlowArgs {
    FlowArgs { service: None, limit: crate::model::query::DEFAULT_LIMIT }
}

fn bgp(verb: Option<BgpVerb>) -> Option<Show> {
    Some(match verb {
        None | Some(BgpVerb::Summary) => Show::BgpSummary,
        Some(BgpVerb::Peers) => Show::BgpPeers,
        Some(BgpVerb::Peer { address }) => Show::BgpPeer(address),
        Some(BgpVerb::Routes { which: None | Some(Which::Available), prefix }) => Show::BgpRoutes(prefix),
        Some(BgpVerb::Routes { which: Some(Which::Received { peer }), .. }) => Show::BgpReceived(peer),
        Some(BgpVerb::Routes { which: Some(Which::Advertised { peer }), .. }) => Show::BgpAdvertised(peer),
        Some(BgpVerb::Policy { verb: super::args::PolicyVerb::Test(question) }) => Show::BgpPolicy(question),
        // Those are no views.
        Some(BgpVerb::Clear { .. } | BgpVerb::Shutdown { .. } | BgpVerb::Enable { .. } | BgpVerb::Messages(_)) => {
            return None;
        }
    })
}

fn get(noun: GetNoun) -> Show {
    match noun {
        GetNoun::Services { service } => Show::Services(service),
        GetNoun::Backends { service } => Show::Backends(service),
        GetNoun::Flows(args) => Show::Flows(args),
        GetNoun::Dns => Show::Dns,
        GetNoun::Peers => Show::BgpSummary,
        GetNoun::Routes => Show::Routes,
        GetNoun::Maps => Show::Maps,
        GetNoun::Interfaces => Show::Xdp,
    }
}

fn vtysh(noun: ShowNoun) -> Option<Show> {
    Some(match noun {
        ShowNoun::Version => return None,
        ShowNoun::Bgp { verb } | ShowNoun::Ip { noun: ShowIp::Bgp { verb } } => return bgp(verb),
        ShowNoun::Ip { noun: ShowIp::Route } => Show::Routes,
        ShowNoun::RunningConfig => Show::Config,
        ShowNoun::Status => Show::Status,
        ShowNoun::Services => Show::Services(None),
        ShowNoun::Backends => Show::Backends(None),
        ShowNoun::Flows(args) => Show::Flows(args),
        ShowNoun::Interfaces => Show::Xdp,
    })
}

/// Where rows come from, and how they are to look.
pub(super) struct Source<'a> {
    pub global: &'a Global,
    wiring: &'a Wiring<'a>,
    socket: PathBuf,
    pins: PathBuf,
    colour: bool,
}

/// What went wrong, and what the shell is told.
pub(super) struct Failure {
    pub exit: Exit,
    pub message: String,
}

impl Failure {
    pub fn error(message: impl ToString) -> Self {
        Self { exit: Exit::Error, message: message.to_string() }
    }

    pub fn usage(message: impl ToString) -> Self {
        Self { exit: Exit::Usage, message: message.to_string() }
    }
}

pub(super) type Outcome<T> = Result<T, Failure>;

fn with_source(global: &Global, wiring: &Wiring<'_>, command: impl FnOnce(&Source<'_>) -> Outcome<Exit>) -> Exit {
    let outcome = Source::new(global, wiring).and_then(|source| command(&source));
    outcome.unwrap_or_else(|failure| {
        eprintln!("edge-ctl: {}", failure.message);
        failure.exit
    })
}

impl<'a> Source<'a> {
    fn new(global: &'a Global, wiring: &'a Wiring<'a>) -> Outcome<Self> {
        let configured = match &global.config {
            Some(file) => (wiring.check)(file).map_err(|lines| Failure {
                exit: Exit::Usage,
                message: format!("bad configuration\n{}", lines.join("\n")),
            })?,
            None => {
                CheckedConfig { socket: DEFAULT_SOCKET.into(), pin_path: DEFAULT_PINS.into(), ..Default::default() }
            }
        };
        let colour = match global.color {
            Colour::Always => true,
            Colour::Never => false,
            Colour::Auto => io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none(),
        };
        Ok(Self {
            global,
            wiring,
            socket: global.socket.clone().unwrap_or(configured.socket),
            pins: global.pin_path.clone().unwrap_or(configured.pin_path),
            colour,
        })
    }

    pub fn ask(&self, query: &Query) -> Outcome<Value> {
        if self.global.kernel {
            let answer = self.wiring.kernel.answer(&self.pins, query).map_err(Failure::error)?;
            return serde_json::to_value(answer).map_err(Failure::error);
        }
        client::ask(&self.socket, self.global.timeout, query).map_err(|error| {
            let invalid = matches!(&error, client::ClientError::Refused { status, .. } if status.as_u16() == 422);
            Failure { exit: if invalid { Exit::Usage } else { Exit::Error }, message: error.to_string() }
        })
    }

    pub fn rows(&self, query: &Query) -> Outcome<Vec<Value>> {
        match self.ask(query)? {
            Value::Array(rows) => Ok(rows),
            one => Ok(vec![one]),
        }
    }
}

/// Text to print, and what the shell is told.
pub(super) type Shown = (String, Exit);

fn once(source: &Source<'_>, show: &Show) -> Outcome<Exit> {
    let (text, exit) = shown(source, show)?;
    print(&text);
    Ok(exit)
}

/// Repaints on change; an error is shown in place of the rows, since the daemon may come back.
fn watch(source: &Source<'_>, show: &Show) -> Outcome<Exit> {
    let clear = if io::stdout().is_terminal() { "\x1b[H\x1b[2J\x1b[3J" } else { "" };
    let mut last = None;
    loop {
        let text = match shown(source, show) {
            Ok((text, _)) => text,
            Err(failure) if failure.exit == Exit::Usage => return Err(failure),
            Err(failure) => format!("{}\n", failure.message),
        };
        if last.as_ref() != Some(&text) {
            if !print(&format!("{clear}{text}")) {
                return Ok(Exit::Ok);
            }
            last = Some(text);
        }
        std::thread::sleep(WATCH_INTERVAL);
    }
}

/// False where nobody reads any more (`edge-ctl ... | head`).
pub(super) fn print(text: &str) -> bool {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).is_ok()
}

fn shown(source: &Source<'_>, show: &Show) -> Outcome<Shown> {
    let list = |view: &'static View, query: &Query| rows(source, view, source.rows(query)?);
    let of_service = |view: &'static View, query: &Query, key: &str, service: &Option<String>| {
        let mut found = source.rows(query)?;
        if let Some(service) = service {
            found.retain(|row| row.get(key).and_then(Value::as_str) == Some(service));
            if found.is_empty() {
                return Err(Failure::error(format!("there is nothing of a service `{service}`")));
            }
        }
        rows(source, view, found)
    };
    match show {
        Show::Status => status(source),
        Show::Services(service) => of_service(&views::SERVICES, &Query::Services, "name", service),
        Show::Service(name) => service(source, name),
        Show::Backends(service) => of_service(&views::BACKENDS, &Query::Backends, "service", service),
        Show::Backend(one) => backend(source, one),
        Show::Health(service) => of_service(&views::HEALTH, &Query::Health, "service", service),
        Show::HealthHistory(service) => of_service(&views::HEALTH_HISTORY, &Query::HealthHistory, "service", service),
        Show::Flows(FlowArgs { service, limit }) => {
            list(&views::FLOWS, &Query::Flows { service: service.clone(), limit: *limit })
        }
        Show::FlowCount(service) => of_service(&views::FLOW_COUNTS, &Query::Services, "name", service),
        Show::FlowsOf(client) => flows::of_client(source, client),
        Show::Acl(service) => of_service(&views::ACL, &Query::Acl, "service", service),
        Show::Dns => list(&views::DNS, &Query::Dns),
        Show::DnsStats => rows(source, &views::DNS_STATS, dns::flat_stats(source.rows(&Query::DnsZones)?)),
        Show::DnsServers => rows(source, &views::DNS_SERVERS, dns::flat_servers(source.rows(&Query::DnsZones)?)),
        Show::BgpSummary => list(&views::BGP_SUMMARY, &Query::BgpPeers),
        Show::BgpPeers => list(&views::BGP_PEERS, &Query::BgpPeers),
        Show::BgpPeer(address) => peer(source, *address),
        Show::BgpRoutes(prefix) => super::bgp::routes(source, prefix.as_deref()),
        Show::BgpPolicy(question) => super::bgp::policy(source, question),
        Show::BgpReceived(peer) => peer_routes(source, *peer, Query::BgpReceived),
        Show::BgpAdvertised(peer) => peer_routes(source, *peer, Query::BgpAdvertised),
        Show::Routes => routes(source),
        Show::Maps => list(&views::MAPS, &Query::Maps),
        Show::Audit => audit(source),
        Show::Map(name, limit) => list(&views::MAP_ENTRIES, &Query::Map { name: name.clone(), limit: *limit }),
        Show::Xdp => list(&views::XDP, &Query::Xdp),
        Show::Events => list(&views::EVENTS, &Query::Events),
        Show::Reasons => list(&views::REASONS, &Query::Reasons),
        Show::Config => configuration(source),
    }
}

/// Rows of a view in the format asked for.
pub(super) fn rows(source: &Source<'_>, view: &View, mut rows: Vec<Value>) -> Outcome<Shown> {
    if let Some(name) = &source.global.sort_by {
        table::sort(view.columns, &mut rows, name).map_err(|message| Failure { exit: Exit::Usage, message })?;
    }
    let text = match source.global.output {
        Output::Table | Output::Wide => {
            let wide = source.global.output == Output::Wide;
            let columns: Vec<&Column> = view.columns.iter().filter(|column| wide || !column.wide).collect();
            let alarms = source.colour.then_some(views::is_alarming as fn(&str) -> bool);
            table::render(&columns, &rows, !source.global.no_headers, alarms)
        }
        _ => structured(source.global.output, view, &rows)?,
    };
    Ok((text, Exit::Ok))
}

/// JSON, YAML, or names.
fn structured(output: Output, view: &View, rows: &[Value]) -> Outcome<String> {
    match output {
        Output::Yaml => serde_norway::to_string(rows).map_err(Failure::error),
        Output::Name => Ok(rows.iter().map(|row| format!("{}\n", name_of(view, row))).collect()),
        Output::Json | Output::Table | Output::Wide => {
            serde_json::to_string_pretty(rows).map(|text| text + "\n").map_err(Failure::error)
        }
    }
}

fn name_of(view: &View, row: &Value) -> String {
    let names: Vec<_> = view.names.iter().filter_map(|key| row.get(*key)).map(table::plain).collect();
    format!("{}/{}", view.kind, names.join("/"))
}

/// One object, as text that `pretty` makes of it or in the structured format asked for.
pub(super) fn single(source: &Source<'_>, view: &View, row: Value, pretty: fn(&Value) -> String) -> Outcome<String> {
    match source.global.output {
        Output::Table | Output::Wide => Ok(pretty(&row)),
        output => structured(output, view, &[row]),
    }
}

static EDGE: View = View { kind: "edge", names: &["pid"], columns: &[] };
pub(super) static CONFIG: View = View { kind: "config", names: &["file"], columns: &[] };

fn status(source: &Source<'_>) -> Outcome<Shown> {
    let row = source.ask(&Query::Status)?;
    let healthy = row.get("state").and_then(Value::as_str) == Some("ok");
    let text = single(source, &EDGE, row, describe::status)?;
    Ok((text, if healthy { Exit::Ok } else { Exit::Degraded }))
}

fn service(source: &Source<'_>, name: &str) -> Outcome<Shown> {
    let services = serde_json::from_value(source.ask(&Query::Services)?).map_err(Failure::error)?;
    let backends = serde_json::from_value(source.ask(&Query::Backends)?).map_err(Failure::error)?;
    let detail = ServiceDetail::pick(name, services, backends)
        .ok_or_else(|| Failure::error(format!("there is no service `{name}`; `edge-ctl service list` names them")))?;
    let detail = serde_json::to_value(detail).map_err(Failure::error)?;
    Ok((single(source, &views::SERVICES, detail, describe::service)?, Exit::Ok))
}

/// The rows of one backend: one for each listen address of its service.
fn rows_of(source: &Source<'_>, one: &One) -> Outcome<Vec<Value>> {
    let mut found = source.rows(&Query::Backends)?;
    let address = one.backend.to_string();
    let text = |row: &Value, key: &str| row.get(key).and_then(Value::as_str).map(str::to_owned);
    found.retain(|row| {
        text(row, "service").as_ref() == Some(&one.service) && text(row, "backend").as_ref() == Some(&address)
    });
    Ok(found)
}

fn backend(source: &Source<'_>, one: &One) -> Outcome<Shown> {
    let found = rows_of(source, one)?;
    if found.is_empty() {
        let message =
            format!("service `{}` has no backend {}; `edge-ctl backend list` names them", one.service, one.backend);
        return Err(Failure::error(message));
    }
    let text = match source.global.output {
        Output::Table | Output::Wide => found.iter().map(describe::backend).collect(),
        output => structured(output, &views::BACKENDS, &found)?,
    };
    Ok((text, Exit::Ok))
}

fn order(source: &Source<'_>, given: &Order) -> Outcome<Exit> {
    if source.global.kernel {
        let message = "an order is for the daemon; `--kernel` only reads".into();
        return Err(Failure { exit: Exit::Usage, message });
    }
    let mut found = source.rows(&given.query())?;
    if let Some(one) = given.awaited() {
        // A backend that has left the maps has no flows either.
        while found.iter().any(|row| row.get("state").and_then(Value::as_str) != Some("drained")) {
            std::thread::sleep(orders::LOOK);
            found = rows_of(source, one)?;
        }
    }
    print(&rows(source, &views::BACKENDS, found)?.0);
    Ok(Exit::Ok)
}

fn peer(source: &Source<'_>, address: IpAddr) -> Outcome<Shown> {
    let found = source.rows(&Query::BgpPeers)?.into_iter().find(|row| neighbour(row) == Some(address));
    let row = found
        .ok_or_else(|| Failure::error(format!("there is no peer {address}; `edge-ctl bgp summary` lists them")))?;
    Ok((single(source, &views::BGP_PEERS, row, describe::peer)?, Exit::Ok))
}

fn neighbour(row: &Value) -> Option<IpAddr> {
    scope::parse(row.get("neighbor").and_then(Value::as_str)?).ok()
}

/// Of one peer, or of all of them one after the other.
fn peer_routes(source: &Source<'_>, peer: Option<IpAddr>, query: fn(IpAddr) -> Query) -> Outcome<Shown> {
    let peers = match peer {
        Some(peer) => vec![peer],
        None => source.rows(&Query::BgpPeers)?.iter().filter_map(neighbour).collect(),
    };
    let mut all = Vec::new();
    for peer in peers {
        all.append(&mut source.rows(&query(peer))?);
    }
    rows(source, &views::BGP_ROUTES, all)
}

/// As vtysh prints them; `-o wide` has them in columns.
fn routes(source: &Source<'_>) -> Outcome<Shown> {
    let mut found = source.rows(&Query::Routes)?;
    if source.global.output != Output::Table {
        return rows(source, &views::ROUTES, found);
    }
    if let Some(name) = &source.global.sort_by {
        table::sort(views::ROUTES.columns, &mut found, name)
            .map_err(|message| Failure { exit: Exit::Usage, message })?;
    }
    Ok((describe::routes(&found, !source.global.no_headers), Exit::Ok))
}

fn configuration(source: &Source<'_>) -> Outcome<Shown> {
    let row = source.ask(&Query::Config)?;
    let text = |row: &Value| format!("{}\n", row.get("text").and_then(Value::as_str).unwrap_or_default().trim_end());
    Ok((single(source, &CONFIG, row, text)?, Exit::Ok))
}

/// Nothing to show is how it should be; with a difference, the exit code of what is degraded.
fn audit(source: &Source<'_>) -> Outcome<Shown> {
    let found = source.rows(&Query::Audit)?;
    let exit = if found.is_empty() { Exit::Ok } else { Exit::Degraded };
    let (text, _) = rows(source, &views::AUDIT, found)?;
    Ok((text, exit))
}

fn change_acl(source: &Source<'_>, verb: &AclVerb) -> Outcome<Exit> {
    if source.global.kernel {
        return Err(Failure {
            exit: Exit::Usage,
            message: "`acl` changes are for the daemon; `--kernel` only reads".into(),
        });
    }
    let Some(query) = acl::change(verb) else { return Ok(Exit::Usage) };
    let (text, exit) = rows(source, &views::ACL, source.rows(&query)?)?;
    print(&text);
    Ok(exit)
}

fn ask_dns(source: &Source<'_>, verb: &DnsVerb) -> Outcome<Exit> {
    if source.global.kernel {
        let message = "`dns query` and `dns refresh` are for the daemon; `--kernel` only reads maps".into();
        return Err(Failure { exit: Exit::Usage, message });
    }
    let Some(query) = verb.order() else { return Ok(Exit::Usage) };
    let view = if matches!(verb, DnsVerb::Query { .. }) { &views::DNS_RECORDS } else { &views::DNS };
    let (text, exit) = rows(source, view, source.rows(&query)?)?;
    print(&text);
    Ok(exit)
}

/// Copies packets until told to stop, and says on standard error how many.
fn capture(source: &Source<'_>, args: &super::capture::CaptureArgs) -> Outcome<Exit> {
    if source.global.kernel {
        return Err(Failure { exit: Exit::Usage, message: "`capture` needs the daemon; `--kernel` only reads".into() });
    }
    let tap = (source.wiring.tap)(&source.pins).map_err(Failure::error)?;
    let ask = |order| source.ask(&Query::Capture(order)).map(drop).map_err(|failure| failure.message);
    let (packets, lost) = super::capture::run(args, tap, ask).map_err(Failure::error)?;
    eprintln!("{packets} packets written, {lost} lost");
    Ok(Exit::Ok)
}

/// This program's version, and the daemon's where one answers.
fn version(source: &Source<'_>) -> Outcome<Exit> {
    let own = env!("CARGO_PKG_VERSION");
    let status = if source.global.kernel { None } else { source.ask(&Query::Status).ok() };
    let daemon = status.as_ref().and_then(|row| row.get("version")).cloned().unwrap_or(Value::Null);
    let pretty = |row: &Value| {
        let part = |key| row.get(key).map(table::plain).unwrap_or_default();
        format!("edge-ctl {}\ndaemon   {}\n", part("edge_ctl"), part("daemon"))
    };
    print(&single(source, &EDGE, json!({"edge_ctl": own, "daemon": daemon}), pretty)?);
    Ok(Exit::Ok)
}

fn check(file: &Path, wiring: &Wiring<'_>, global: &Global) -> Exit {
    match (wiring.check)(file) {
        Ok(checked) => {
            print(&checked_text(file, &checked, global.output == Output::Wide));
            for warning in &checked.warnings {
                eprintln!("warning: {warning}");
            }
            Exit::Ok
        }
        Err(lines) => {
            for line in &lines {
                eprintln!("{line}");
            }
            let faults = if lines.len() == 1 { "1 fault".to_owned() } else { format!("{} faults", lines.len()) };
            eprintln!("{}: {faults}; nothing was changed", file.display());
            Exit::Usage
        }
    }
}

fn checked_text(file: &Path, checked: &CheckedConfig, each_map: bool) -> String {
    let total: u64 = checked.memory.iter().map(|(_, _, bytes)| bytes).sum();
    let mut text = format!("{}: ok\n  {}\n", file.display(), checked.summary);
    text.push_str(&format!("  memory of the maps: {}B\n", table::bytes(total as f64)));
    let mut maps: Vec<_> = checked.memory.iter().collect();
    maps.sort_by_key(|(_, _, bytes)| std::cmp::Reverse(*bytes));
    let shown = if each_map { maps.len() } else { 3 };
    for (name, entries, bytes) in maps.into_iter().take(shown) {
        text.push_str(&format!("    {name:<16}{entries:>10} entries{:>10}B\n", table::bytes(*bytes as f64)));
    }
    text
}
