//! How full the SNAT ports are: for each source address and backend, the ports that flows hold, out of those that the
//! service may use. A port is held where the program's own rule says so (`claim` in edge-ebpf): by an established flow, by
//! a closed one that has not rested yet, and by a handshake that has not stalled.
//!
//! The tables are read page by page: the established one by the sweep, which hands its entries over, the other two here.
//! Services that share a backend share its ports, so ports are kept by tuple and counted for each service at the end.

use std::collections::BTreeMap;

use edge_common::{
    address::{Address, Wide, is_none},
    conntrack::{expired, rest_seconds},
    maps::{ANY_PORT, Flow, FlowV4, FlowV6, PortSet, ServiceEntry, mode, name},
};

use super::{
    sys::{Cursor, from_bytes},
    tables::Tables,
};
use crate::reconcile::ports::PortError;

/// `conntrack::Direction` of packets from the client.
const FORWARD: u8 = 0;
/// As in edge-ebpf's `create`: a client that is silent for longer in its handshake may lose its port, ns.
const STALLED: u64 = 200_000_000;
/// How long a closed flow rests whose service is gone, seconds.
const NO_SERVICE_REST: u32 = 60;
/// The tables that are read here.
const TABLES: [&str; 4] = [name::HALF_OPEN, name::CLOSING, name::HALF_OPEN_V6, name::CLOSING_V6];

/// Whose port space it is: backend, protocol and SNAT address, in network order. A port of it serves one flow at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Space {
    backend: Wide,
    port: u16,
    protocol: u8,
    address: Wide,
}

/// Ports of one SNAT address towards one backend, as a service may use them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SnatUse {
    /// Service number.
    pub service: u32,
    /// Backend number.
    pub backend: u32,
    /// The source address, network order.
    pub address: Wide,
    /// Ports of the range in use, by whichever service.
    pub used: u32,
    /// Ports that the range and the host leave to SNAT.
    pub allowed: u32,
}

/// One walk over the flow tables.
#[derive(Debug, Default)]
pub struct Census {
    /// Which of the walk's tables is being read; past the last: done.
    table: usize,
    cursor: Cursor,
    /// Ports in use, host order; one may be listed twice while its flow moves between tables.
    ports: BTreeMap<Space, Vec<u16>>,
    /// Seconds that closed flows rest, by service number.
    rests: BTreeMap<u32, u32>,
    entries: BTreeMap<&'static str, u64>,
}

impl Census {
    /// A new walk.
    pub fn begin(services: &BTreeMap<u32, ServiceEntry>) -> Self {
        let rests = services.iter().map(|(number, entry)| (*number, entry.closing_timeout)).collect();
        Self { rests, ..Self::default() }
    }

    /// True once all tables were read to their ends.
    pub fn is_finished(&self) -> bool {
        self.table >= TABLES.len()
    }

