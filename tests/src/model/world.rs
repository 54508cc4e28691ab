//! The configuration of a world, drawn from its seed, and its way into the maps.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::Result;
use edge_common::{
    address::{Wide, unmapped},
    flow::{FlowKeyV4, FlowKeyV6},
    maps::{
        AddressFilter, AffinityKey, BackendEntry, CHUNK_BYTES, Chunk, Control, FragmentKey, NEXT_HOPS, NeighbourKey,
        OwnAddresses, Pending, PortSet, SNAT_ADDRESSES, ServiceEntry, ServiceKey, SourceId, SourceKey, SourceRange,
        backend_state, balance, interface_flag, mode, name, range_action, service_flag,
    },
};

use super::{
    dice::Dice,
    kernel::Kernel,
    network::{
        FAR, FAR_NARROW, FOREIGN_POD, MOVING_POD, NARROW_POD, NEAR, NOWHERE, Network, REFUSED, REFUSED_POD, SILENT,
        SILENT_POD, STUB_POD, at,
    },
    protect,
    state::{Config, Load, Pool, State, Weight},
    wire::{TCP, UDP},
};
use crate::datapath::rig::{CLIENT, FAMILIES, Family, OWN, OWN6, SNAT, VIP, pod, v6_table, wire};

/// Entries of the established table of every world: few, so that it fills up, and odd, so that one half of a flow may fit.
pub const ESTABLISHED: u32 = 13;
/// Entries of the LRU tables: so many more than a world has that nothing is evicted but by the world itself.
pub const LRU: u32 = 4096;
/// A service number that no map has.
const NO_SERVICE: u32 = 5000;
/// Service numbers in use are below this.
pub const SERVICES: u32 = 11;
/// Backend numbers in use are below this.
pub const BACKENDS: u32 = 64;

/// Who sends, and how packets reach services.
#[derive(Clone, Debug)]
pub struct World {
    /// Where clients are, see [`at`].
    pub clients: Vec<Ipv4Addr>,
    /// Ports that each client uses, from 40000 on.
    pub client_ports: u16,
    /// Frontends: family, port and protocol.
    pub frontends: Vec<(Family, u16, u8)>,
    /// Backends: address, port, protocol.
    pub backends: Vec<(IpAddr, u16, u8)>,
    /// Percent of packets that are damaged.
    pub damage: u64,
    /// The tables' start.
    pub start: State,
}

/// Draws a world.
pub fn draw(seed: u64, network: &Network) -> World {
    let mut dice = Dice(seed ^ 0x5eed);
    let mut world = World {
        clients: clients(&mut dice),
        client_ports: dice.pick(&[1, 2, 4, 8]),
        frontends: Vec::new(),
        backends: Vec::new(),
        damage: dice.pick(&[0, 5, 10, 25]),
        start: State::default(),
    };
    let config = world.start.configure();
    config.seed = [dice.word(), dice.word()];
    config.answers = dice.chance(75);
    config.generation = 1 + dice.roll(3) as u32;
    config.routes = network.routes();
    config.redirectable = vec![network.uplink, network.pods];
    // Where pods are, no address is known: nobody there is told anything.
    config.own.insert(network.uplink, OwnAddresses { v4: wire(OWN[0]), v6: wire(OWN6[0]) });
    config.established = ESTABLISHED as usize;
    config.next_hops = NEXT_HOPS - 1;
    config.ports = vec![!dice.chance(10); 65_536];
    (config.destinations, config.sources) = (vec![false; 65_536], vec![false; 65_536]);
    for family in FAMILIES {
        for place in [VIP, SNAT, Ipv4Addr::new(10, 1, 0, 2), Ipv4Addr::new(10, 1, 0, 3)] {
            config.destinations[bit(at(family, place))] = true;
        }
    }
    if dice.chance(30) {
        // A block of forbidden ports, of less than half of the span.
        config.ports[20_000..20_003].fill(false);
    }
    let services = [
        (1, 8443, TCP, mode::FULL_NAT),
        (2, 8444, TCP, mode::DNAT),
        (3, 53, UDP, mode::FULL_NAT),
        (4, 54, UDP, mode::DNAT),
        (5, 9000, TCP, mode::FULL_NAT),
        (6, 8445, TCP, mode::FULL_NAT),
        (7, 8446, TCP, mode::DNAT),
        (8, 55, UDP, mode::FULL_NAT),
    ];
    // Of every port that no other has.
    let of_all_ports = [(9, 0, TCP, mode::FULL_NAT), (10, 0, UDP, mode::DNAT), (10, 0, TCP, mode::DNAT)];
    let of_all_ports = of_all_ports[dice.roll(3) as usize];
    let v6 = dice.pick(&[0, 50, 50, 100]);
    for (number, port, protocol, mode) in services.into_iter().chain([of_all_ports]) {
        if number == 1 || dice.chance(if port == 0 { 30 } else { 55 }) {
            let family = if dice.chance(v6) { Family::V6 } else { Family::V4 };
            service(&mut world, &mut dice, number, family, (port, protocol, mode));
        }
    }
    if dice.chance(20) {
        let family = if dice.chance(v6) { Family::V6 } else { Family::V4 };
        world.frontends.push((family, 9001, TCP));
        world.start.configure().frontends.insert(service_key(family.vip(), 9001, TCP), NO_SERVICE);
    }
    world.start.next_hop_cursor = if dice.chance(8) { NEXT_HOPS - 1 - dice.roll(4) as u32 } else { 0 };
    world
}

