//! Tagged frames over veth, on native XDP, generic XDP and TC: clients in an 802.1Q VLAN inside an 802.1ad one on the uplink,
//! backends in an 802.1Q VLAN of the other link. Two more links stand for the VLAN devices, which not every kernel has: the
//! routes lead over them, and the program is told which tags of which link they are.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context, Result, ensure};
use edge_common::{
    flow::{TCP, UDP},
    maps::{OwnAddresses, Port, mode, name},
};
use edge_tests::datapath::{
    frame::{Frame, flag},
    icmp::IcmpError,
    namespace::{ifindex, in_namespace, ip},
    rig::{
        CLIENT, CLIENT_MAC, FAMILIES, Family, PODS_MAC, Rig, SNAT, Settings, UPLINK_MAC, VIP, key, mac, pod, pod_mac,
        snat_of, wire,
    },
    tap::{Expect, Row, Side, Taps, Wire},
};

/// Tags as they are on the wire; the clients' have a priority, which comes back to them but goes no further.
const CLIENTS_OUTER: [u8; 4] = [0x88, 0xa8, 0xa0, 9];
const CLIENTS_INNER: [u8; 4] = [0x81, 0, 0x60, 5];
const PODS: [u8; 4] = [0x81, 0, 0, 7];

const OFFICE_MAC: [u8; 6] = [2, 0, 0, 0, 9, 5];
const RACK_MAC: [u8; 6] = [2, 0, 0, 0, 9, 7];
const OFFICE_CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 5, 10];
const RACK_POD_MAC: [u8; 6] = [2, 0, 0, 0, 7, 4];

const OFFICE: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(192, 168, 5, 1)), IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 5, 0, 0, 0, 0, 1))];
const OFFICE_CLIENT: (Ipv4Addr, Ipv6Addr) =
    (Ipv4Addr::new(192, 168, 5, 10), Ipv6Addr::new(0x2001, 0xdb8, 5, 0, 0, 0, 0, 0x10));
const RACK: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(10, 7, 0, 1)), IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 7, 0, 0, 0, 0, 1))];
const RACK_POD: (Ipv4Addr, Ipv6Addr) = (Ipv4Addr::new(10, 7, 0, 4), Ipv6Addr::new(0x2001, 0xdb8, 7, 0, 0, 0, 0, 4));

/// A frame under tags, the outer one first.
fn tagged(frame: &[u8], tags: &[[u8; 4]]) -> Vec<u8> {
    [&frame[..12], &tags.concat(), &frame[12..]].concat()
}

fn from_client(frame: &[u8]) -> Vec<u8> {
    tagged(frame, &[CLIENTS_OUTER, CLIENTS_INNER])
}

/// As the edge sends to clients: no priority.
fn to_client(frame: &[u8]) -> Vec<u8> {
    tagged(frame, &[[0x88, 0xa8, 0, 9], [0x81, 0, 0, 5]])
}

fn pods_side(frame: &[u8]) -> Vec<u8> {
    tagged(frame, &[PODS])
}

/// An open flow of a service whose client and backend are in VLANs.
struct Flow {
    what: String,
    protocol: u8,
    client: SocketAddr,
    vip: SocketAddr,
    source: SocketAddr,
    backend: SocketAddr,
}

impl Flow {
    fn request(&self) -> Frame {
        match self.protocol {
            TCP => Frame::tcp(self.client, self.vip, flag::ACK).ack(1001),
            _ => Frame::udp(self.client, self.vip),
        }
    }

    fn reply(&self) -> Frame {
        match self.protocol {
            TCP => Frame::tcp(self.backend, self.source, flag::ACK).seq(1001),
            _ => Frame::udp(self.backend, self.source),
        }
    }

    fn forward(&self, frame: &Frame) -> Expect {
        let bytes = frame.translated(self.source, self.backend, Some((RACK_POD_MAC, RACK_MAC)));
        Expect::Out(Side::Pods, pods_side(&bytes))
    }

    fn back(&self, frame: &Frame) -> Expect {
        let bytes = frame.translated(self.vip, self.client, Some((OFFICE_CLIENT_MAC, OFFICE_MAC)));
        Expect::Out(Side::Uplink, to_client(&bytes))
    }

