//! What happens next in a world: a packet, or something else. Drawn from a step's own seed and the tables, so that a step
//! means something after others before it have been left out.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use edge_common::{address::Wide, maps::AffinityKey};

use super::{
    connections::bits::{ACK, FIN, RST, SYN},
    dice::Dice,
    flow::{Flow, Key},
    network::{BASE, FAR, NOWHERE, Network, Shape, at},
    state::{State, TABLES, Table},
    wire::{TCP, UDP},
    world::World,
};
use crate::datapath::{
    frame::Frame,
    icmp::IcmpError,
    rig::{CLIENT, Family, SNAT, VIP, wire},
};

/// One step of a world.
#[derive(Clone, Debug)]
pub enum Move {
    /// A packet.
    Packet {
        /// Its frame.
        frame: Vec<u8>,
        /// Interface it comes in by.
        ingress: u32,
        /// TC: bytes of payload per segment; 0: one packet.
        gso_size: u32,
        /// The frame comes under [`TAG`].
        tagged: bool,
    },
    /// Time passes: nanoseconds.
    Age(u64),
    /// A backend may have new flows, or may not.
    Eligible(u32, bool),
    /// An LRU table, or the daemon, loses one entry.
    Forget(Table, Key),
    /// The daemon takes established flows out whose time is over.
    Sweep,
    /// Routes are to be looked up again.
    Generation,
    /// XDP may redirect to the pods' interface, or may not.
    Redirectable(bool),
    /// An entry's next hop or service becomes a number that none has.
    Spoil(Table, Key, bool),
    /// A backend has so many flows; below zero for a moment, when an expiry overtakes the opening.
    Load(u32, i32),
    /// The client whose home this is has none, or has it with another backend.
    Home(AffinityKey, Option<u32>),
    /// A service gets other source ranges and limits: its number, what they are drawn from, and for whom.
    Protect(u32, u64, Vec<Ipv4Addr>),
    /// Routes and neighbours change.
    Network(Shape),
}

/// A VLAN tag with a priority, of a VLAN that is in this world what the link is.
pub const TAG: [u8; 4] = [0x81, 0x00, 0x60, VLAN as u8];
/// The number in it.
pub const VLAN: u16 = 5;

const SECONDS: [f64; 10] = [0.2, 0.7, 1.4, 2.6, 2.6, 5.5, 10.5, 31.0, 61.5, 301.0];

/// What step `seed` is.
pub fn next(seed: u64, world: &World, state: &State, network: &Network) -> Move {
    let mut dice = Dice(seed);
    let other = match dice.roll(1000) {
        0..40 => Some(Move::Age((dice.pick(&SECONDS) * 1e9) as u64)),
        40..55 => state.config.eligible.keys().nth(dice.roll(40) as usize).map(|n| Move::Eligible(*n, dice.chance(75))),
        55..67 => any_entry(&mut dice, state).map(|(table, flow)| Move::Forget(table, flow.key)),
        67..82 => Some(Move::Sweep),
        82..94 => Some(Move::Generation),
        94..98 => Some(Move::Redirectable(dice.chance(70))),
        98..100 => any_entry(&mut dice, state).map(|(table, flow)| Move::Spoil(table, flow.key, dice.chance(50))),
        101..108 => {
            let services = &state.config.services;
            let number = services.keys().nth(dice.roll(services.len() as u64) as usize).copied();
            number.map(|number| Move::Protect(number, dice.word(), world.clients.clone()))
        }
        108..120 => state.loads.keys().nth(dice.roll(40) as usize).map(|n| Move::Load(*n, dice.roll(11) as i32 - 2)),
        120..128 => {
            let home = state.homes.keys().nth(dice.roll(20) as usize);
            let backend = 1 + dice.roll(world.backends.len().max(1) as u64) as u32;
            home.map(|home| Move::Home(*home, dice.chance(60).then_some(backend)))
        }
        100 if dice.chance(60) => Some(Move::Network(shape(&mut dice, network))),
        _ => None,
    };
    other.unwrap_or_else(|| packet(&mut dice, world, state, network))
}

