//! The rows that users see, read from the pinned maps: for `--kernel`, with the daemon dead or alive, and for the daemon's
//! own views, so that both say the same. Nothing is written.

mod flows;
mod rates;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    sync::Arc,
};

use edge_common::{
    address::Address,
    flow::{FlowKey, FlowKeyV4, FlowKeyV6},
    maps::{
        AddressFilter, BackendEntry, BackendSignals, CacheWindow, Control, Flow, FlowV4, FlowV6, NeighbourKey, NextHop,
        Port, PortSet, RANGE_PREFIX, RangeSource, SERVICE_TAG, ServiceEntry, ServiceKey, ServiceStats, SourceId,
        SourceKey, SourceRange, SourceUse, balance, mode, name, range_action,
    },
    verdict::{REASONS, Reason},
};
use serde_json::{Value, json};

pub use self::rates::{Rate, Rates};
use super::{
    attach::{TC_PROGRAM, XDP_PROGRAM},
    cache::{CpuCache, FlowCache},
    interfaces,
    pins::{self, Pins},
    sys::{self, Cursor, from_bytes, monotonic_ns},
    tables::{Tables, label_text, per_cpu},
};
use crate::{
    model::{
        Balance, Endpoint, Protocol, Tier,
        view::{BackendRow, MapRow, ServiceRow, XdpRow},
    },
    reconcile::{
        ports::{BackendSlot, PortError, Region, share_of, socket_address, tier_of, weight_of},
        protect,
    },
};

/// Entries read in one call where a list is limited.
const PAGE: usize = 1024;

/// Entries of a map that somebody has counted, and seconds since then; `None`: nobody has yet.
#[derive(Clone, Copy, Debug)]
pub struct Counted(pub Option<(u64, u64)>);

/// The pinned maps, open for reading.
#[derive(Debug)]
pub struct KernelView {
    pins: Pins,
    tables: Tables,
    cache: Arc<FlowCache>,
}

impl KernelView {
    /// Opens what is pinned under `root` by a daemon of this version (`object`).
    ///
    /// # Errors
    /// Where nothing is pinned there, or by another version, or it may not be read.
    pub fn open(root: &Path, object: &[u8]) -> Result<Self, PortError> {
        let pins = Pins::new(root, object)?;
        let pinned = pins::files(&pins.maps()).map_err(|error| PortError::new(root.display().to_string(), error))?;
        if pinned.is_empty() {
            return Err(PortError::new(
                root.display().to_string(),
                "no maps are pinned here; has the daemon ever run?",
            ));
        }
        if !pins.map(name::SERVICES).exists() {
            let reason = "the pinned maps have another layout; use the edge-ctl of the daemon that made them";
            return Err(PortError::new(root.display().to_string(), reason));
        }
        Self::from_pins(pins)
    }

    fn from_pins(pins: Pins) -> Result<Self, PortError> {
        let cache = Arc::new(FlowCache::read(&pins)?);
        Self::with_cache(pins, cache)
    }

    /// Opens these pins, with a flow cache that is mapped already.
    ///
    /// # Errors
    /// Where one is missing or may not be read.
    pub fn with_cache(pins: Pins, cache: Arc<FlowCache>) -> Result<Self, PortError> {
        Ok(Self { tables: Tables::open(&pins)?, cache, pins })
    }

    /// The maps.
    pub fn tables(&self) -> &Tables {
        &self.tables
    }

