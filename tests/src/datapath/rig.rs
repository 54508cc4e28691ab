//! The object loaded, its maps filled, packets run through it.

mod flows;
mod places;

use std::{net::IpAddr, os::fd::AsFd as _};

use anyhow::{Context, Result, bail};
use aya::{
    Ebpf, EbpfLoader, Pod, TestRun, TestRunOptions,
    maps::{Array, HashMap, Map, MapData, PerCpuArray},
    programs::{SchedClassifier, Xdp},
};
use edge_common::{
    address::filter_bit,
    filter,
    maglev::{self, Candidate},
    maps::{
        self, AddressFilter, BackendEntry, CHUNK_BYTES, Chunk, Control, OwnAddresses, PortSet, ServiceEntry,
        ServiceKey, ServiceStats, backend_state, interface_flag, mode, name,
    },
    verdict::{REASONS, Reason},
};
use edge_ctl::datapath::{
    cache::FlowCache,
    object::{EBPF_OBJECT, for_this_kernel},
    pins::Pins,
    stages,
};

pub use flows::{Entry, Key, ipv4, key, snat_of, v6_table};
pub(crate) use places::links;
pub use places::{
    CLIENT, CLIENT_MAC, CLIENT6, FAMILIES, Family, OWN, OWN6, POD, PODS, PODS_MAC, SNAT, SNAT6, UPLINK_MAC, VIP, VIP6,
    mac, pod, pod_mac, pod6, wire,
};

use super::{namespace::ifindex, pool::Loaded};

/// Where the pipeline runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// `edge_xdp`.
    Xdp,
    /// `edge_tc`.
    Tc,
}

/// Both, for tests that go over them.
pub const HOOKS: [Hook; 2] = [Hook::Xdp, Hook::Tc];

/// What the program said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// To the stack.
    Pass,
    /// Dropped.
    Drop,
    /// Out of the interface it came in by (XDP_TX). TC says [`Action::Redirect`] instead.
    Transmit,
    /// Out of another interface.
    Redirect,
}

/// An action and the packet after it.
#[derive(Debug)]
pub struct Outcome {
    /// What the program said.
    pub action: Action,
    /// The whole frame.
    pub frame: Vec<u8>,
}

/// Seconds and sizes that a test may choose.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Entries of the established table.
    pub established: u32,
    /// Entries of each LRU table.
    pub lru: u32,
    /// Lowest and highest SNAT port.
    pub snat_ports: (u16, u16),
    /// Timeouts of established, half-open and closing flows, seconds.
    pub timeouts: (u32, u32, u32),
    /// Of [`Rig::service`].
    pub family: Family,
    /// Sets of the flow cache of each family, split over all CPUs; 0: no cache.
    pub cache: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            established: 1024,
            lru: 4096,
            snat_ports: (20_000, 20_999),
            timeouts: (300, 30, 60),
            family: Family::V4,
            cache: 512,
        }
    }
}

/// The program and its maps, in the namespace of the calling thread.
pub struct Rig {
    /// The loaded object.
    pub ebpf: Loaded,
    hook: Hook,
    settings: Settings,
    /// The interface towards clients.
    pub uplink: u32,
    /// The interface towards pods.
    pub pods: u32,
    filter: Box<AddressFilter>,
    backends: u32,
    chunks: u32,
    /// The mapped flow cache.
    pub cache: FlowCache,
}

const SEED: [u64; 2] = [0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210];

impl Rig {
    /// Makes the two links with permanent neighbours in this thread's namespace and loads the object there.
    ///
    /// # Errors
    /// Where a link, the object or a map is refused.
    pub fn new(hook: Hook, settings: Settings) -> Result<Self> {
        links()?;
        let loaded = Loaded::taken(hook, &settings, || {
            let mut ebpf = open(EBPF_OBJECT, &settings)?;
            load(&mut ebpf, hook)?;
            Ok(ebpf)
        })?;
        Self::over(loaded, hook, settings)
    }

    /// As [`Rig::new`], of another object with the same maps, whose programs the caller loads.
    ///
    /// # Errors
    /// As [`Rig::new`].
    pub fn from_object(object: &[u8], hook: Hook, settings: Settings) -> Result<Self> {
        links()?;
        let ebpf = open(object, &settings)?;
        Self::over(Loaded::once(ebpf), hook, settings)
    }