fn shape(dice: &mut Dice, network: &Network) -> Shape {
    let now = network.shape();
    match dice.roll(4) {
        0 => BASE,
        1 => Shape { mac: dice.pick(&[0, 77, 78]), ..now },
        2 => Shape { mtu: dice.pick(&[600, 1400]), ..now },
        _ => Shape { moved: !now.moved, ..now },
    }
}

fn any_entry(dice: &mut Dice, state: &State) -> Option<(Table, Flow)> {
    let table = dice.pick(&TABLES);
    entry(dice, state, table, None).map(|flow| (table, flow))
}

/// An entry of a table, of one direction if asked for.
fn entry(dice: &mut Dice, state: &State, table: Table, direction: Option<u8>) -> Option<Flow> {
    let flows = state.table(table);
    let suits = |flow: &&Flow| direction.is_none_or(|wanted| flow.direction == wanted);
    let count = flows.values().filter(suits).count() as u64;
    if count == 0 { None } else { flows.values().filter(suits).nth(dice.roll(count) as usize).copied() }
}

fn endpoint(v6: bool, address: Wide, port: u16) -> SocketAddr {
    let words = address.map(u32::to_ne_bytes);
    let address = if v6 {
        IpAddr::from(<[u8; 16]>::try_from(words.concat()).unwrap_or_default())
    } else {
        IpAddr::from(words[3])
    };
    SocketAddr::new(address, u16::from_be(port))
}

fn packet(dice: &mut Dice, world: &World, state: &State, network: &Network) -> Move {
    let (frame, mut ingress) = match dice.roll(100) {
        0..30 => (client_packet(dice, world, state), network.uplink),
        30..52 => (of_a_flow(dice, world, state, 0), network.uplink),
        52..88 => (of_a_flow(dice, world, state, 1), network.pods),
        88..92 => (stray_reply(dice, world), network.pods),
        92..94 => (to_another_port(dice), network.uplink),
        94..95 => (of_others(dice), network.uplink),
        95..97 => (client_packet(dice, world, state), network.pods),
        _ => return error(dice, world, state, network),
    };
    if dice.chance(5) {
        ingress = dice.pick(&[network.uplink, network.pods]);
    }
    let gso_size = if dice.chance(5) { 300 + dice.roll(400) as u32 } else { 0 };
    let mut bytes = frame.bytes();
    if dice.chance(world.damage) {
        damage(dice, &mut bytes);
    }
    Move::Packet { frame: bytes, ingress, gso_size, tagged: gso_size == 0 && dice.chance(6) }
}