    /// One row for each frontend in the index. Rates are 0 (see [`Rates`]); `announced` is `-` and `age` 0, since the maps
    /// do not know them.
    ///
    /// # Errors
    /// Where a map cannot be read.
    pub fn service_rows(&self) -> Result<Vec<ServiceRow>, PortError> {
        let state = self.tables.state()?;
        let end = state.services_end();
        let (stats, reasons) = (self.tables.service_stats(end)?, self.tables.reasons(end)?);
        let mut rows = Vec::new();
        for (key, number) in &state.index {
            let Some(slot) = state.services.get(number) else { continue };
            let backends = || state.backends.values().filter(|backend| backend.entry.service == *number);
            let used = backends().filter(|backend| backend.eligible() || backend.active > 0).count();
            let stats = stats.get(number).copied().unwrap_or_default();
            rows.push(ServiceRow {
                name: slot.label.clone(),
                vip: Endpoint(socket_address(key.address, key.port)).to_string(),
                proto: protocol_name(key.protocol),
                mode: mode_name(slot.entry.mode).to_owned(),
                balance: balance_name(slot.entry.balance),
                backends: format!("{}/{used}", backends().filter(|backend| backend.eligible()).count()),
                active: slot.active,
                announced: "-".to_owned(),
                attempts: stats.half_opened,
                discarded: drops(&reasons, *number).values().sum(),
                affinity: slot.entry.affinity_timeout.into(),
                slots: slots(state.regions.get(&slot.entry.selection).map(|region| &**region)),
                backup_slots: slots(
                    state.regions.get(&slot.entry.selection).and_then(|region| region.backup.as_deref()),
                ),
                connections: stats.opened,
                packets_in: stats.packets_in,
                bytes_in: stats.bytes_in,
                packets_out: stats.packets_out,
                bytes_out: stats.bytes_out,
                drops: drops(&reasons, *number),
                ..ServiceRow::default()
            });
        }
        rows.sort_by(|a, b| (&a.name, &a.vip, &a.proto).cmp(&(&b.name, &b.vip, &b.proto)));
        Ok(rows)
    }

    /// One row for each backend, with its number, those that only drain included. `node` and `source` are `-`: the maps do not know them.
    ///
    /// # Errors
    /// Where a map cannot be read.
    pub fn backend_rows(&self) -> Result<Vec<(u32, BackendRow)>, PortError> {
        let state = self.tables.numbered()?;
        let stats = self.tables.backend_stats(state.backends_end())?;
        let signals = self.tables.backend_signals(state.backends_end())?;
        let now = monotonic_ns();
        let row = |(number, slot): (&u32, &BackendSlot)| {
            let service =
                state.services.get(&slot.entry.service).map(|service| (&service.entry, service.label.as_str()));
            let stats = stats.get(number).copied().unwrap_or_default();
            let signals = signals.get(number).copied().unwrap_or_default();
            (*number, backend_row(slot, service, stats, signals, now))
        };
        let mut rows: Vec<(u32, BackendRow)> = state.backends.iter().map(row).collect();
        rows.sort_by(|(_, a), (_, b)| (&a.service, &a.vip, &a.backend).cmp(&(&b.service, &b.vip, &b.backend)));
        Ok(rows)
    }

    /// As [`KernelView::backend_rows`], of these numbers alone and in their order.
    ///
    /// # Errors
    /// Where a map cannot be read.
    pub fn backend_rows_of(&self, numbers: &BTreeSet<u32>) -> Result<Vec<(u32, BackendRow)>, PortError> {
        let now = monotonic_ns();
        let mut rows = Vec::new();
        for number in numbers {
            let Some(slot) = self.tables.backend(*number)? else { continue };
            let service = self.tables.service(slot.entry.service)?;
            let service = service.as_ref().map(|(entry, label)| (entry, label.as_str()));
            let (stats, signals) = self.tables.backend_counters(*number)?;
            rows.push((*number, backend_row(&slot, service, stats, signals, now)));
        }
        Ok(rows)
    }

    /// Packets by service name (`-`: none) and reason, non-zero ones; true where they were dropped.
    ///
    /// # Errors
    /// Where a map cannot be read.
    pub fn reasons(&self) -> Result<Vec<(String, &'static str, bool, u64)>, PortError> {
        let services = self.tables.numbered()?.services;
        let name = |number: &u32| services.get(number).map_or_else(|| "-".to_owned(), |slot| slot.label.clone());
        let mut rows = Vec::new();
        for ((service, number), packets) in self.tables.reasons(u32::MAX)? {
            if let Some(reason) = reason(number) {
                rows.push((name(&service), reason.name(), reason.is_drop(), packets));
            }
        }
        Ok(rows)
    }