fn clients(dice: &mut Dice) -> Vec<Ipv4Addr> {
    let mut clients = vec![CLIENT];
    for _ in 0..dice.roll(4) {
        clients.push(dice.pick(&[NEAR, FAR, FAR, FAR_NARROW, SILENT, REFUSED, NOWHERE, pod(1)]));
    }
    clients
}

/// The prefilter's bit of an address.
fn bit(address: IpAddr) -> usize {
    Config::bit(address.is_ipv6(), &wire(address))
}

fn service(world: &mut World, dice: &mut Dice, number: u32, family: Family, (port, protocol, mode): (u16, u8, u8)) {
    let at = |place| at(family, place);
    let mut pool = Pool::default();
    let members = [1, 1, 2, 3, 5][dice.roll(5) as usize] * u64::from(number != 5 || dice.chance(50));
    // Of every port in dnat mode: such backends keep the port.
    let backend_port = match port {
        0 if mode == mode::DNAT => 0,
        0 => dice.pick(&[0, 443]),
        _ => dice.pick(&[443, 443, 8080]),
    };
    let without_source = number == 5;
    let limited = dice.chance(40);
    for _ in 0..members {
        let address = match dice.roll(10) {
            0..7 => pod(dice.roll(4) as u8),
            7 => dice.pick(&[NARROW_POD, MOVING_POD]),
            8 => dice.pick(&[NEAR, STUB_POD, FOREIGN_POD]),
            _ => dice.pick(&[SILENT_POD, REFUSED_POD]),
        };
        let address = at(address);
        let chosen = world.backends.len() as u32 + 1;
        world.backends.push((address, backend_port, protocol));
        let snat_address = if without_source { [0; 4] } else { wire(at(SNAT)) };
        let backend = BackendEntry {
            address: wire(address),
            port: backend_port.to_be(),
            protocol,
            service: number,
            snat_address,
            limit: if limited { dice.pick(&[0, 1, 2, 3, 4, 5, 8, 12]) } else { 0 },
            ..BackendEntry::default()
        };
        // The counters have been running for a while.
        let live = dice.word() as u32;
        let expired = dice.roll(1 << 20) << 32 | u64::from(live.wrapping_add(1).wrapping_sub(dice.roll(3) as u32));
        world.start.loads.insert(chosen, Load { live, expired, pending: Pending::default() });
        let config = world.start.configure();
        config.backends.insert(chosen, backend);
        config.eligible.insert(chosen, dice.chance(85));
        config
            .weights
            .insert(chosen, Weight { weight: dice.pick(&[0, 1, 1, 2, 65_535]), share: dice.pick(&[0, 0, 10, 100]) });
        if mode == mode::DNAT {
            config.dnat_backends.insert(service_key(address, backend_port, protocol), chosen);
            config.sources[bit(address)] = true;
        }
        pool.members.push(chosen);
    }
    if members != 0 {
        let len = dice.pick(&[1, 7, 31, 127, 1021]);
        // Mostly one member, at times, so that only the scan of the pool finds the others.
        let spread = if dice.chance(25) { 1 } else { members };
        let backups = if members > 1 && dice.chance(40) { 1 + dice.roll(members - 1) } else { 0 };
        if backups != 0 {
            let members = pool.members.split_off((members - backups) as usize);
            let table = (0..dice.pick(&[1, 7, 31])).map(|_| dice.roll(backups) as u16).collect();
            pool.backup = Some(Box::new(Pool { members, table, backup: None }));
        }
        let spread = spread.min(members - backups);
        pool.table = (0..len).map(|_| dice.roll(spread) as u16).collect();
    }
    let ports = dice.pick(&[1, 2, 3, 8, 64, 1000]);
    let snat_count = if without_source { 0 } else { dice.pick(&[0, 0, 0, 1, 2, 4]) };
    let mut snat_addresses = [[0; 4]; SNAT_ADDRESSES];
    let choices = [SNAT, Ipv4Addr::new(10, 1, 0, 2), Ipv4Addr::new(10, 1, 0, 3), VIP];
    for (to, from) in snat_addresses.iter_mut().zip(choices).take(snat_count as usize) {
        *to = wire(at(from));
    }
    let entry = ServiceEntry {
        address: wire(at(VIP)),
        port: port.to_be(),
        protocol,
        mode,
        snat_count,
        snat_addresses,
        snat_port_min: 20_000,
        snat_port_max: 20_000 + (ports - 1),
        established_timeout: dice.pick(&[2, 8, 60, 300]),
        half_open_timeout: dice.pick(&[1, 5, 30]),
        closing_timeout: dice.pick(&[1, 2, 10, 60]),
        mss: dice.pick(&[0, 0, 536, 1200, 1400]),
        flags: dice.pick(&[0, 0, service_flag::DEDICATED, service_flag::ONE_REPLY]),
        affinity_timeout: dice.pick(&[0, 0, 1, 10, 60]),
        balance: dice.pick(&[balance::MAGLEV, balance::MAGLEV, balance::ROUND_ROBIN, balance::LEAST_CONNECTIONS]),
        ..ServiceEntry::default()
    };
    world.start.turns.insert(number, dice.pick(&[0, 7, u32::MAX - 3]));
    world.frontends.push((family, port, protocol));
    world.start.configure().frontends.insert(service_key(at(VIP), port, protocol), number);
    world.start.configure().services.insert(number, (entry, pool));
    if dice.chance(40) {
        protection(world.start.configure(), number, dice, &world.clients);
    }
}

