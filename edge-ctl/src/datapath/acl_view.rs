//! Source ranges as the maps hold them: a service's listen addresses in one row.

use std::collections::BTreeMap;

use edge_common::maps::range_action;

use super::tables::Tables;
use crate::{
    model::query::AclRow,
    reconcile::{ports::PortError, protect::range_of},
};

/// One row for each range of each service. Where they come from and how long they last the maps do not know.
///
/// # Errors
/// Where a map cannot be read.
pub fn acl_rows(tables: &Tables) -> Result<Vec<AclRow>, PortError> {
    let services = tables.state()?.services;
    let mut rows: BTreeMap<_, AclRow> = BTreeMap::new();
    for (key, range) in tables.ranges()? {
        let Some(prefix) = range_of(&key) else { continue };
        let service = services.get(&key.source.service).map_or("-", |slot| &slot.label).to_owned();
        let row = rows.entry((service.clone(), prefix)).or_insert_with(|| AclRow {
            service,
            prefix: prefix.to_string(),
            action: if range.action == range_action::ALLOW { "allow" } else { "deny" }.to_owned(),
            source: "-".to_owned(),
            ..AclRow::default()
        });
        row.hits = row.hits.saturating_add(range.hits);
    }
    Ok(rows.into_values().collect())
}