    /// The flow cache, CPU by CPU.
    pub fn cache(&self) -> Vec<CpuCache> {
        self.cache.cpus()
    }

    /// One row for each map, in the order of the pipeline, every entry counted now.
    ///
    /// # Errors
    /// Where a map cannot be read.
    pub fn map_rows(&self) -> Result<Vec<MapRow>, PortError> {
        self.map_rows_with(|_| None)
    }

    /// As [`KernelView::map_rows`], but where `known` answers, a map is not walked: its entries are what is known, as of
    /// so many seconds ago, or nothing yet.
    ///
    /// # Errors
    /// Where a map cannot be read.
    pub fn map_rows_with(&self, known: impl Fn(&str) -> Option<Counted>) -> Result<Vec<MapRow>, PortError> {
        let mut rows = Vec::new();
        let cpus = self.cache();
        let cached = |map: &str, of: fn(&CpuCache) -> u64| {
            (map == name::CACHE_WINDOWS).then(|| cpus.iter().map(of).fold(0, u64::wrapping_add))
        };
        for map in name::ALL.iter().copied().chain(name::DAEMON) {
            let data = self.tables.reader(map)?.data();
            let error = |error: aya::maps::MapError| PortError::new(format!("map {map}"), pins::chain(&error));
            let info = data.info().map_err(error)?;
            let kind = info.map_type().map_err(error)?;
            let hash =
                matches!(kind, aya::maps::MapType::Hash | aya::maps::MapType::LruHash | aya::maps::MapType::LpmTrie);
            let (entries, counted) = match known(map) {
                Some(Counted(known)) => known.map_or((None, None), |(entries, age)| (Some(entries), Some(age))),
                None if hash => (Some(self.tables.count(map)?), None),
                None => (None, None),
            };
            rows.push(MapRow {
                name: map.to_owned(),
                kind: kind_name(kind).to_owned(),
                id: info.id(),
                key: info.key_size(),
                value: info.value_size(),
                max_entries: info.max_entries(),
                entries,
                counted,
                memory: memory(data).unwrap_or(0),
                hits: cached(map, |cpu| cpu.hits),
                misses: cached(map, |cpu| cpu.misses),
                displaced: cached(map, |cpu| cpu.displaced),
                pin: self.pins.map(map).display().to_string(),
            });
        }
        Ok(rows)
    }

    /// At most `limit` entries of a map as `{"key": ..., "value": ...}`, both texts of `field=value` pairs. Array elements
    /// that are zero are left out.
    ///
    /// # Errors
    /// Where there is no map of that name, or it cannot be read.
    pub fn dump(&self, map: &str, limit: usize) -> Result<Vec<Value>, PortError> {
        let map = map.to_ascii_uppercase();
        let reader = self.tables.reader(&map)?;
        let is_array = reader
            .data()
            .info()
            .ok()
            .and_then(|info| info.map_type().ok())
            .is_some_and(|kind| matches!(kind, aya::maps::MapType::Array | aya::maps::MapType::PerCpuArray));
        let mut rows = Vec::new();
        let mut cursor = Cursor::default();
        while !cursor.is_finished() && rows.len() < limit {
            for (key, value) in reader.page(&mut cursor, PAGE)?.iter(reader.shape) {
                let is_empty = is_array && value.iter().all(|byte| *byte == 0);
                if !is_empty && rows.len() < limit {
                    rows.push(json!({ "key": key_text(&map, key), "value": value_text(&map, value, reader.cpus) }));
                }
            }
        }
        Ok(rows)
    }