/// An ICMP error about a packet as the far end of a flow was to get it, or as nobody was.
fn error(dice: &mut Dice, world: &World, state: &State, network: &Network) -> Move {
    let table = dice.pick(&TABLES);
    let direction = dice.roll(2) as u8;
    let (about, mut ingress) = match entry(dice, state, table, Some(direction)) {
        Some(Flow { key, .. }) if dice.chance(80) => {
            let (src, dst) = (endpoint(key.v6, key.dst, key.dst_port), endpoint(key.v6, key.src, key.src_port));
            let ingress = if direction == 0 { network.uplink } else { network.pods };
            (build(dice, &State::default(), src, dst, key.protocol, false), ingress)
        }
        // What a client sends, to the VIP or already to a backend; turned round, what it is answered.
        _ => {
            let sent = client_packet(dice, world, state);
            match (world.backends.is_empty(), dice.roll(2)) {
                (false, 0) => {
                    let (address, port, protocol) = dice.pick(&world.backends);
                    let port = some_port(dice, port);
                    (of_one_family(Frame { dst: SocketAddr::new(address, port), protocol, ..sent }), network.pods)
                }
                _ => (Frame { src: sent.dst, dst: sent.src, ..sent }, network.uplink),
            }
        }
    };
    let (sender, receiver) = (about.src.ip(), about.dst.ip());
    let family = if about.src.is_ipv6() { Family::V6 } else { Family::V4 };
    let places = [Ipv4Addr::new(10, 1, 0, 200), Ipv4Addr::new(172, 16, 1, 200)].map(|place| at(family, place));
    let mut router = dice.pick(&[receiver, receiver, places[0], places[1]]);
    if family == Family::V6 && dice.chance(6) {
        router = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0x77).into();
    }
    let to = if dice.chance(4) { at(family, dice.pick(&[VIP, SNAT, CLIENT])) } else { sender };
    let packet = about.bytes();
    let quoted = match dice.roll(4) {
        0 => about.header_len() + 8,
        1 => about.header_len() + dice.roll(24) as usize,
        _ => packet.len() - 14,
    };
    let quote = packet.get(14..14 + quoted).unwrap_or(&packet[14..]);
    let kinds = match family {
        Family::V4 => [(3, 0), (3, 3), (3, 4), (3, 4), (11, 0), (11, 0), (12, 0), (8, 0)],
        Family::V6 => [(1, 0), (1, 4), (2, 0), (2, 0), (3, 0), (3, 0), (4, 1), (128, 0)],
    };
    let (kind, code) = dice.pick(&kinds);
    let error = IcmpError {
        ttl: if dice.chance(6) { dice.roll(3) as u8 } else { 64 },
        fragment: dice.pick(&[0, 0x4000, 0x4000]),
        options: vec![1; dice.pick(&[0, 0, 0, 0, 4, 40])],
        extensions: extensions(dice),
        rest: [0, 0, 5, dice.word() as u8],
        ..IcmpError::new(router, to, kind, code, quote)
    };
    if dice.chance(5) {
        ingress = dice.pick(&[network.uplink, network.pods]);
    }
    let mut frame = error.bytes();
    if dice.chance(world.damage) {
        damage(dice, &mut frame);
    }
    Move::Packet { frame, ingress, gso_size: 0, tagged: dice.chance(6) }
}

fn client_packet(dice: &mut Dice, world: &World, state: &State) -> Frame {
    let (family, port, protocol) = dice.pick(&world.frontends);
    let mut client = at(family, dice.pick(&world.clients));
    if family == Family::V6 && dice.chance(2) {
        client = CLIENT.to_ipv6_mapped().into();
    }
    let port = some_port(dice, port);
    let client = SocketAddr::new(client, 40_000 + dice.roll(world.client_ports.into()) as u16);
    build(dice, state, client, SocketAddr::new(family.vip(), port), protocol, false)
}

/// A port, or where that is 0 any one: of another service, too.
fn some_port(dice: &mut Dice, port: u16) -> u16 {
    if port == 0 { dice.pick(&[0, 7, 7, 443, 8080, 8443, 8444, 53, 65_535]) } else { port }
}

fn of_a_flow(dice: &mut Dice, world: &World, state: &State, direction: u8) -> Frame {
    let table = dice.pick(&[Table::Established, Table::Established, Table::HalfOpen, Table::HalfOpen, Table::Closing]);
    let Some(flow) = entry(dice, state, table, Some(direction)) else {
        return client_packet(dice, world, state);
    };
    let key = flow.key;
    let (src, dst) = (endpoint(key.v6, key.src, key.src_port), endpoint(key.v6, key.dst, key.dst_port));
    build(dice, state, src, dst, key.protocol, direction == 1)
}

fn stray_reply(dice: &mut Dice, world: &World) -> Frame {
    if world.backends.is_empty() {
        return to_another_port(dice);
    }
    let (address, port, protocol) = dice.pick(&world.backends);
    let port = if dice.chance(70) { some_port(dice, port) } else { 1 };
    let family = if address.is_ipv6() { Family::V6 } else { Family::V4 };
    let to = at(family, dice.pick(&[CLIENT, FAR, NOWHERE, VIP, SNAT]));
    build(dice, &State::default(), SocketAddr::new(address, port), SocketAddr::new(to, 40_000), protocol, true)
}