    /// Entries seen in each table that was read here.
    pub fn entries(&self) -> &BTreeMap<&'static str, u64> {
        &self.entries
    }

    /// Reads about `budget` entries.
    ///
    /// # Errors
    /// Where a map cannot be read; the next step goes on from there.
    pub fn step(&mut self, tables: &Tables, now: u64, budget: usize) -> Result<(), PortError> {
        let Some(table) = TABLES.get(self.table).copied() else { return Ok(()) };
        let reader = tables.reader(table)?;
        let page = reader.page(&mut self.cursor, budget)?;
        let mut seen = 0;
        for (_, value) in page.iter(reader.shape) {
            seen += 1;
            match table {
                name::HALF_OPEN | name::CLOSING => self.look(table, from_bytes::<FlowV4>(value), now),
                _ => self.look(table, from_bytes::<FlowV6>(value), now),
            }
        }
        *self.entries.entry(table).or_default() += seen;
        if self.cursor.is_finished() {
            (self.table, self.cursor) = (self.table + 1, Cursor::default());
        }
        Ok(())
    }

    fn look<A: Address>(&mut self, table: &str, flow: Option<Flow<A>>, now: u64) {
        if let Some(flow) = flow.filter(|flow| self.holds(table, flow, now)) {
            self.see(&flow);
        }
    }

    fn holds<A: Address>(&self, table: &str, flow: &Flow<A>, now: u64) -> bool {
        if table == name::HALF_OPEN || table == name::HALF_OPEN_V6 {
            return now.saturating_sub(flow.last_seen) < STALLED;
        }
        let rest = self.rests.get(&flow.service).copied().unwrap_or(NO_SERVICE_REST);
        !expired(flow.last_seen, rest_seconds(flow.key.protocol, flow.flags, rest), now)
    }

    /// Takes note of an entry that holds its port. Both halves of a flow may be given; the reply's counts. Where the
    /// client's own address is the source there is no port to run out of.
    pub fn see<A: Address>(&mut self, flow: &Flow<A>) {
        let key = &flow.key;
        if flow.direction == FORWARD || (flow.new_dst, flow.new_dst_port) == (key.dst, key.dst_port) {
            return;
        }
        let (backend, address) = (key.src.wide(), key.dst.wide());
        let space = Space { backend, port: key.src_port, protocol: key.protocol, address };
        self.ports.entry(space).or_default().push(u16::from_be(key.dst_port));
    }

    /// What the walk found: one element for each source address of each full-nat backend in use.
    ///
    /// # Errors
    /// Where a map cannot be read.
    pub fn finish(mut self, tables: &Tables) -> Result<Vec<SnatUse>, PortError> {
        for ports in self.ports.values_mut() {
            ports.sort_unstable();
            ports.dedup();
        }
        let (services, backends) = (tables.services()?, tables.backends()?);
        let permitted = tables.snat_ports()?;
        // Most services have the same range.
        let mut by_range = BTreeMap::new();
        let mut allowed = |service: &ServiceEntry| {
            let range = (service.snat_port_min, service.snat_port_max);
            *by_range.entry(range).or_insert_with(|| allowed(service, &permitted))
        };
        let mut found = Vec::new();
        for (number, backend) in &backends {
            let Some(service) = services.get(&backend.service).filter(|service| service.mode == mode::FULL_NAT) else {
                continue;
            };
            for address in addresses(service, backend.snat_address) {
                let space = Space { backend: backend.address, port: backend.port, protocol: backend.protocol, address };
                let used = self.used(&space, |port| may_use(service, &permitted, port));
                found.push(SnatUse {
                    service: backend.service,
                    backend: *number,
                    address,
                    used: u32::try_from(used).unwrap_or(u32::MAX),
                    allowed: allowed(service),
                });
            }
        }
        found.sort_unstable();
        Ok(found)
    }

    /// Ports in use of a space, of those that `counts` says yes to. A backend of every port has a space for each of its ports:
    /// what is in use is that of the fullest.
    fn used(&self, space: &Space, counts: impl Fn(u16) -> bool) -> usize {
        let count = |ports: &Vec<u16>| ports.iter().filter(|port| counts(**port)).count();
        if space.port != ANY_PORT {
            return self.ports.get(space).map_or(0, count);
        }
        let [first, last] = [0, u16::MAX].map(|port| Space { port, ..*space });
        // From the first of its ports to beyond the last: spaces are in order of backend, then port.
        let last = Space { protocol: u8::MAX, address: [u32::MAX; 4], ..last };
        let first = Space { protocol: 0, address: [0; 4], ..first };
        let own = self
            .ports
            .range(first..=last)
            .filter(|(other, _)| (other.protocol, other.address) == (space.protocol, space.address));
        own.map(|(_, ports)| count(ports)).max().unwrap_or(0)
    }
}

/// The source addresses of a backend: its service's, else its own; none where no address is known yet.
fn addresses(service: &ServiceEntry, own: Wide) -> Vec<Wide> {
    match service.snat_count {
        0 => Some(own).filter(|address| !is_none(address)).into_iter().collect(),
        count => service.snat_addresses.into_iter().take(usize::try_from(count).unwrap_or(usize::MAX)).collect(),
    }
}

/// Whether the program may give this port (host order) to a flow of the service.
fn may_use(service: &ServiceEntry, permitted: &PortSet, port: u16) -> bool {
    let word = permitted.0.get(usize::from(port >> 6)).copied().unwrap_or(0);
    (service.snat_port_min..=service.snat_port_max).contains(&port) && word >> (port & 63) & 1 != 0
}