    /// As [`Rig::new`], filling the maps that are pinned already; the programs are somebody else's.
    ///
    /// # Errors
    /// As [`Rig::new`].
    pub fn over_pins(pins: &Pins, hook: Hook, settings: Settings) -> Result<Self> {
        links()?;
        let mut loader = EbpfLoader::new();
        for map in name::ALL.iter().copied().chain([name::LOG]) {
            loader.map_pin_path(map, pins.map(map));
        }
        Self::over(Loaded::once(loader.load(&for_this_kernel(EBPF_OBJECT))?), hook, settings)
    }

    fn over(ebpf: Loaded, hook: Hook, settings: Settings) -> Result<Self> {
        let (uplink, pods) = (ifindex("uplink")?, ifindex("pods")?);
        let cache = map_cache(&ebpf)?;
        let cpus =
            if settings.cache == 0 { Vec::new() } else { aya::util::online_cpus().map_err(|(_, error)| error)? };
        cache.split(&cpus)?;
        let mut rig = Self {
            cache,
            ebpf,
            hook,
            settings,
            uplink,
            pods,
            filter: Box::new(AddressFilter { destinations: [0; filter::WORDS], sources: [0; filter::WORDS] }),
            backends: 0,
            chunks: 1,
        };
        let control = Control { seed: SEED, route_generation: 1, ..Control::default() };
        rig.array(name::CONTROL)?.set(0, control, 0)?;
        let mut interfaces: HashMap<_, u32, u32> = rig.hash(name::INTERFACES)?;
        for index in [uplink, pods] {
            interfaces.insert(index, interface_flag::ATTACHED | interface_flag::XDP_REDIRECT, 0)?;
        }
        let mut own: HashMap<_, u32, OwnAddresses> = rig.hash(name::OWN_ADDRESSES)?;
        for (n, index) in [uplink, pods].into_iter().enumerate() {
            own.insert(index, OwnAddresses { v4: wire(OWN[n]), v6: wire(OWN6[n]) }, 0)?;
        }
        rig.array(name::ANSWERS_FROM)?.set(0, 1_u64, 0)?;
        rig.array(name::SNAT_PORTS)?.set(0, PortSet([u64::MAX; 1024]), 0)?;
        for family in FAMILIES {
            rig.filter_destination(family.vip())?;
            rig.filter_destination(family.snat())?;
        }
        Ok(rig)
    }

    /// An array map.
    ///
    /// # Errors
    /// Where the object has no such map.
    pub fn array<V: Pod>(&mut self, name: &str) -> Result<Array<&mut MapData, V>> {
        Ok(Array::try_from(self.ebpf.map_mut(name).with_context(|| format!("no map {name}"))?)?)
    }

    /// A hash map.
    ///
    /// # Errors
    /// Where the object has no such map.
    pub fn hash<K: Pod, V: Pod>(&mut self, name: &str) -> Result<HashMap<&mut MapData, K, V>> {
        Ok(HashMap::try_from(self.ebpf.map_mut(name).with_context(|| format!("no map {name}"))?)?)
    }

    /// Lets packets to `address` past the prefilter.
    ///
    /// # Errors
    /// Where the map write fails.
    pub fn filter_destination(&mut self, address: impl Into<IpAddr>) -> Result<()> {
        let bit = filter_bit(&wire(address)) as usize;
        self.filter.destinations[bit / 64] |= 1 << (bit % 64);
        let filter = *self.filter;
        Ok(self.array(name::ADDRESS_FILTER)?.set(0, filter, 0)?)
    }

    /// Lets packets from `address` past the prefilter.
    ///
    /// # Errors
    /// Where the map write fails.
    pub fn filter_source(&mut self, address: impl Into<IpAddr>) -> Result<()> {
        let bit = filter_bit(&wire(address)) as usize;
        self.filter.sources[bit / 64] |= 1 << (bit % 64);
        let filter = *self.filter;
        Ok(self.array(name::ADDRESS_FILTER)?.set(0, filter, 0)?)
    }