/// Gives a service other source ranges and limits.
pub fn protection(config: &mut Config, number: u32, dice: &mut Dice, clients: &[Ipv4Addr]) {
    config.ranges.retain(|range, _| range.source.service != number);
    let v6 = config.services.get(&number).is_some_and(|(service, _)| unmapped(&service.address).is_none());
    let ranges = if dice.chance(50) { 1 + dice.roll(4) } else { 0 };
    for _ in 0..ranges {
        // An IPv4 address is the last of the 16 bytes. A frontend has the ranges of its service's other family, too.
        let of_v6 = v6 && dice.chance(80);
        let lens = if of_v6 { [0, 16, 32, 48, 64, 65, 127, 128] } else { [96, 104, 112, 120, 121, 126, 127, 128] };
        let client = at(if of_v6 { Family::V6 } else { Family::V4 }, dice.pick(clients));
        config.ranges.insert(protect::range(number, &wire(client), dice.pick(&lens)), dice.chance(60));
    }
    let Some((service, _)) = config.services.get_mut(&number) else { return };
    service.flags &= !(service_flag::SOURCE_RANGES | service_flag::SOURCES_REFUSED_BY_DEFAULT);
    if ranges != 0 {
        let by_default = if dice.chance(30) { service_flag::SOURCES_REFUSED_BY_DEFAULT } else { 0 };
        service.flags |= service_flag::SOURCE_RANGES | by_default;
    }
    service.source_flow_rate = dice.pick(&[0, 0, 5, 100, 3000]);
    service.source_flow_burst = dice.pick(&[1, 2, 5, 20]);
    service.source_packet_rate = dice.pick(&[0, 0, 100, 2000, 7000]);
    service.source_packet_burst = dice.pick(&[1, 3, 20, 100]);
    service.source_half_open = dice.pick(&[0, 0, 1, 2, 5]);
}