    fn both_ways(&self, what: &str, change: impl Fn(Frame) -> Frame) -> [Row; 2] {
        let (request, reply) = (change(self.request()), change(self.reply()));
        let what = |way: &str| format!("{}: {what}, {way}", self.what);
        [
            Row::new(what("to the backend"), Side::Uplink, from_client(&request.bytes()), self.forward(&request)),
            Row::new(what("to the client"), Side::Pods, pods_side(&reply.bytes()), self.back(&reply)),
        ]
    }
}

/// Number, VIP's port, protocol, mode, backend's port.
const SERVICES: [(&str, u32, u16, u8, u8, u16); 3] = [
    ("TCP full-nat", 2, 8443, TCP, mode::FULL_NAT, 443),
    ("TCP dnat", 3, 9443, TCP, mode::DNAT, 444),
    ("UDP full-nat", 4, 53, UDP, mode::FULL_NAT, 5353),
];
/// IPv6 services have these numbers higher.
const V6: u32 = 10;
/// A service on the links themselves, without tags.
const UNTAGGED: (u32, u16) = (5, 8080);

fn services(rig: &mut Rig) -> Result<()> {
    for link in ["uplink", "uplink-peer", "pods", "pods-peer"] {
        // Room for both tags, as QinQ asks for.
        ip(&format!("link set {link} mtu 1508"))?;
    }
    stand_in("office", OFFICE_MAC, OFFICE)?;
    stand_in("rack", RACK_MAC, RACK)?;
    neighbour("office", OFFICE_CLIENT, OFFICE_CLIENT_MAC)?;
    neighbour("rack", RACK_POD, RACK_POD_MAC)?;
    let (office, rack) = (Port::untagged(ifindex("office")?), Port::untagged(ifindex("rack")?));
    let clients = Port { ifindex: rig.uplink, tags: [0x88a8_0009, 0x8100_0005] };
    let pods = Port { ifindex: rig.pods, tags: [0x8100_0007, 0] };
    let mut vlans = rig.hash::<Port, Port>(name::VLANS)?;
    for (one, other) in [(office, clients), (clients, office), (rack, pods), (pods, rack)] {
        vlans.insert(one, other, 0)?;
    }
    let mut own = rig.hash::<u32, OwnAddresses>(name::OWN_ADDRESSES)?;
    for (device, addresses) in [(office, OFFICE), (rack, RACK)] {
        let [v4, v6] = addresses;
        own.insert(device.ifindex, OwnAddresses { v4: wire(v4), v6: wire(v6) }, 0)?;
    }
    rig.service(UNTAGGED.0, UNTAGGED.1, TCP, mode::FULL_NAT, 1, 80)?;
    for family in FAMILIES {
        rig.set_family(family);
        let base = if family == Family::V6 { V6 } else { 0 };
        for (_, number, port, protocol, mode, backend_port) in SERVICES {
            let backends = rig.service(base + number, port, protocol, mode, 1, backend_port)?;
            rig.move_backend(backends[0], family.of(RACK_POD.0, RACK_POD.1), mode)?;
        }
    }
    Ok(())
}

fn stand_in(device: &str, address: [u8; 6], addresses: [IpAddr; 2]) -> Result<()> {
    ip(&format!("link add {device} type veth peer name {device}-peer"))?;
    ip(&format!("link set {device}-peer up"))?;
    ip(&format!("link set {device} address {} up", mac(address)))?;
    ip(&format!("address add {}/24 dev {device}", addresses[0]))?;
    ip(&format!("address add {}/64 dev {device} nodad", addresses[1]))
}

fn neighbour(device: &str, (v4, v6): (Ipv4Addr, Ipv6Addr), address: [u8; 6]) -> Result<()> {
    for neighbour in [IpAddr::from(v4), IpAddr::from(v6)] {
        ip(&format!("neigh replace {neighbour} lladdr {} dev {device} nud permanent", mac(address)))?;
    }
    Ok(())
}