    /// Gives a backend another address.
    ///
    /// # Errors
    /// Where a map write fails.
    pub fn move_backend(&mut self, number: u32, address: IpAddr, mode: u8) -> Result<()> {
        let mut backend: BackendEntry = self.array(name::BACKENDS)?.get(&number, 0)?;
        backend.address = wire(address);
        self.array(name::BACKENDS)?.set(number, backend, 0)?;
        if mode == mode::DNAT {
            let key = ServiceKey { address: backend.address, port: backend.port, protocol: backend.protocol, _pad: 0 };
            self.hash(name::BACKEND_INDEX)?.insert(key, number, 0)?;
            self.filter_source(address)?;
        }
        Ok(())
    }

    /// Has the services that follow be of another family.
    pub fn set_family(&mut self, family: Family) {
        self.settings.family = family;
    }

    /// A service on VIP:`port` with pods `0..pods` at `backend_port`; its backends' numbers.
    ///
    /// # Errors
    /// Where a map write fails.
    pub fn service(
        &mut self,
        number: u32,
        port: u16,
        protocol: u8,
        mode: u8,
        pods: u8,
        backend_port: u16,
    ) -> Result<Vec<u32>> {
        let family = self.settings.family;
        let mut numbers = Vec::new();
        let mut pool = Vec::new();
        for n in 0..pods {
            self.backends += 1;
            let backend = BackendEntry {
                address: wire(family.pod(n)),
                port: backend_port.to_be(),
                protocol,
                service: number,
                snat_address: wire(family.snat()),
                ..BackendEntry::default()
            };
            let index = self.backends;
            self.array(name::BACKENDS)?.set(index, backend, 0)?;
            self.array(name::BACKEND_STATE)?.set(index, backend_state::ELIGIBLE, 0)?;
            if mode == mode::DNAT {
                let key = ServiceKey { address: wire(family.pod(n)), port: backend_port.to_be(), protocol, _pad: 0 };
                self.hash(name::BACKEND_INDEX)?.insert(key, index, 0)?;
                self.filter_source(family.pod(n))?;
            }
            pool.push(Candidate { identity: u64::from(n) << 16 | u64::from(backend_port), weight: 1 });
            numbers.push(index);
        }
        let selection = if numbers.is_empty() { 0 } else { self.region(&numbers, &pool)? };
        let (established, half_open, closing) = self.settings.timeouts;
        let entry = ServiceEntry {
            address: wire(family.vip()),
            port: port.to_be(),
            protocol,
            mode,
            selection,
            snat_port_min: self.settings.snat_ports.0,
            snat_port_max: self.settings.snat_ports.1,
            established_timeout: established,
            half_open_timeout: half_open,
            closing_timeout: closing,
            ..ServiceEntry::default()
        };
        self.array(name::SERVICES)?.set(number, entry, 0)?;
        let key = ServiceKey { address: wire(family.vip()), port: port.to_be(), protocol, _pad: 0 };
        self.hash(name::SERVICE_INDEX)?.insert(key, number, 0)?;
        Ok(numbers)
    }