/// Writes a service's source ranges and limits, and forgets how often ranges decided that are no more.
///
/// # Errors
/// Where the kernel refuses a write.
pub fn write_protection(state: &mut State, kernel: &Kernel, number: u32) -> Result<()> {
    let map = kernel.map(name::SOURCE_RANGES)?;
    let of_service = |range: &SourceKey| range.source.service == number;
    map.keys::<SourceKey>().iter().filter(|range| of_service(range)).for_each(|range| map.delete(range));
    state.range_hits.retain(|range, _| !of_service(range));
    for (range, allowed) in state.config.ranges.iter().filter(|(range, _)| of_service(range)) {
        let action = if *allowed { range_action::ALLOW } else { range_action::DENY };
        map.set(range, &SourceRange { action, ..SourceRange::default() })?;
    }
    match state.config.services.get(&number) {
        Some((service, _)) => kernel.map(name::SERVICES)?.set(&number, service),
        None => Ok(()),
    }
}

/// A frontend's or backend's key.
pub fn service_key(address: IpAddr, port: u16, protocol: u8) -> ServiceKey {
    ServiceKey { address: wire(address), port: port.to_be(), protocol, _pad: 0 }
}

/// Empties the maps and writes a world into them.
///
/// # Errors
/// Where the kernel refuses a write.
pub fn write(world: &mut World, kernel: &Kernel) -> Result<()> {
    for table in [name::ESTABLISHED, name::HALF_OPEN, name::CLOSING] {
        clear::<FlowKeyV4>(kernel, table)?;
        clear::<FlowKeyV6>(kernel, &v6_table(table))?;
    }
    kernel.rig.cache.drain::<u32>(|_| {});
    kernel.rig.cache.drain::<Wide>(|_| {});
    clear::<ServiceKey>(kernel, name::SERVICE_INDEX)?;
    clear::<ServiceKey>(kernel, name::BACKEND_INDEX)?;
    clear::<NeighbourKey>(kernel, name::NEXT_HOP_INDEX)?;
    clear::<FragmentKey>(kernel, name::FRAGMENTS)?;
    clear::<u32>(kernel, name::OWN_ADDRESSES)?;
    clear::<SourceKey>(kernel, name::SOURCE_RANGES)?;
    clear::<SourceId>(kernel, name::SOURCES)?;
    clear::<AffinityKey>(kernel, name::AFFINITY)?;
    for (service, turn) in &world.start.turns {
        kernel.map(name::SERVICE_CURSOR)?.set(service, turn)?;
    }
    for (interface, addresses) in &world.start.config.own {
        kernel.map(name::OWN_ADDRESSES)?.set(interface, addresses)?;
    }
    kernel.map(name::NEXT_HOP_CURSOR)?.set(&0u32, &world.start.next_hop_cursor)?;
    write_control(&world.start.config, kernel)?;
    write_filter(&world.start.config, kernel)?;
    kernel.map(name::ANSWERS_FROM)?.set(&0u32, &u64::from(world.start.config.answers))?;
    let mut chunk = 1;
    for number in 1..SERVICES {
        let mut entry = ServiceEntry::default();
        if let Some((service, pool)) = world.start.configure().services.get_mut(&number) {
            service.selection = region(kernel, pool, &mut chunk)?;
            entry = *service;
        }
        kernel.map(name::SERVICES)?.set(&number, &entry)?;
        write_protection(&mut world.start, kernel, number)?;
    }
    let config = &world.start.config;
    for (key, number) in &config.frontends {
        kernel.map(name::SERVICE_INDEX)?.set(key, number)?;
    }
    for (key, number) in &config.dnat_backends {
        kernel.map(name::BACKEND_INDEX)?.set(key, number)?;
    }
    for (number, backend) in &config.backends {
        kernel.map(name::BACKENDS)?.set(number, backend)?;
        write_backend_state(config, kernel, *number)?;
        kernel.set_load(*number, &world.start.loads[number])?;
        world.start.cursors.insert(*number, kernel.map(name::BACKEND_CURSOR)?.get(number).unwrap_or(0));
    }
    Ok(())
}