    /// One row for each interface with a pinned link.
    ///
    /// # Errors
    /// Where the pins or the interfaces cannot be listed.
    pub fn xdp_rows(&self) -> Result<Vec<XdpRow>, PortError> {
        let known = interfaces::list().map_err(|error| PortError::new("listing interfaces", error))?;
        let linked = self.pins.linked().map_err(|error| PortError::new("listing links", error))?;
        let row = |(interface, xdp): (String, bool)| {
            let found = known.iter().find(|known| known.name == interface);
            let generic = found.and_then(|found| found.xdp).is_some_and(|(_, generic)| generic);
            let hook = match (xdp, generic) {
                (true, true) => "xdp-generic",
                (true, false) => "xdp-native",
                (false, _) => "tcx",
            };
            let target = sys::link_target(&self.pins.link(&interface, xdp));
            let mut row = XdpRow { interface, hook: hook.to_owned(), ..XdpRow::default() };
            match target {
                Ok(target) if target.ifindex != 0 => {
                    row.ifindex = target.ifindex;
                    row.state = "attached".to_owned();
                    row.program = Some(target.program);
                    row.link = Some(target.id);
                    row.tag = self.program_tag(target.program, target.xdp);
                }
                Ok(_) => row.state = "missing".to_owned(),
                Err(error) => row.state = error.to_string(),
            }
            row
        };
        Ok(linked.into_iter().map(row).collect())
    }

    /// The tag of a program that is pinned; asking for any other by its id takes CAP_SYS_ADMIN.
    fn program_tag(&self, id: u32, xdp: bool) -> Option<String> {
        let pin = self.pins.program(if xdp { XDP_PROGRAM } else { TC_PROGRAM });
        let info = aya::programs::ProgramInfo::from_pin(pin).ok().filter(|info| info.id() == id)?;
        Some(format!("{:016x}", info.tag().swap_bytes()))
    }

    /// Names of the pinned programs that this version would load.
    pub fn programs(&self) -> Vec<&'static str> {
        [XDP_PROGRAM, TC_PROGRAM].into_iter().filter(|program| self.pins.program(program).exists()).collect()
    }
}

/// A backend's row, of what the maps hold about it at `now` (CLOCK_MONOTONIC, ns).
fn backend_row(
    slot: &BackendSlot,
    service: Option<(&ServiceEntry, &str)>,
    stats: ServiceStats,
    signals: BackendSignals,
    now: u64,
) -> BackendRow {
    BackendRow {
        service: service.map(|(_, label)| label.to_owned()).unwrap_or_default(),
        backend: Endpoint(slot.address()).to_string(),
        proto: protocol_name(slot.entry.protocol),
        node: "-".to_owned(),
        state: if slot.eligible() { "up" } else { "draining" }.to_owned(),
        w: u32::from(weight_of(slot.state)),
        limit: slot.entry.limit.into(),
        tier: if tier_of(slot.state) == Tier::Backup { "backup" } else { "primary" }.to_owned(),
        share: u32::from(share_of(slot.state)),
        active: slot.active,
        fails: signals.unanswered + signals.refused + signals.reset_early,
        connect: average_ms(signals.answered_us, signals.answered),
        first_byte: average_ms(signals.first_byte_us, signals.first_bytes),
        unanswered: signals.unanswered,
        refused: signals.refused,
        reset_early: signals.reset_early,
        last_failure: (signals.last_failure != 0).then(|| now.saturating_sub(signals.last_failure) / 1_000_000_000),
        source: "-".to_owned(),
        connections: stats.opened,
        packets_in: stats.packets_in,
        bytes_in: stats.bytes_in,
        packets_out: stats.packets_out,
        bytes_out: stats.bytes_out,
        vip: service
            .map(|(entry, _)| Endpoint(socket_address(entry.address, entry.port)).to_string())
            .unwrap_or_default(),
        ..BackendRow::default()
    }
}

fn slots(region: Option<&Region>) -> u64 {
    region.map_or(0, |region| region.table.len() as u64)
}

/// The average of `count` times that add up to `micros` microseconds, in milliseconds.
fn average_ms(micros: u64, count: u64) -> Option<f64> {
    (count != 0).then(|| micros as f64 / count as f64 / 1000.0)
}