    /// Writes a selection region; its first chunk.
    fn region(&mut self, numbers: &[u32], pool: &[Candidate]) -> Result<u32> {
        let table = maglev::fill(SEED, pool, maglev::table_len(pool.len()));
        let pool_bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_ne_bytes()).collect();
        let table_bytes: Vec<u8> = table.iter().flat_map(|index| index.to_ne_bytes()).collect();
        let header = self.chunks;
        let pool_chunk = header + 1;
        let table_chunk = pool_chunk + pool_bytes.len().div_ceil(CHUNK_BYTES) as u32;
        let head: Vec<u8> = [numbers.len() as u32, table.len() as u32, pool_chunk, table_chunk]
            .iter()
            .flat_map(|field| field.to_ne_bytes())
            .collect();
        for (mut chunk, bytes) in [(header, head), (pool_chunk, pool_bytes), (table_chunk, table_bytes)] {
            for part in bytes.chunks(CHUNK_BYTES) {
                let mut value = Chunk([0; CHUNK_BYTES]);
                value.0[..part.len()].copy_from_slice(part);
                self.array(name::SELECTION)?.set(chunk, value, 0)?;
                chunk += 1;
                self.chunks = chunk;
            }
        }
        Ok(header)
    }

    /// Runs a frame that came in by `ingress` through the program.
    ///
    /// # Errors
    /// Where the kernel refuses the test run.
    pub fn run(&mut self, frame: &[u8], ingress: u32) -> Result<Outcome> {
        let mut out = vec![0; frame.len() + 64];
        let context = match self.hook {
            Hook::Xdp => xdp_context(frame.len() as u32, ingress),
            Hook::Tc => skb_context(ingress, 0, 0),
        };
        self.run_with(frame, &context, &mut out)
    }

    /// As [`Rig::run`] at TC, for a packet that the kernel will cut into segments of `gso_size`.
    ///
    /// # Errors
    /// As [`Rig::run`].
    pub fn run_gso(&mut self, frame: &[u8], ingress: u32, gso_size: u32) -> Result<Outcome> {
        let mut out = vec![0; frame.len() + 64];
        let segments = (frame.len() as u32).div_ceil(gso_size);
        self.run_with(frame, &skb_context(ingress, gso_size, segments), &mut out)
    }

    fn run_with(&mut self, frame: &[u8], context: &[u8], out: &mut [u8]) -> Result<Outcome> {
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(out),
            ctx_in: Some(context),
            ..TestRunOptions::default()
        };
        let (result, action) = match self.hook {
            Hook::Xdp => {
                let program: &Xdp = self.ebpf.program("edge_xdp").context("no edge_xdp")?.try_into()?;
                let result = program.test_run(options)?;
                let action = match result.return_value {
                    1 => Action::Drop,
                    2 => Action::Pass,
                    3 => Action::Transmit,
                    4 => Action::Redirect,
                    other => bail!("XDP action {other}"),
                };
                (result, action)
            }
            Hook::Tc => {
                let program: &SchedClassifier = self.ebpf.program("edge_tc").context("no edge_tc")?.try_into()?;
                let result = program.test_run(options)?;
                let action = match result.return_value {
                    0 => Action::Pass,
                    2 => Action::Drop,
                    7 => Action::Redirect,
                    other => bail!("TC action {other}"),
                };
                (result, action)
            }
        };
        Ok(Outcome { action, frame: out[..result.data_size_out as usize].to_vec() })
    }

    /// The sum over CPUs of a service's counters.
    ///
    /// # Errors
    /// Where the map cannot be read.
    pub fn service_stats(&mut self, number: u32) -> Result<ServiceStats> {
        self.stats(name::SERVICE_STATS, number)
    }

    /// The sum over CPUs of a backend's counters.
    ///
    /// # Errors
    /// Where the map cannot be read.
    pub fn backend_stats(&mut self, number: u32) -> Result<ServiceStats> {
        self.stats(name::BACKEND_STATS, number)
    }

    fn stats(&mut self, map: &str, number: u32) -> Result<ServiceStats> {
        let map: PerCpuArray<_, ServiceStats> = PerCpuArray::try_from(self.ebpf.map_mut(map).context("no stats")?)?;
        let mut sum = ServiceStats::default();
        for stats in map.get(&number, 0)?.iter() {
            sum.packets_in += stats.packets_in;
            sum.bytes_in += stats.bytes_in;
            sum.packets_out += stats.packets_out;
            sum.bytes_out += stats.bytes_out;
            sum.half_opened += stats.half_opened;
            sum.opened += stats.opened;
            sum.closed += stats.closed;
        }
        Ok(sum)
    }

    /// How often `reason` was counted for a service.
    ///
    /// # Errors
    /// Where the map cannot be read.
    pub fn reason(&mut self, service: u32, reason: Reason) -> Result<u64> {
        let map = self.ebpf.map_mut(name::REASONS).context("no REASONS")?;
        let map: PerCpuArray<_, u64> = PerCpuArray::try_from(map)?;
        Ok(map.get(&(service * REASONS + reason as u32), 0)?.iter().sum())
    }

    /// Every reason counted so far, summed over services, by name.
    ///
    /// # Errors
    /// Where the map cannot be read.
    pub fn reasons(&mut self) -> Result<Vec<(&'static str, u64)>> {
        let mut found = Vec::new();
        for reason in Reason::ALL {
            let mut sum = 0;
            for service in 0..8 {
                sum += self.reason(service, *reason)?;
            }
            if sum != 0 {
                found.push((reason.name(), sum));
            }
        }
        Ok(found)
    }

    /// Excludes a backend, or takes it back: one write.
    ///
    /// # Errors
    /// Where the write fails.
    pub fn set_eligible(&mut self, backend: u32, eligible: bool) -> Result<()> {
        let state = if eligible { backend_state::ELIGIBLE } else { 0 };
        Ok(self.array(name::BACKEND_STATE)?.set(backend, state, 0)?)
    }

    /// The last next-hop number given out.
    ///
    /// # Errors
    /// Where the map cannot be read.
    pub fn next_hops(&mut self) -> Result<u32> {
        Ok(self.array::<u32>(name::NEXT_HOP_CURSOR)?.get(&0, 0)?)
    }

    /// Moves the route generation: entries look their routes up again.
    ///
    /// # Errors
    /// Where the map cannot be read or written.
    pub fn move_routes(&mut self) -> Result<()> {
        let mut control: Control = self.array(name::CONTROL)?.get(&0, 0)?;
        control.route_generation += 1;
        Ok(self.array(name::CONTROL)?.set(0, control, 0)?)
    }

    /// The next hop of this number.
    ///
    /// # Errors
    /// Where there is none.
    pub fn next_hop(&mut self, number: u32) -> Result<maps::NextHop> {
        Ok(self.array(name::NEXT_HOPS)?.get(&number, 0)?)
    }
}

