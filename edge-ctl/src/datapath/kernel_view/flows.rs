//! The flows in the tables as rows, both directions in one.

use std::collections::BTreeMap;

use edge_common::{
    address::{Address, Wide},
    flow::FlowKey,
    maps::{Flow, Slot, name},
};

use super::{KernelView, protocol_name};
use crate::{
    datapath::{
        cache::Part,
        sys::{Cursor, from_bytes, monotonic_ns},
    },
    model::view::FlowRow,
    reconcile::ports::{PortError, socket_address},
};

/// Entries read in one call where a list is limited.
const PAGE: usize = 1024;
/// `conntrack::Direction` of packets from the client.
const FORWARD: u8 = 0;

impl KernelView {
    /// At most `limit` flows, of one service where it is named, established ones first; both directions in one row.
    ///
    /// # Errors
    /// Where a map cannot be read.
    pub fn flow_rows(&self, service: Option<&str>, limit: usize) -> Result<Vec<FlowRow>, PortError> {
        let mut labels = self.tables.labels()?;
        let services = self.tables.services()?;
        labels.retain(|number, _| services.contains_key(number));
        let now = monotonic_ns();
        let mut rows = Vec::new();
        let wanted = Wanted { labels: &labels, service, limit, now };
        for (v4, v6, state) in [
            (name::ESTABLISHED, name::ESTABLISHED_V6, "established"),
            (name::HALF_OPEN, name::HALF_OPEN_V6, "half-open"),
            (name::CLOSING, name::CLOSING_V6, "closing"),
        ] {
            self.add_flow_rows::<u32>(v4, state, &wanted, &mut rows)?;
            self.add_flow_rows::<Wide>(v6, state, &wanted, &mut rows)?;
        }
        Ok(rows)
    }

    fn add_flow_rows<A: Part>(
        &self,
        table: &str,
        state: &str,
        wanted: &Wanted<'_>,
        rows: &mut Vec<FlowRow>,
    ) -> Result<(), PortError>
    where
        FlowKey<A>: aya::Pod,
        Flow<A>: aya::Pod,
        Slot<A>: aya::Pod,
    {
        let reader = self.tables.reader(table)?;
        let mut cursor = Cursor::default();
        while !cursor.is_finished() && rows.len() < wanted.limit {
            for (_, value) in reader.page(&mut cursor, PAGE)?.iter(reader.shape) {
                let Some(mut flow) = from_bytes::<Flow<A>>(value) else { continue };
                let label = wanted.labels.get(&flow.service).cloned().unwrap_or_else(|| "-".to_owned());
                let is_wanted = flow.direction == FORWARD && wanted.service.is_none_or(|wanted| wanted == label);
                if is_wanted && rows.len() < wanted.limit {
                    let mut twin = self.tables.lookup::<FlowKey<A>, Flow<A>>(table, &flow.twin())?.unwrap_or_default();
                    if state == "established" {
                        self.cache.tell(&mut flow);
                        self.cache.tell(&mut twin);
                    }
                    rows.push(flow_row(label, state, &flow, &twin, wanted.now));
                }
            }
        }
        Ok(())
    }
}

/// Which flows a listing is about.
struct Wanted<'a> {
    labels: &'a BTreeMap<u32, String>,
    service: Option<&'a str>,
    limit: usize,
    now: u64,
}

fn flow_row<A: Address>(service: String, state: &str, flow: &Flow<A>, twin: &Flow<A>, now: u64) -> FlowRow {
    let seconds = |since: u64| now.saturating_sub(since) / 1_000_000_000;
    FlowRow {
        service,
        proto: protocol_name(flow.key.protocol),
        client: socket_address(flow.key.src, flow.key.src_port).to_string(),
        vip: socket_address(flow.key.dst, flow.key.dst_port).to_string(),
        snat: socket_address(flow.new_src, flow.new_src_port).to_string(),
        backend: socket_address(flow.new_dst, flow.new_dst_port).to_string(),
        state: state.to_owned(),
        packets_in: flow.packets,
        bytes_in: flow.bytes,
        packets_out: twin.packets,
        bytes_out: twin.bytes,
        age: seconds(flow.created),
        idle: seconds(flow.last_seen.max(twin.last_seen)),
    }
}