fn balance_name(number: u8) -> String {
    let balance = match number {
        balance::MAGLEV => Balance::Maglev,
        balance::ROUND_ROBIN => Balance::RoundRobin,
        balance::LEAST_CONNECTIONS => Balance::LeastConnections,
        other => return other.to_string(),
    };
    balance.to_string()
}

fn drops(reasons: &BTreeMap<(u32, u32), u64>, service: u32) -> BTreeMap<String, u64> {
    let own = reasons.range((service, 0)..(service, REASONS));
    let dropped = own.filter_map(|((_, number), packets)| Some((reason(*number)?, *packets)));
    dropped
        .filter(|(reason, _)| reason.is_drop())
        .map(|(reason, packets)| (reason.name().to_owned(), packets))
        .collect()
}

fn reason(number: u32) -> Option<Reason> {
    Reason::ALL.iter().copied().find(|reason| *reason as u32 == number)
}

fn protocol_name(number: u8) -> String {
    Protocol::from_number(number).map_or_else(|| number.to_string(), |protocol| protocol.to_string())
}

fn mode_name(number: u8) -> &'static str {
    if number == mode::DNAT { "dnat" } else { "full-nat" }
}

fn kind_name(kind: aya::maps::MapType) -> &'static str {
    match kind {
        aya::maps::MapType::Hash => "hash",
        aya::maps::MapType::LruHash => "lru_hash",
        aya::maps::MapType::LpmTrie => "lpm_trie",
        aya::maps::MapType::Array => "array",
        aya::maps::MapType::PerCpuArray => "percpu_array",
        _ => "other",
    }
}

/// Kernel memory of a map, bytes, as its descriptor tells.
fn memory(data: &aya::maps::MapData) -> Option<u64> {
    use std::os::fd::{AsFd as _, AsRawFd as _};
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", data.fd().as_fd().as_raw_fd())).ok()?;
    info.lines().find_map(|line| line.strip_prefix("memlock:"))?.trim().parse().ok()
}

fn key_text(map: &str, key: &[u8]) -> String {
    let text = match map {
        name::ESTABLISHED | name::HALF_OPEN | name::CLOSING => {
            from_bytes::<FlowKeyV4>(key).map(|key| flow_key_text(&key))
        }
        name::ESTABLISHED_V6 | name::HALF_OPEN_V6 | name::CLOSING_V6 => {
            from_bytes::<FlowKeyV6>(key).map(|key| flow_key_text(&key))
        }
        name::SERVICE_INDEX | name::BACKEND_INDEX => from_bytes::<ServiceKey>(key)
            .map(|key| format!("{}/{}", Endpoint(socket_address(key.address, key.port)), protocol_name(key.protocol))),
        name::NEXT_HOP_INDEX => from_bytes::<NeighbourKey>(key)
            .map(|key| format!("ifindex={} neighbour={}", key.ifindex, crate::reconcile::ports::ip(key.address))),
        name::VLANS => from_bytes::<Port>(key).map(|port| port_text(&port)),
        name::SOURCE_RANGES => from_bytes::<SourceKey>(key).map(|key| range_text(&key)),
        name::SOURCES => from_bytes::<SourceId>(key).map(|id| source_text(&id)),
        name::REASONS => from_bytes::<u32>(key).map(|key| {
            let number = key % REASONS;
            let reason = reason(number).map_or_else(|| number.to_string(), |reason| reason.name().to_owned());
            format!("service={} reason={reason}", key / REASONS)
        }),
        _ => from_bytes::<u32>(key).map(|key| key.to_string()),
    };
    text.unwrap_or_else(|| hex(key))
}

fn range_text(key: &SourceKey) -> String {
    let prefix = protect::range_of(key).map_or_else(|| "-".to_owned(), |prefix| prefix.to_string());
    format!("service={} prefix={prefix}", key.source.service)
}