/// Makes the maps of an object, and leaves its programs to be loaded.
fn open(object: &[u8], settings: &Settings) -> Result<Ebpf> {
    Ok(EbpfLoader::new()
        .map_max_entries(name::ESTABLISHED, settings.established)
        .map_max_entries(name::HALF_OPEN, settings.lru)
        .map_max_entries(name::CLOSING, settings.lru)
        .map_max_entries(name::ESTABLISHED_V6, settings.established)
        .map_max_entries(name::HALF_OPEN_V6, settings.lru)
        .map_max_entries(name::CLOSING_V6, settings.lru)
        .map_max_entries(name::SELECTION, 256)
        .map_max_entries(name::FLOW_CACHE, settings.cache.max(1))
        .map_max_entries(name::FLOW_CACHE_V6, settings.cache.max(1))
        .load(&for_this_kernel(object))?)
}

/// The flow cache of a loaded object.
///
/// # Errors
/// Where the object lacks a map, or it cannot be mapped.
pub fn map_cache(ebpf: &Ebpf) -> Result<FlowCache> {
    let map = |name: &str| match ebpf.map(name) {
        Some(Map::Array(data)) => Ok(data),
        _ => bail!("no array {name}"),
    };
    let [v4, v6] = [map(name::FLOW_CACHE)?, map(name::FLOW_CACHE_V6)?];
    let maps = [v4, v6, map(name::CACHE_WINDOWS)?, map(name::FLOW_GENERATIONS)?];
    let sets = [v4.info()?.max_entries(), v6.info()?.max_entries()];
    Ok(FlowCache::map(maps.map(|data| data.fd().as_fd()), sets, true)?)
}

/// Loads the entry program of one hook and its stages.
///
/// # Errors
/// What the verifier says.
pub fn load(ebpf: &mut Ebpf, hook: Hook) -> Result<()> {
    Ok(stages::fill(ebpf, hook == Hook::Xdp, true)?)
}

/// Loads a program by name.
///
/// # Errors
/// What the verifier says.
pub fn load_program(ebpf: &mut Ebpf, name: &str) -> Result<()> {
    stages::load(ebpf, name)?;
    Ok(())
}

/// `struct xdp_md`: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
pub fn xdp_context(len: u32, ingress: u32) -> Vec<u8> {
    [0, len, 0, ingress, 0, 0].iter().flat_map(|field: &u32| field.to_ne_bytes()).collect()
}

/// `struct __sk_buff` as far as a test run may set it.
pub fn skb_context(ingress: u32, gso_size: u32, gso_segs: u32) -> Vec<u8> {
    const IFINDEX: usize = 40;
    const GSO_SEGS: usize = 164;
    const GSO_SIZE: usize = 176;
    let mut context = vec![0; 192];
    for (offset, value) in [(IFINDEX, ingress), (GSO_SEGS, gso_segs), (GSO_SIZE, gso_size)] {
        context[offset..offset + 4].copy_from_slice(&value.to_ne_bytes());
    }
    context
}
