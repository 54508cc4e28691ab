//! What the views show of names, resolvers and servers.

use std::{collections::BTreeMap, net::IpAddr};

use hickory_resolver::proto::rr::{Name, RecordType as WireType};
use tokio::time::Instant;

use super::{Counts, DnsHandle, Question, Shared};
use crate::model::{
    PoolState, RecordType,
    query::ViewError,
    view::{DnsRecordRow, DnsRow, DnsServerRow, DnsZoneRow},
};

impl DnsHandle {
    /// One row for each name and record type.
    pub fn rows(&self) -> Vec<DnsRow> {
        self.book().tasks.iter().map(|(question, task)| row(question, &task.shared)).collect()
    }

    /// One row for each resolver, in NGINX Plus's classes.
    pub fn zones(&self) -> Vec<DnsZoneRow> {
        let book = self.book();
        let row = |(name, zone): (&String, &std::sync::Arc<super::Zone>)| DnsZoneRow {
            resolver: name.clone(),
            requests: by_type(&zone.counts()),
            responses: zone.counts().by_class(),
            servers: zone
                .servers()
                .list
                .iter()
                .map(|one| DnsServerRow {
                    source: if zone.is_followed(one.address) { "followed" } else { "configured" }.to_owned(),
                    ..server(one)
                })
                .collect(),
        };
        book.zones.iter().map(row).collect()
    }

    /// Asks a resolver for a name, or for the name of an address, and tells what it said. Pools are not touched.
    ///
    /// # Errors
    /// Where there is no such resolver or name, or nobody answers.
    pub async fn look_up(
        &self,
        name: &str,
        record: Option<RecordType>,
        resolver: Option<&str>,
    ) -> Result<Vec<DnsRecordRow>, ViewError> {
        let zone = {
            let book = self.book();
            let named = book.tasks.keys().find(|question| super::same_name(&question.name, name));
            let chosen = resolver.or(named.map(|question| question.resolver.as_str()));
            let found = match chosen {
                Some(resolver) => book.zones.get_key_value(resolver),
                None => book.zones.iter().next(),
            };
            let found = found.map(|(name, zone)| (name.clone(), std::sync::Arc::clone(zone)));
            found.ok_or_else(|| {
                let known: Vec<&str> = book.zones.keys().map(String::as_str).collect();
                let wanted = chosen.unwrap_or("(any)");
                ViewError::NotFound(format!("no service uses a resolver `{wanted}`; used are: {}", known.join(", ")))
            })?
        };
        let (wire, asked) = match (name.parse::<IpAddr>(), record) {
            (Ok(address), _) => (WireType::PTR, Name::from(address)),
            (Err(_), record) => {
                let wire = match record.unwrap_or_default() {
                    RecordType::A => WireType::A,
                    RecordType::Aaaa => WireType::AAAA,
                    RecordType::Srv => WireType::SRV,
                };
                let text = format!("{}.", name.trim_end_matches('.'));
                let bad = |error| ViewError::Invalid(vec![format!("`{name}` is not a DNS name: {error}")]);
                (wire, Name::from_ascii(text).map_err(bad)?)
            }
        };
        let (resolver, zone) = zone;
        let failed = |reason| ViewError::Unavailable(format!("resolver {resolver}, {wire} {asked}: {reason}"));
        let records = zone.look_up(&asked, wire).await.map_err(failed)?;
        let row = |found: super::query::Found| DnsRecordRow {
            name: found.name,
            kind: found.kind,
            ttl: found.ttl,
            data: found.data,
            resolver: resolver.clone(),
        };
        Ok(records.into_iter().map(row).collect())
    }
}

/// Requests as NGINX Plus counts them: addresses of names, SRV records, names of addresses.
fn by_type(counts: &Counts) -> BTreeMap<String, u64> {
    let sum = |kinds: &[&str]| kinds.iter().filter_map(|kind| counts.requests.get(kind)).sum();
    [("name", sum(&["A", "AAAA"])), ("srv", sum(&["SRV"])), ("addr", sum(&["PTR"]))]
        .map(|(name, count)| (name.to_owned(), count))
        .into()
}

fn server(server: &super::query::Server) -> DnsServerRow {
    let state = server.state();
    DnsServerRow {
        server: server.address.to_string(),
        state: match (state.failures, state.answered) {
            (0, None) => "not asked",
            (0, Some(_)) => "up",
            _ => "failing",
        }
        .to_owned(),
        failures: state.failures,
        age: state.answered.map(|at| at.elapsed().as_secs()),
        took_ms: state.took.map(|took| took.as_secs_f64() * 1000.0),
        error: state.error.clone(),
        requests: state.counts.requests.values().sum(),
        responses: state.counts.by_class(),
        source: String::new(),
    }
}

fn row(question: &Question, shared: &Shared) -> DnsRow {
    let state = shared.state();
    let now = shared.started.elapsed();
    let age = |since| now.saturating_sub(since).as_secs();
    let tracker = &state.tracker;
    let address = |address: std::net::SocketAddr| match question.record {
        RecordType::Srv => address.to_string(),
        RecordType::A | RecordType::Aaaa => address.ip().to_string(),
    };
    let pool = tracker.pool();
    let held = tracker.held();
    let counts = tracker.counts();
    DnsRow {
        name: question.name.clone(),
        kind: question.record.to_string(),
        resolver: question.resolver.clone(),
        addresses: pool.members.iter().map(|member| address(member.address)).collect(),
        state: match (&pool.state, held) {
            (PoolState::Unknown, _) => "unknown",
            (PoolState::Fresh, _) => "fresh",
            (PoolState::LastGood { .. }, Some(_)) => "held",
            (PoolState::LastGood { .. }, None) => "last-good",
        }
        .to_owned(),
        age: tracker.last_good().map(age),
        next: state.next_at.map(|at| at.saturating_duration_since(Instant::now()).as_secs()),
        error: tracker.error().map(str::to_owned),
        requests: state.counts.requests.values().sum(),
        responses: state.counts.by_class(),
        refused_addresses: counts.refused,
        held: held.map(|held| held.reason.clone()),
        held_age: held.map(|held| age(held.since)),
        held_addresses: held.iter().flat_map(|held| &held.kept).map(|kept| address(*kept)).collect(),
        refused: tracker
            .refused()
            .iter()
            .map(|(address, (refusal, since))| format!("{address}: {refusal}, {} s", age(*since)))
            .collect(),
        changes: counts.changes,
        holds: counts.holds,
    }
}