/// A source is all of its range key.
fn source_text(id: &SourceId) -> String {
    let source = RangeSource { service: id.service, address: id.address };
    let key = SourceKey { prefix_len: RANGE_PREFIX + 128, source };
    let source = protect::range_of(&key).map_or_else(|| "-".to_owned(), |prefix| prefix.addr().to_string());
    format!("service={} source={source}", id.service)
}

const fn action_name(action: u32) -> &'static str {
    if action == range_action::ALLOW { "allow" } else { "deny" }
}

fn value_text(map: &str, value: &[u8], cpus: usize) -> String {
    let text = match map {
        name::ESTABLISHED | name::HALF_OPEN | name::CLOSING => from_bytes::<FlowV4>(value).map(|flow| flow_text(&flow)),
        name::ESTABLISHED_V6 | name::HALF_OPEN_V6 | name::CLOSING_V6 => {
            from_bytes::<FlowV6>(value).map(|flow| flow_text(&flow))
        }
        name::SERVICES => from_bytes::<ServiceEntry>(value).map(|entry| service_text(&entry)),
        name::SERVICE_LABELS => from_bytes::<[u8; 64]>(value).map(|bytes| label_text(&bytes)),
        name::BACKENDS => from_bytes::<BackendEntry>(value).map(|entry| {
            let address = Endpoint(socket_address(entry.address, entry.port));
            let (proto, snat) = (protocol_name(entry.protocol), crate::reconcile::ports::ip(entry.snat_address));
            format!("address={address} proto={proto} service={} snat={snat}", entry.service)
        }),
        name::BACKEND_STATE => from_bytes::<u32>(value).map(|word| {
            let eligible = word & edge_common::maps::backend_state::ELIGIBLE != 0;
            format!("eligible={eligible} weight={}", weight_of(word))
        }),
        name::NEXT_HOPS => from_bytes::<NextHop>(value).map(|hop| next_hop_text(&hop)),
        name::VLANS => from_bytes::<Port>(value).map(|port| port_text(&port)),
        name::CACHE_WINDOWS => from_bytes::<CacheWindow>(value).map(|window| {
            let CacheWindow { v4, v6, hits, misses, displaced, told, .. } = window;
            format!(
                "sets={} sets_v6={} hits={hits} misses={misses} displaced={displaced} told={told}",
                v4 >> 32,
                v6 >> 32
            )
        }),
        name::FLOW_GENERATIONS => {
            let changes = value.as_chunks::<4>().0.iter().map(|bucket| u64::from(u32::from_ne_bytes(*bucket)));
            Some(format!("changes={}", changes.sum::<u64>()))
        }
        name::CONTROL => {
            // The seed is a secret.
            from_bytes::<Control>(value).map(|control| {
                let Control { route_generation, capture_until, .. } = control;
                format!("route_generation={route_generation} capture_until={capture_until}")
            })
        }
        name::ADDRESS_FILTER => from_bytes::<AddressFilter>(value).map(|filter| {
            let count = |words: &[u64]| words.iter().map(|word| word.count_ones()).sum::<u32>();
            format!("destination_bits={} source_bits={}", count(&filter.destinations), count(&filter.sources))
        }),
        name::SNAT_PORTS => from_bytes::<PortSet>(value)
            .map(|ports| format!("ports={}", ports.0.iter().map(|word| word.count_ones()).sum::<u32>())),
        name::SOURCE_RANGES => from_bytes::<SourceRange>(value)
            .map(|range| format!("action={} hits={}", action_name(range.action), range.hits)),
        name::SOURCES => from_bytes::<SourceUse>(value).map(|used| {
            let half_open = used.half_open;
            format!("flows={} packets={} half_open={}+{}", used.flows, used.packets, half_open.now, half_open.before)
        }),
        name::SERVICE_STATS | name::BACKEND_STATS => Some(stats_text(value, cpus)),
        name::REASONS => Some(format!("packets={}", per_cpu::<u64>(value, cpus).fold(0, u64::wrapping_add))),
        name::SERVICE_EXPIRED | name::BACKEND_EXPIRED => from_bytes::<u64>(value).map(|count| format!("flows={count}")),
        _ if value.len() == 4 => from_bytes::<u32>(value).map(|number| number.to_string()),
        _ => None,
    };
    text.unwrap_or_else(|| hex(value))
}

