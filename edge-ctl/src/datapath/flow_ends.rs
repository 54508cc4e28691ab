//! Ends flows on order: those of a backend that went down (`on_down`), and those that an operator names (`flow kill`).
//!
//! A flow ends as an idle one does in [`sweep`](super::sweep): both halves leave the table and the flow is counted as
//! expired. Nothing is sent. A TCP connection's next packet finds no flow and goes to the stack, which holds the VIP and
//! answers with RST (RFC 9293 section 3.10.7.1); a datagram starts a new flow. The tables are walked in bounded steps.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use aya::maps::{Array, HashMap, MapData};
use edge_common::{
    flow::FlowKeyV4,
    maps::{FlowEnd, FlowV4, ServiceEntry, events::End, name, service_flag},
};

use super::{
    cache::FlowCache,
    pins::{Pins, open},
    sweep::{Ended, FORWARD, add, end},
    sys::{Cursor, from_bytes},
    tables::Tables,
};
use crate::{
    model::{FlowSelector, Protocol},
    reconcile::ports::{PortError, socket_address},
};

/// What a walk looks at, in this order: a half-open flow may become established during the walk, and never the reverse.
const TABLES: [&str; 2] = [name::HALF_OPEN, name::ESTABLISHED];

/// Flows to be ended, by the numbers that the maps know. Found again for each walk, since numbers are given out anew.
#[derive(Clone, Debug, Default)]
struct Wanted {
    /// Backend numbers.
    backends: BTreeSet<u32>,
    protocol: Option<u8>,
}

/// One walk over the tables.
#[derive(Debug, Default)]
pub struct Walk {
    wanted: Option<Wanted>,
    recorded: BTreeSet<u32>,
    table: usize,
    cursor: Cursor,
    /// Flows ended so far, half-open ones included.
    pub ended: u64,
}

/// How far a walk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// A backend of the order may still be given flows; nothing was done.
    Waits,
    /// There is more to look at.
    Goes,
    /// The end of the tables was reached.
    Done,
}

/// See the module.
pub struct FlowEnder {
    tables: Tables,
    established: HashMap<MapData, FlowKeyV4, FlowV4>,
    half_open: HashMap<MapData, FlowKeyV4, FlowV4>,
    service_expired: Array<MapData, u64>,
    backend_expired: Array<MapData, u64>,
    cache: Arc<FlowCache>,
    ended: Vec<FlowEnd>,
}

impl FlowEnder {
    /// Opens the pins.
    ///
    /// # Errors
    /// Where one is missing.
    pub fn open(pins: &Pins, cache: Arc<FlowCache>) -> Result<Self, PortError> {
        Ok(Self {
            tables: Tables::open(pins)?,
            established: open(pins, name::ESTABLISHED)?,
            half_open: open(pins, name::HALF_OPEN)?,
            service_expired: open(pins, name::SERVICE_EXPIRED)?,
            backend_expired: open(pins, name::BACKEND_EXPIRED)?,
            cache,
            ended: Vec::new(),
        })
    }

    /// Records of the flows ended since the last call, of services whose ends are reported.
    pub fn take_ended(&mut self) -> Vec<FlowEnd> {
        std::mem::take(&mut self.ended)
    }

    /// Looks at about `budget` entries and ends those that `selector` means. With `excluded` only once the maps give the
    /// backends of the order no new flows, since a datagram would start its flow with the same backend again.
    ///
    /// # Errors
    /// Where a map cannot be read or written; the next step goes on from there.
    pub fn step(
        &mut self,
        selector: &FlowSelector,
        excluded: bool,
        walk: &mut Walk,
        budget: usize,
    ) -> Result<Progress, PortError> {
        if walk.wanted.is_none() {
            let Some(wanted) = self.wanted(selector, excluded)? else { return Ok(Progress::Waits) };
            if wanted.backends.is_empty() {
                return Ok(Progress::Done);
            }
            walk.recorded = self.recorded()?;
            walk.wanted = Some(wanted);
        }
        let (Some(wanted), Some(table)) = (&walk.wanted, TABLES.get(walk.table)) else { return Ok(Progress::Done) };
        let reader = self.tables.reader(table)?;
        let page = reader.page(&mut walk.cursor, budget)?;
        let (mut services, mut backends) = (BTreeMap::new(), BTreeMap::new());
        let counts = *table == name::ESTABLISHED;
        for (_, value) in page.iter(reader.shape) {
            let Some(flow) = from_bytes::<FlowV4>(value) else { continue };
            let is_meant = flow.direction == FORWARD
                && wanted.backends.contains(&flow.backend)
                && wanted.protocol.is_none_or(|protocol| protocol == flow.key.protocol)
                && is_of(selector, &flow);
            if !is_meant {
                continue;
            }
            let mut record = FlowEnd::default();
            let (map, cache) =
                if counts { (&mut self.established, Some(&*self.cache)) } else { (&mut self.half_open, None) };
            if end(map, cache, &flow, |_| true, &mut record)? != Ended::Flow {
                continue;
            }
            walk.ended += 1;
            if counts {
                *services.entry(flow.service).or_insert(0_u64) += 1;
                *backends.entry(flow.backend).or_insert(0_u64) += 1;
                if walk.recorded.contains(&flow.service) {
                    record.end = End::Killed as u8;
                    self.ended.push(record);
                }
            }
        }
        add(&mut self.service_expired, &services)?;
        add(&mut self.backend_expired, &backends)?;
        if walk.cursor.is_finished() {
            walk.table += 1;
            walk.cursor = Cursor::default();
        }
        Ok(if walk.table < TABLES.len() { Progress::Goes } else { Progress::Done })
    }

    fn wanted(&self, selector: &FlowSelector, excluded: bool) -> Result<Option<Wanted>, PortError> {
        let state = self.tables.numbered()?;
        let mut wanted = Wanted { backends: BTreeSet::new(), protocol: selector.protocol.map(Protocol::number) };
        for (number, slot) in state.backends.iter() {
            let is_named = state.services.get(&slot.entry.service).is_some_and(|s| s.label == selector.service);
            let is_meant = is_named && selector.backend.is_none_or(|backend| backend == slot.address());
            if is_meant && excluded && slot.eligible() {
                return Ok(None);
            }
            if is_meant {
                wanted.backends.insert(*number);
            }
        }
        Ok(Some(wanted))
    }

    /// Services whose ended flows are reported.
    fn recorded(&self) -> Result<BTreeSet<u32>, PortError> {
        let is_recorded = |entry: &ServiceEntry| entry.flags & service_flag::RECORD_ENDS != 0;
        let services = self.tables.services()?;
        Ok(services.iter().filter(|(_, entry)| is_recorded(entry)).map(|(number, _)| *number).collect())
    }
}

/// True where the flow's client is the one meant.
fn is_of(selector: &FlowSelector, flow: &FlowV4) -> bool {
    let Some((address, port)) = selector.client else { return true };
    let client = socket_address(flow.key.src, flow.key.src_port);
    client.ip() == address && port.is_none_or(|port| port == client.port())
}