fn allowed(service: &ServiceEntry, permitted: &PortSet) -> u32 {
    let range = service.snat_port_min..=service.snat_port_max;
    range.map(|port| u32::from(may_use(service, permitted, port))).sum()
}

#[cfg(test)]
mod tests {
    use edge_common::{flow::FlowKeyV4, maps::FlowV4};

    use super::*;

    fn service() -> ServiceEntry {
        ServiceEntry { snat_port_min: 1000, snat_port_max: 1999, closing_timeout: 60, ..ServiceEntry::default() }
    }

    fn permitted(forbidden: &[u16]) -> PortSet {
        let mut set = PortSet([u64::MAX; 1024]);
        for port in forbidden {
            set.0[usize::from(port >> 6)] &= !(1 << (port & 63));
        }
        set
    }

    fn reply(port: u16, last_seen: u64) -> FlowV4 {
        let key = FlowKeyV4::new(1, 2, 443_u16.to_be(), port.to_be(), 6);
        FlowV4 { key, new_dst: 3, new_dst_port: 40_000_u16.to_be(), direction: 1, last_seen, ..FlowV4::default() }
    }

    #[test]
    fn the_hosts_own_ports_are_neither_allowed_nor_used() {
        let set = permitted(&[1000, 1500, 2000]);
        assert_eq!(allowed(&service(), &set), 998);
        assert!(
            may_use(&service(), &set, 1999) && !may_use(&service(), &set, 1500) && !may_use(&service(), &set, 2001)
        );
    }

    #[test]
    fn a_closed_flow_holds_its_port_while_it_rests_and_a_handshake_until_it_stalls() {
        const SECOND: u64 = 1_000_000_000;
        let census = Census::begin(&BTreeMap::from([(0, service())]));
        let now = 1000 * SECOND;
        // TCP whose client closed first rests for two seconds.
        assert!(census.holds(name::CLOSING, &reply(1, now - SECOND), now));
        assert!(!census.holds(name::CLOSING, &reply(1, now - 3 * SECOND), now));
        assert!(census.holds(name::HALF_OPEN, &reply(1, now - SECOND / 10), now));
        assert!(!census.holds(name::HALF_OPEN, &reply(1, now - SECOND), now));
    }

    #[test]
    fn only_the_reply_half_of_a_translated_flow_counts_and_a_port_counts_once() {
        let mut census = Census::default();
        census.see(&reply(1001, 0));
        census.see(&reply(1001, 0));
        census.see(&FlowV4 { direction: FORWARD, ..reply(1002, 0) });
        let clients = reply(1003, 0);
        census.see(&FlowV4 { new_dst: clients.key.dst, new_dst_port: clients.key.dst_port, ..clients });
        let ports: Vec<_> = census.ports.into_values().collect();
        assert_eq!(ports, [[1001, 1001]], "once more than once only until the walk ends");
    }

    #[test]
    fn a_backend_of_every_port_is_as_full_as_the_fullest_of_its_ports() {
        let mut census = Census::default();
        for (port, ports) in [(80_u16, 1001..1004_u16), (443, 1001..1008)] {
            for snat in ports {
                let flow = reply(snat, 0);
                census.see(&FlowV4 { key: FlowKeyV4 { src_port: port.to_be(), ..flow.key }, ..flow });
            }
        }
        // Another protocol's, another backend's and another source's count elsewhere.
        let other = reply(2000, 0);
        for key in [
            FlowKeyV4 { protocol: 17, ..other.key },
            FlowKeyV4 { src: 9, ..other.key },
            FlowKeyV4 { dst: 9, ..other.key },
        ] {
            (0..9).for_each(|n| census.see(&FlowV4 { key: FlowKeyV4 { dst_port: n, ..key }, ..other }));
        }
        let space = Space { backend: 1_u32.wide(), port: ANY_PORT, protocol: 6, address: 2_u32.wide() };
        assert_eq!(census.used(&space, |_| true), 7);
        assert_eq!(census.used(&space, |port| port > 1004), 3);
        assert_eq!(census.used(&Space { port: 80_u16.to_be(), ..space }, |_| true), 3);
    }
}