fn opened(taps: &mut Taps) -> Result<Vec<Flow>> {
    let mut flows = Vec::new();
    for family in FAMILIES {
        for (what, _, port, protocol, mode, backend_port) in SERVICES {
            let client = SocketAddr::new(family.of(OFFICE_CLIENT.0, OFFICE_CLIENT.1), 40_000);
            let (vip, what) = (SocketAddr::new(family.vip(), port), format!("{what} {family:?}"));
            let backend = SocketAddr::new(family.of(RACK_POD.0, RACK_POD.1), backend_port);
            let mut flow = Flow { what, protocol, client, vip, source: client, backend };
            let first = if protocol == TCP { Frame::tcp(client, vip, flag::SYN) } else { flow.request() };
            let seen = taps.pass(Side::Uplink, &from_client(&first.bytes()))?;
            let entry = taps.rig.flow(name::HALF_OPEN, &key(client, vip, protocol));
            let entry =
                entry.with_context(|| format!("{}: no flow; {:?} {seen:02x?}", flow.what, taps.rig.reasons()))?;
            flow.source = snat_of(&entry);
            ensure!((flow.source == client) == (mode == mode::DNAT), "{}: source {}", flow.what, flow.source);
            ensure!(seen == [flow.forward(&first)], "{}: first packet: {seen:02x?}", flow.what);
            let answer = match protocol {
                TCP => Frame::tcp(backend, flow.source, flag::SYN | flag::ACK).seq(1000),
                _ => flow.reply(),
            };
            let second = flow.request();
            taps.check(&[
                Row::new("first answer", Side::Pods, pods_side(&answer.bytes()), flow.back(&answer)),
                Row::new("second packet", Side::Uplink, from_client(&second.bytes()), flow.forward(&second)),
            ])
            .with_context(|| flow.what.clone())?;
            ensure!(taps.rig.flow(name::ESTABLISHED, &key(client, vip, protocol)).is_some(), "{}", flow.what);
            flows.push(flow);
        }
    }
    Ok(flows)
}

/// All tables on one hook, whose object is loaded once for them.
fn tables(wire: Wire) -> Result<()> {
    in_namespace(|| {
        let mut taps = Taps::new(wire, Settings::default(), services)?;
        let flows = opened(&mut taps)?;
        for (table, rows) in [
            ("packets between VLANs leave under the tags of their next hop, in every shape", shapes(&flows)),
            ("what the program leaves to the stack has its tags again", left_to_the_stack(&flows)),
            ("frames of a VLAN that the host is not in are the stack's", foreign()),
            ("what the edge answers itself goes back under the tags that the question came with", answers(&flows)),
            ("errors about a flow, and its fragments, cross from VLAN to VLAN", errors_and_fragments(&flows)),
            ("tagged frames cut short anywhere go to the stack or nowhere", cut_short(&flows)),
        ] {
            ensure!(!rows.is_empty(), "an empty table: {table}");
            taps.check(&rows).context(table)?;
        }
        a_priority_alone_is_no_vlan(&mut taps)
    })
}

#[test]
fn at_native_xdp_tags_come_off_and_go_on() -> Result<()> {
    tables(Wire::Native)
}

#[test]
fn at_generic_xdp_tags_come_off_and_go_on() -> Result<()> {
    tables(Wire::Generic)
}

#[test]
fn at_tc_tags_come_off_and_go_on() -> Result<()> {
    tables(Wire::Tc)
}

fn shapes(flows: &[Flow]) -> Vec<Row> {
    let mut rows = Vec::new();
    for flow in flows {
        rows.extend(flow.both_ways("data", |frame| frame));
        rows.extend(flow.both_ways("data again, by the flow cache", |frame| frame));
        rows.extend(flow.both_ways("no payload", |frame| frame.payload(Vec::new())));
        let full = 1500 - flow.request().payload(Vec::new()).ip_len();
        rows.extend(flow.both_ways("1514 bytes and tags", |frame| frame.payload(vec![0x5a; full])));
        if flow.client.is_ipv4() {
            rows.extend(flow.both_ways("40 bytes of options", |frame| Frame { options: vec![1; 40], ..frame }));
        } else {
            let padding = vec![(0, vec![0, 0, 1, 4, 0, 0, 0, 0])];
            rows.extend(flow.both_ways("hop-by-hop options", |frame| Frame { extensions: padding.clone(), ..frame }));
        }
        if flow.protocol == TCP {
            rows.extend(flow.both_ways("FIN", |frame| Frame { flags: flag::FIN | flag::ACK, ..frame }));
        }
    }
    rows
}