fn clear<K: aya::Pod + Default>(kernel: &Kernel, table: &str) -> Result<()> {
    let map = kernel.map(table)?;
    map.keys::<K>().iter().for_each(|key| map.delete(key));
    Ok(())
}

/// Writes what the daemon tells the program as a whole, and which interfaces XDP may redirect to.
///
/// # Errors
/// Where the kernel refuses a write.
pub fn write_control(config: &Config, kernel: &Kernel) -> Result<()> {
    let control = Control { seed: config.seed, route_generation: config.generation, ..Control::default() };
    kernel.map(name::CONTROL)?.set(&0u32, &control)?;
    clear::<u32>(kernel, name::INTERFACES)?;
    for interface in &config.redirectable {
        kernel.map(name::INTERFACES)?.set(interface, &(interface_flag::ATTACHED | interface_flag::XDP_REDIRECT))?;
    }
    Ok(())
}

/// Writes whether a backend may have new flows, and its weight.
///
/// # Errors
/// Where the kernel refuses the write.
pub fn write_backend_state(config: &Config, kernel: &Kernel, backend: u32) -> Result<()> {
    let Weight { weight, share } = config.weights.get(&backend).copied().unwrap_or_default();
    let eligible = if config.eligible.get(&backend).copied().unwrap_or(false) { backend_state::ELIGIBLE } else { 0 };
    let word = weight << backend_state::WEIGHT_SHIFT | share << backend_state::SHARE_SHIFT | eligible;
    kernel.map(name::BACKEND_STATE)?.set(&backend, &word)
}

fn words<const N: usize>(bits: &[bool]) -> [u64; N] {
    std::array::from_fn(|word| (0..64).fold(0, |value, bit| value | u64::from(bits[word * 64 + bit]) << bit))
}

fn write_filter(config: &Config, kernel: &Kernel) -> Result<()> {
    let filter = AddressFilter { destinations: words(&config.destinations), sources: words(&config.sources) };
    kernel.map(name::ADDRESS_FILTER)?.set(&0u32, &filter)?;
    kernel.map(name::SNAT_PORTS)?.set(&0u32, &PortSet(words(&config.ports)))
}

/// Writes a selection region; its first chunk, 0 for no pool.
fn region(kernel: &Kernel, pool: &Pool, chunk: &mut u32) -> Result<u32> {
    if pool.members.is_empty() {
        return Ok(0);
    }
    let backup = pool.backup.as_deref().map_or(Ok(0), |backup| region(kernel, backup, chunk))?;
    let members: Vec<u8> = pool.members.iter().flat_map(|number| number.to_ne_bytes()).collect();
    let table: Vec<u8> = pool.table.iter().flat_map(|index| index.to_ne_bytes()).collect();
    let first = *chunk;
    let table_chunk = first + 1 + members.len().div_ceil(CHUNK_BYTES) as u32;
    let head = [pool.members.len() as u32, pool.table.len() as u32, first + 1, table_chunk, backup];
    let head: Vec<u8> = head.iter().flat_map(|field| field.to_ne_bytes()).collect();
    for bytes in [head, members, table] {
        for part in bytes.chunks(CHUNK_BYTES) {
            let mut value = Chunk([0; CHUNK_BYTES]);
            value.0[..part.len()].copy_from_slice(part);
            kernel.map(name::SELECTION)?.set(chunk, &value)?;
            *chunk += 1;
        }
    }
    Ok(first)
}