fn to_another_port(dice: &mut Dice) -> Frame {
    let family = dice.pick(&[Family::V4, Family::V6]);
    let to = at(family, dice.pick(&[VIP, SNAT, Ipv4Addr::new(10, 1, 0, 3)]));
    let from = at(family, CLIENT);
    let (port, protocol) = (dice.pick(&[22, 53, 8443, 20_000, 20_001]), dice.pick(&[TCP, UDP]));
    build(dice, &State::default(), SocketAddr::new(from, 50_000), SocketAddr::new(to, port), protocol, false)
}

fn of_others(dice: &mut Dice) -> Frame {
    let v6 = dice.chance(50);
    let mut address = || match v6 {
        true => IpAddr::from((u128::from(dice.word()) << 64 | u128::from(dice.word())).to_be_bytes()),
        false => IpAddr::from((dice.word() as u32).to_be_bytes()),
    };
    let (src, dst) = (SocketAddr::new(address(), 1), SocketAddr::new(address(), 2));
    let protocol = dice.pick(&[TCP, UDP]);
    build(dice, &State::default(), src, dst, protocol, false)
}

/// A packet with headers that matter to its flow.
fn build(dice: &mut Dice, state: &State, src: SocketAddr, dst: SocketAddr, protocol: u8, reply: bool) -> Frame {
    let mut frame = if protocol == TCP { Frame::tcp(src, dst, 0) } else { Frame::udp(src, dst) };
    if protocol == TCP {
        frame.flags = flags(dice, reply);
        frame.seq = dice.pick(&[999, u32::MAX, 0x7fff_ffff]);
        frame.ack = ack(dice, state, &frame);
        if dice.chance(if frame.flags & SYN != 0 { 40 } else { 3 }) {
            frame.tcp_options = tcp_options(dice);
        }
    } else {
        frame.no_checksum = dice.chance(10);
    }
    frame.ttl = if dice.chance(4) { dice.roll(3) as u8 } else { 64 };
    frame.fragment = if dice.chance(50) { 0x4000 } else { 0 };
    if dice.chance(4) {
        frame.fragment |= dice.pick(&[0x2000, 0x0003, 0x2003]);
    }
    if dice.chance(3) {
        frame.options = vec![1; dice.pick(&[4, 8, 40])];
    }
    frame.extensions = extensions(dice);
    if dice.chance(4) {
        // Offset in units of 8 bytes, two bits that mean nothing, "more".
        let bits = dice.pick(&[0x0001_u16, 0x0001, 0x0007, 0x0018, 0x0019]).to_be_bytes();
        let header = vec![0, 0, bits[0], bits[1], 0xbe, 0xef, 0, dice.roll(2) as u8];
        frame.extensions.push((44, header));
        if dice.chance(20) {
            frame.extensions.extend(extensions(dice));
        }
    }
    let len = match dice.roll(100) {
        0..85 => dice.roll(24),
        85..95 if src.is_ipv6() => 1220 + dice.roll(80),
        85..95 => 540 + dice.roll(60),
        _ => 1400 + dice.roll(140),
    };
    frame.payload = vec![dice.word() as u8; len as usize];
    frame
}

/// Options of a TCP header, a multiple of 4 bytes and at most 40: as stacks send them, and as nobody should.
fn tcp_options(dice: &mut Dice) -> Vec<u8> {
    let mut options = Vec::new();
    for _ in 0..=dice.roll(5) {
        let size = dice.pick(&[256_u16, 536, 1000, 1200, 1201, 1460, 8960]).to_be_bytes();
        let option: &[u8] = match dice.roll(12) {
            0..4 => &[2, 4, size[0], size[1]],
            4 => &[1],
            5 => &[4, 2],
            6 => &[3, 3, 7],
            7 => &[8, 10, 0, 0, 0, 1, 0, 0, 0, 0],
            8 => &[254, 4, 0xf9, 0x89],
            9 => &[1, 1, 1, 1, 1],
            10 => &[0],
            _ => &[dice.word() as u8, dice.roll(12) as u8],
        };
        options.extend(option);
    }
    options.resize(options.len().next_multiple_of(4), 1);
    options.truncate(40);
    options
}