/// The kernel takes the outer tag off before any socket can see the frame, so what is inside it shows that all of them were
/// put back, in their order.
fn left_to_the_stack(flows: &[Flow]) -> Vec<Row> {
    let flow = &flows[0];
    let elsewhere = SocketAddr::new(Ipv4Addr::new(192, 0, 2, 7).into(), 8443);
    let other = Frame::tcp(flow.client, elsewhere, flag::SYN);
    let port = Frame::tcp(flow.client, SocketAddr::new(VIP.into(), 22), flag::SYN);
    let ping = IcmpError::new(flow.client.ip(), VIP, 8, 0, b"abcdefgh");
    let arp: Vec<u8> = [&[0xff; 6][..], &OFFICE_CLIENT_MAC, &[8, 6], &[0, 1, 8, 0, 6, 4, 0, 2], &[0; 38]].concat();
    let mut rows = Vec::new();
    for (what, frame) in [
        ("another destination", other.bytes()),
        ("another port of the VIP", port.bytes()),
        ("a later fragment of nobody's to the VIP", Frame { fragment: 3, ..flow.request() }.bytes()),
        ("ping", ping.bytes()),
        ("ARP", arp),
    ] {
        let inner = tagged(&frame, &[CLIENTS_INNER]);
        rows.push(Row::new(what, Side::Uplink, from_client(&frame), Expect::Stack(inner)));
        rows.push(Row::new(what, Side::Pods, pods_side(&frame), Expect::Stack(frame)));
    }
    rows
}

fn foreign() -> Vec<Row> {
    let vip = SocketAddr::new(VIP.into(), UNTAGGED.1);
    let frame = Frame::tcp(SocketAddr::new(CLIENT.into(), 40_000), vip, flag::SYN).bytes();
    let tables: [(&str, &[[u8; 4]]); 5] = [
        ("another VLAN", &[[0x81, 0, 0, 6]]),
        ("the pods' VLAN on the other link", &[PODS]),
        ("the inner VLAN alone", &[CLIENTS_INNER]),
        ("the outer VLAN alone", &[CLIENTS_OUTER]),
        ("the VLANs the other way round", &[[0x81, 0, 0, 9], [0x88, 0xa8, 0, 5]]),
    ];
    let row = |(what, tags): (&str, &[[u8; 4]])| {
        let inner = tagged(&frame, &tags[1..]);
        // The stack is watched for no 802.1ad tag; that nothing left by a link shows that it was not forwarded.
        let expect = if tags.len() == 2 { Expect::Nothing } else { Expect::Stack(inner) };
        Row::new(what, Side::Uplink, tagged(&frame, tags), expect)
    };
    tables.into_iter().map(row).collect()
}

/// A frame with a priority only belongs to no VLAN, and its answer has no tag.
fn a_priority_alone_is_no_vlan(taps: &mut Taps) -> Result<()> {
    let (client, vip) = (SocketAddr::new(CLIENT.into(), 40_000), SocketAddr::new(VIP.into(), UNTAGGED.1));
    let syn = Frame::tcp(client, vip, flag::SYN);
    ensure!(taps.rig.flow(name::HALF_OPEN, &key(client, vip, TCP)).is_none(), "a flow of a foreign VLAN");
    let seen = taps.pass(Side::Uplink, &tagged(&syn.bytes(), &[[0x81, 0, 0xe0, 0]]))?;
    let entry = taps.rig.flow(name::HALF_OPEN, &key(client, vip, TCP)).context("no flow")?;
    let (source, backend) = (snat_of(&entry), SocketAddr::new(pod(0).into(), 80));
    ensure!(source.ip() == IpAddr::from(SNAT), "source {source}");
    let forward = syn.translated(source, backend, Some((pod_mac(0), PODS_MAC)));
    ensure!(seen == [Expect::Out(Side::Pods, forward)], "priority only: {seen:02x?}");
    let answer = Frame::tcp(backend, source, flag::SYN | flag::ACK).seq(1000);
    let back = Expect::Out(Side::Uplink, answer.translated(vip, client, Some((CLIENT_MAC, UPLINK_MAC))));
    taps.check(&[Row::new("its answer, without a tag", Side::Pods, answer.bytes(), back)])
}