fn flow_key_text<A: Address>(key: &FlowKey<A>) -> String {
    let (src, dst) = (socket_address(key.src, key.src_port), socket_address(key.dst, key.dst_port));
    format!("proto={} src={src} dst={dst}", protocol_name(key.protocol))
}

fn flow_text<A: Address>(flow: &Flow<A>) -> String {
    let (src, dst) = (socket_address(flow.new_src, flow.new_src_port), socket_address(flow.new_dst, flow.new_dst_port));
    format!(
        "src={src} dst={dst} service={} backend={} next_hop={} state={} direction={} flags={:#x} sequence={} packets={} \
         bytes={} last_seen={}",
        flow.service,
        flow.backend,
        flow.next_hop,
        flow.state,
        flow.direction,
        flow.flags,
        flow.sequence,
        flow.packets,
        flow.bytes,
        flow.last_seen
    )
}

fn service_text(entry: &ServiceEntry) -> String {
    format!(
        "vip={}/{} mode={} selection={} snat_addresses={} snat_ports={}-{} timeouts={}/{}/{}",
        Endpoint(socket_address(entry.address, entry.port)),
        protocol_name(entry.protocol),
        mode_name(entry.mode),
        entry.selection,
        entry.snat_count,
        entry.snat_port_min,
        entry.snat_port_max,
        entry.established_timeout,
        entry.half_open_timeout,
        entry.closing_timeout
    )
}

fn next_hop_text(hop: &NextHop) -> String {
    let mac = |bytes: [u8; 6]| bytes.map(|byte| format!("{byte:02x}")).join(":");
    format!(
        "ifindex={} neighbour={} dst_mac={} src_mac={} mtu={} tags={} flags={:#x} generation={}",
        hop.ifindex,
        crate::reconcile::ports::ip(hop.neighbour),
        mac(hop.dst_mac),
        mac(hop.src_mac),
        hop.mtu,
        tags_text(hop.tags),
        hop.flags,
        hop.generation
    )
}

/// Tags as `ip` and `tcpdump` number them, the outer one first; `-` for none.
fn tags_text(tags: [u32; 2]) -> String {
    let kind = |tag: u32| if tag >> 16 == u32::from(SERVICE_TAG) { "ad" } else { "q" };
    let tags: Vec<String> =
        tags.into_iter().filter(|tag| *tag != 0).map(|tag| format!("{}:{}", kind(tag), tag & 0xfff)).collect();
    if tags.is_empty() { "-".to_owned() } else { tags.join("/") }
}

fn port_text(port: &Port) -> String {
    format!("ifindex={} tags={}", port.ifindex, tags_text(port.tags))
}

fn stats_text(value: &[u8], cpus: usize) -> String {
    let sum = |field: fn(&ServiceStats) -> u64| {
        per_cpu::<ServiceStats>(value, cpus).fold(0_u64, |sum, stats| sum.wrapping_add(field(&stats)))
    };
    format!(
        "packets_in={} bytes_in={} packets_out={} bytes_out={} half_opened={} opened={} closed={}",
        sum(|stats| stats.packets_in),
        sum(|stats| stats.bytes_in),
        sum(|stats| stats.packets_out),
        sum(|stats| stats.bytes_out),
        sum(|stats| stats.half_opened),
        sum(|stats| stats.opened),
        sum(|stats| stats.closed)
    )
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seed_is_not_in_a_dump() {
        let control = Control { seed: [0x5ec2_e700_5ec2_e700; 2], route_generation: 3, ..Control::default() };
        assert_eq!(value_text(name::CONTROL, &sys::to_bytes(&control), 1), "route_generation=3 capture_until=0");
    }
}