/// Now and then, headers between an IPv6 header and what it carries: as they are sent, and as nobody should.
fn extensions(dice: &mut Dice) -> Vec<(u8, Vec<u8>)> {
    let count = match dice.roll(100) {
        0..6 => 1 + dice.roll(3),
        6 => 6 + dice.roll(4),
        _ => 0,
    };
    let mut headers = Vec::new();
    for _ in 0..count {
        // Authentication, and a number that is nobody's, end a walk.
        let other = if dice.chance(10) { 51 } else { 60 };
        let number = dice.pick(&[0, 0, 43, 44, 60, 60, 60, 60, other]);
        let units = if dice.chance(90) { dice.roll(3) } else { 20 };
        // An unfragmented fragment header has a length of its own; what its second byte says means nothing.
        let len = if number == 44 { 8 } else { 8 * (1 + units as usize) };
        let mut bytes = vec![0; len];
        bytes[1] = units as u8;
        bytes[3] = u8::from(number == 43 && dice.chance(20));
        headers.push((number, bytes));
    }
    headers
}

/// A frame whose ends are of one family: that of its receiver.
fn of_one_family(frame: Frame) -> Frame {
    if frame.src.is_ipv6() == frame.dst.is_ipv6() {
        return frame;
    }
    let family = if frame.dst.is_ipv6() { Family::V6 } else { Family::V4 };
    Frame { src: SocketAddr::new(family.client(), frame.src.port()), ..frame }
}

fn flags(dice: &mut Dice, reply: bool) -> u8 {
    match dice.roll(100) {
        0..25 if reply => SYN | ACK,
        0..25 => SYN,
        25..75 => ACK,
        75..88 => FIN | ACK,
        88..92 => RST,
        92..94 => RST | ACK,
        94..96 => SYN | ACK,
        96 => 0,
        _ => dice.word() as u8,
    }
}

/// An acknowledgement around the edges of what promotes.
fn ack(dice: &mut Dice, state: &State, frame: &Frame) -> u32 {
    let key = Key {
        v6: frame.src.is_ipv6(),
        src: wire(frame.src.ip()),
        dst: wire(frame.dst.ip()),
        src_port: frame.src.port().to_be(),
        dst_port: frame.dst.port().to_be(),
        protocol: TCP,
    };
    let floor = state.flow(Table::HalfOpen, &key).map_or(1000, |flow| flow.ack_floor);
    let off = dice.pick(&[0, 0, 0, 1, 1 << 19, (1 << 20) - 1, 1 << 20, u32::MAX, 1 << 31]);
    floor.wrapping_add(off)
}

/// Changes bytes as a broken sender, a broken link or an attacker would.
fn damage(dice: &mut Dice, frame: &mut Vec<u8>) {
    let (length, protocol) = if frame[12..14] == [0x86, 0xdd] { (19, 20) } else { (17, 23) };
    match dice.roll(10) {
        0 => frame.truncate(14 + dice.roll(frame.len() as u64 - 13) as usize),
        1 => frame.truncate(14 + dice.roll(60.min(frame.len() as u64 - 13)) as usize),
        2 => frame[14] = dice.word() as u8,
        3 => frame[14] = frame[14] & 0xf0 | dice.roll(16) as u8,
        4 => frame[length] = frame[length].wrapping_add(dice.pick(&[1, 255, 8, 248, 128])),
        5 => frame[protocol] = dice.pick(&[0, 1, 6, 17, 43, 44, 58, 60, 132]),
        6 if frame.len() > 46 => frame[46] = dice.word() as u8,
        7 => frame[12..14].copy_from_slice(&dice.pick(&[[0x86, 0xdd], [0x08, 0x00], [0x81, 0x00], [0x08, 0x06]])),
        8 => frame.extend([0; 7]),
        _ => {
            for _ in 0..=dice.roll(3) {
                let at = dice.roll(frame.len().min(60) as u64) as usize;
                frame[at] = dice.word() as u8;
            }
        }
    }
}