fn answers(flows: &[Flow]) -> Vec<Row> {
    let mut rows = Vec::new();
    for flow in flows {
        let own = |[v4, v6]: [IpAddr; 2]| if flow.client.is_ipv4() { v4 } else { v6 };
        let expiring = Frame { ttl: 1, ..flow.request() };
        let told = expired(&expiring, own(OFFICE));
        let expect = Expect::Out(Side::Uplink, from_client(&told));
        let what = |what: &str| format!("{}: {what}", flow.what);
        rows.push(Row::new(what("TTL 1 of the client"), Side::Uplink, from_client(&expiring.bytes()), expect));
        let expiring = Frame { ttl: 1, ..flow.reply() };
        let expect = Expect::Out(Side::Pods, pods_side(&expired(&expiring, own(RACK))));
        rows.push(Row::new(what("TTL 1 of the backend"), Side::Pods, pods_side(&expiring.bytes()), expect));
    }
    rows
}

/// The edge's time exceeded about a frame, quoted whole to a multiple of 4 bytes.
fn expired(frame: &Frame, own: IpAddr) -> Vec<u8> {
    let bytes = frame.bytes();
    let quote = &bytes[14..14 + (bytes.len() - 14) / 4 * 4];
    let (kind, tos) = if own.is_ipv4() { (11, 0xc0) } else { (3, 0) };
    let error = IcmpError {
        dst_mac: frame.src_mac,
        src_mac: frame.dst_mac,
        tos,
        id: 0,
        fragment: 0x4000,
        ..IcmpError::new(own, frame.src.ip(), kind, 0, quote)
    };
    error.bytes()
}

fn errors_and_fragments(flows: &[Flow]) -> Vec<Row> {
    let mut rows = Vec::new();
    for flow in flows.iter().filter(|flow| flow.client.is_ipv4()) {
        // The backend's "port unreachable" about a packet that it got.
        let got = flow.request().translated(flow.source, flow.backend, None);
        let sent = Frame { ttl: 63, ..flow.request() }.bytes();
        let error = IcmpError::new(flow.backend.ip(), flow.source.ip(), 3, 3, &got[14..14 + 28]);
        let vip =
            IcmpError { src: flow.vip.ip(), dst: flow.client.ip(), quote: sent[14..14 + 28].to_vec(), ..error.clone() };
        let vip = to_client(&vip.forwarded((OFFICE_CLIENT_MAC, OFFICE_MAC)).bytes());
        let what = format!("{}: port unreachable", flow.what);
        rows.push(Row::new(what, Side::Pods, pods_side(&error.bytes()), Expect::Out(Side::Uplink, vip)));
        if flow.source != flow.client {
            continue;
        }
        // A dnat flow's fragments keep their ID.
        let first = Frame { fragment: 0x2000, ..flow.request().payload(vec![1; 28]) };
        let what = format!("{}: a first fragment", flow.what);
        rows.push(Row::new(what, Side::Uplink, from_client(&first.bytes()), flow.forward(&first)));
        let later = |src: IpAddr, dst: IpAddr, ttl: u8, macs: ([u8; 6], [u8; 6])| {
            let (src, dst) = (SocketAddr::new(src, 0), SocketAddr::new(dst, 0));
            let frame = Frame { fragment: 6, ttl, dst_mac: macs.0, src_mac: macs.1, ..Frame::udp(src, dst) };
            let mut bytes = Frame { protocol: TCP, ..frame }.payload(Vec::new()).bytes();
            bytes[34..].fill(0xee);
            bytes
        };
        let ordinary = ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
        let came = later(flow.client.ip(), flow.vip.ip(), 64, ordinary);
        let leaves = later(flow.client.ip(), flow.backend.ip(), 63, (RACK_POD_MAC, RACK_MAC));
        let what = format!("{}: a later fragment", flow.what);
        rows.push(Row::new(what, Side::Uplink, from_client(&came), Expect::Out(Side::Pods, pods_side(&leaves))));
    }
    rows
}

fn cut_short(flows: &[Flow]) -> Vec<Row> {
    let flow = &flows[0];
    let frame = flow.request().bytes();
    let mut rows = Vec::new();
    for len in 22..frame.len() {
        let cut = &frame[..len];
        // Without a whole IP header nobody can say whose it is.
        let stack = Expect::Stack(tagged(cut, &[CLIENTS_INNER]));
        let expect = if len < 34 { stack } else { Expect::Nothing };
        rows.push(Row::new(format!("{len} bytes and two tags"), Side::Uplink, from_client(cut), expect));
    }
    rows
}
