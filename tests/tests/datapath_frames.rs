//! The fixtures as real frames over veth, on native XDP, generic XDP and TC: each row says what a frame must become, byte
//! for byte, and on which link; everything else that comes out is a failure. New rows go into one of the tables here, or
//! into a table of their own that a test passes to [`on_each_wire`].

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};

use anyhow::{Context, Result, ensure};
use edge_common::{
    flow::{TCP, UDP},
    maps::{BackendEntry, ServiceKey, mode, name},
};
use edge_tests::datapath::{
    frame::{Frame, checksum, flag},
    live::Live,
    namespace::{in_namespace, ip},
    rig::{
        CLIENT, CLIENT_MAC, HOOKS, PODS_MAC, Rig, SNAT, Settings, UPLINK_MAC, VIP, key, mac, pod, pod_mac, snat_of,
        wire,
    },
    tap::{Expect, Row, Side, Taps, WIRES, Wire},
};

/// A backend on the clients' own network, for hairpins.
const NEIGHBOUR: Ipv4Addr = Ipv4Addr::new(172, 16, 1, 20);
const NEIGHBOUR_MAC: [u8; 6] = [2, 0, 0, 0, 1, 20];

/// An open flow, as its packets look on either side of the edge.
#[derive(Clone, Debug)]
struct Flow {
    what: &'static str,
    protocol: u8,
    mode: u8,
    client: SocketAddr,
    vip: SocketAddr,
    /// What the backend sees as source.
    source: SocketAddr,
    backend: SocketAddr,
    /// The link that leads to the backend.
    behind: Side,
}

/// Services of the tables here: number, VIP's port, protocol, mode, backend's port, link that leads to the backend.
const SERVICES: [(&str, u32, u16, u8, u8, u16, Side); 8] = [
    ("TCP full-nat", 2, 8443, TCP, mode::FULL_NAT, 443, Side::Pods),
    ("TCP dnat", 3, 9443, TCP, mode::DNAT, 444, Side::Pods),
    ("UDP full-nat", 4, 53, UDP, mode::FULL_NAT, 5353, Side::Pods),
    ("UDP dnat", 5, 54, UDP, mode::DNAT, 5454, Side::Pods),
    ("TCP full-nat hairpin", 6, 8500, TCP, mode::FULL_NAT, 85, Side::Uplink),
    ("TCP dnat hairpin", 7, 8600, TCP, mode::DNAT, 86, Side::Uplink),
    ("UDP full-nat hairpin", 8, 5500, UDP, mode::FULL_NAT, 55, Side::Uplink),
    ("UDP dnat hairpin", 9, 5600, UDP, mode::DNAT, 56, Side::Uplink),
];

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

    /// How `frame`, of the client, leaves towards the backend.
    fn forward(&self, frame: &Frame) -> Vec<u8> {
        let macs = match self.behind {
            Side::Pods => (pod_mac(0), PODS_MAC),
            Side::Uplink => (NEIGHBOUR_MAC, UPLINK_MAC),
        };
        frame.translated(self.source, self.backend, Some(macs))
    }

    /// How `frame`, of the backend, leaves towards the client.
    fn back(&self, frame: &Frame) -> Vec<u8> {
        frame.translated(self.vip, self.client, Some((CLIENT_MAC, UPLINK_MAC)))
    }

    /// A row for a frame of each direction, made by `change` from an ordinary one.
    fn both_ways(&self, what: &str, change: impl Fn(Frame) -> Frame) -> [Row; 2] {
        let (request, reply) = (change(self.request()), change(self.reply()));
        let there = Expect::Out(self.behind, self.forward(&request));
        let back = Expect::Out(Side::Uplink, self.back(&reply));
        [
            Row::new(format!("{}: {what}, to the backend", self.what), Side::Uplink, request.bytes(), there),
            Row::new(format!("{}: {what}, to the client", self.what), self.behind, reply.bytes(), back),
        ]
    }

    /// As [`Flow::both_ways`], with `change` to the bytes before and after.
    fn both_ways_in_bytes(&self, what: &str, change: impl Fn(&mut Vec<u8>)) -> [Row; 2] {
        self.both_ways(what, |frame| frame.payload(Vec::new())).map(|mut row| {
            change(&mut row.frame);
            if let Expect::Out(_, bytes) = &mut row.expect {
                change(bytes);
            }
            row
        })
    }
}

fn services(rig: &mut Rig) -> Result<()> {
    ip(&format!("neigh replace {NEIGHBOUR} lladdr {} dev uplink nud permanent", mac(NEIGHBOUR_MAC)))?;
    for (_, number, port, protocol, mode, backend_port, behind) in SERVICES {
        let backends = rig.service(number, port, protocol, mode, 1, backend_port)?;
        if behind == Side::Uplink {
            move_to_neighbour(rig, backends[0], mode)?;
        }
    }
    Ok(())
}

fn move_to_neighbour(rig: &mut Rig, number: u32, mode: u8) -> Result<()> {
    let mut backend: BackendEntry = rig.array(name::BACKENDS)?.get(&number, 0)?;
    backend.address = wire(NEIGHBOUR);
    rig.array(name::BACKENDS)?.set(number, backend, 0)?;
    if mode == mode::DNAT {
        let index = ServiceKey { address: backend.address, port: backend.port, protocol: backend.protocol, _pad: 0 };
        rig.hash(name::BACKEND_INDEX)?.insert(index, number, 0)?;
        rig.filter_source(NEIGHBOUR)?;
    }
    Ok(())
}

/// Opens a flow of each service; its first packets are checked as the rows are.
fn open(taps: &mut Taps) -> Result<Vec<Flow>> {
    let mut flows = Vec::new();
    for (what, _, port, protocol, mode, backend_port, behind) in SERVICES {
        let (client, vip) = (SocketAddr::new(CLIENT.into(), 40_000), SocketAddr::new(VIP.into(), port));
        let address = if behind == Side::Pods { pod(0) } else { NEIGHBOUR };
        let backend = SocketAddr::new(address.into(), backend_port);
        let mut flow = Flow { what, protocol, mode, client, vip, source: client, backend, behind };
        let first = if protocol == TCP { Frame::tcp(client, vip, flag::SYN) } else { flow.request() };
        let seen = taps.pass(Side::Uplink, &first.bytes())?;
        let entry = taps.rig.flow(name::HALF_OPEN, &key(client, vip, protocol)).context("no flow")?;
        flow.source = snat_of(&entry);
        let expected = if mode == mode::DNAT { client } else { SocketAddr::new(SNAT.into(), flow.source.port()) };
        ensure!(flow.source == expected, "{what}: source {}", flow.source);
        let wanted = [Expect::Out(behind, flow.forward(&first))];
        ensure!(seen == wanted, "{what}: first packet\n  want {wanted:02x?}\n  seen {seen:02x?}");
        let answer = match protocol {
            TCP => Frame::tcp(backend, flow.source, flag::SYN | flag::ACK).seq(1000),
            _ => flow.reply(),
        };
        taps.check(&[
            Row::new("first answer", behind, answer.bytes(), Expect::Out(Side::Uplink, flow.back(&answer))),
            Row::new("second packet", Side::Uplink, flow.request().bytes(), {
                Expect::Out(behind, flow.forward(&flow.request()))
            }),
        ])
        .context(what)?;
        ensure!(taps.rig.flow(name::ESTABLISHED, &key(client, vip, protocol)).is_some(), "{what}: not established");
        flows.push(flow);
    }
    Ok(flows)
}

/// Passes the rows that `rows` makes of the open flows through the program on native XDP, generic XDP and TC.
fn on_each_wire(rows: impl Fn(Wire, &[Flow]) -> Vec<Row> + Sync) -> Result<()> {
    for wire in WIRES {
        in_namespace(|| {
            let mut taps = Taps::new(wire, Settings::default(), services)?;
            let flows = open(&mut taps)?;
            let rows = rows(wire, &flows);
            ensure!(!rows.is_empty(), "an empty table");
            taps.check(&rows)
        })
        .with_context(|| format!("{wire:?}"))?;
    }
    Ok(())
}

/// Sets the type of service, and the header's checksum right.
fn set_tos(frame: &mut [u8], tos: u8) {
    frame[15] = tos;
    frame[24..26].fill(0);
    let check = checksum(&[&frame[14..34]]);
    frame[24..26].copy_from_slice(&check.to_be_bytes());
}

#[test]
fn packets_of_open_flows_leave_translated_both_ways_in_every_shape() -> Result<()> {
    on_each_wire(|_, flows| {
        let mut rows = Vec::new();
        for flow in flows {
            rows.extend(flow.both_ways("data", |frame| frame));
            rows.extend(flow.both_ways("no payload", |frame| frame.payload(Vec::new())));
            rows.extend(flow.both_ways("TTL 255", |frame| Frame { ttl: 255, ..frame }));
            rows.extend(flow.both_ways("TTL 2", |frame| Frame { ttl: 2, ..frame }));
            rows.extend(flow.both_ways("do not fragment", |frame| Frame { fragment: 0x4000, ..frame }));
            rows.extend(flow.both_ways("may be fragmented", |frame| Frame { fragment: 0, ..frame }));
            rows.extend(flow.both_ways("4 bytes of options", |frame| Frame { options: vec![1; 4], ..frame }));
            rows.extend(flow.both_ways("40 bytes of options", |frame| Frame { options: vec![1; 40], ..frame }));
            rows.extend(flow.both_ways("ToS 0xb8 kept", |frame| frame));
            for row in rows.iter_mut().rev().take(2) {
                set_tos(&mut row.frame, 0xb8);
                let Expect::Out(_, bytes) = &mut row.expect else { continue };
                set_tos(bytes, 0xb8);
            }
            rows.extend(flow.both_ways_in_bytes("padded to 60 bytes", |frame| frame.resize(60, 0)));
            rows.extend(flow.both_ways_in_bytes("padded with rubbish", |frame| frame.extend([0xee; 7])));
            let full = 1500 - flow.request().payload(Vec::new()).ip_len();
            rows.extend(flow.both_ways("1514 bytes", |frame| frame.payload(vec![0x5a; full])));
            if flow.protocol == UDP {
                rows.extend(flow.both_ways("no UDP checksum", |frame| Frame { no_checksum: true, ..frame }));
            }
        }
        rows
    })
}

#[test]
fn what_is_not_ours_reaches_the_stack_byte_for_byte() -> Result<()> {
    on_each_wire(|_, flows| {
        let flow = &flows[0];
        let elsewhere = SocketAddr::new(Ipv4Addr::new(192, 0, 2, 7).into(), 8443);
        let other = Frame::tcp(flow.client, elsewhere, flag::SYN);
        let arp: Vec<u8> = [&[0xff; 6][..], &CLIENT_MAC, &[8, 6], &[0, 1, 8, 0, 6, 4, 0, 2], &[0; 38]].concat();
        let mut ipv6 = other.bytes();
        ipv6[12..14].copy_from_slice(&[0x86, 0xdd]);
        ipv6[14] = 0x60;
        let mut rows: Vec<(&str, Vec<u8>)> = vec![
            ("another destination", other.bytes()),
            ("1514 bytes to another destination", other.clone().payload(vec![7; 1460]).bytes()),
            ("a fragment to another destination", Frame { fragment: 0x2001, ..other.clone() }.bytes()),
            ("options to another destination", Frame { options: vec![7; 8], ..other.clone() }.bytes()),
            ("TTL 1 to another destination", Frame { ttl: 1, ..other.clone() }.bytes()),
            ("cut short to another destination", other.bytes()[..40].to_vec()),
            ("UDP to another destination", Frame::udp(flow.client, elsewhere).bytes()),
            ("ARP", arp),
            ("broken IPv6", ipv6),
            ("GRE to the VIP", Frame { protocol: 47, ..Frame::udp(flow.client, flow.vip) }.bytes()),
            ("another port of the VIP", Frame::tcp(flow.client, SocketAddr::new(VIP.into(), 22), flag::SYN).bytes()),
            ("another protocol of the VIP", Frame::udp(flow.client, flow.vip).bytes()),
        ];
        for len in [15, 20, 33] {
            rows.push(("an IP header cut short", flow.request().bytes()[..len].to_vec()));
        }
        let row = |side| {
            move |(what, frame): &(&str, Vec<u8>)| Row::new(*what, side, frame.clone(), Expect::Stack(frame.clone()))
        };
        rows.iter().map(row(Side::Uplink)).chain(rows.iter().map(row(Side::Pods))).collect()
    })
}

#[test]
fn frames_of_vlans_that_the_host_is_not_in_are_left_to_the_stack() -> Result<()> {
    on_each_wire(|_, flows| {
        let mut rows = Vec::new();
        for flow in flows {
            let untagged = flow.request().bytes();
            let with = |tags: &[u8]| [&untagged[..12], tags, &untagged[12..]].concat();
            // The kernel takes the outer tag off before any socket can see the frame.
            let tagged = with(&[0x81, 0, 0, 5]);
            rows.push(Row::new("802.1Q", Side::Uplink, tagged.clone(), Expect::Stack(untagged.clone())));
            let double = with(&[0x88, 0xa8, 0, 9, 0x81, 0, 0, 5]);
            rows.push(Row::new("802.1ad over 802.1Q", Side::Uplink, double, Expect::Stack(tagged)));
        }
        rows
    })
}

#[test]
fn frames_to_a_flow_cut_short_anywhere_or_contradicting_themselves_go_nowhere() -> Result<()> {
    on_each_wire(|_, flows| {
        let mut rows = Vec::new();
        for flow in &flows[..4] {
            for (side, frame) in [(Side::Uplink, flow.request()), (flow.behind, flow.reply())] {
                let whole = frame.clone().bytes();
                for len in 34..whole.len() {
                    let what = format!("{}: {len} of {} bytes", flow.what, whole.len());
                    rows.push(Row::new(what, side, &whole[..len], Expect::Nothing));
                }
                let udp = [("IP header of 16 bytes", 14, 0x44), ("IP header beyond the packet", 14, 0x4f)];
                let lengths = [
                    ("total length beyond the frame", 17, 0xff),
                    ("total length within the header", 17, 19),
                    ("total length within the layer-4 header", 17, 27),
                ];
                let tcp = [("data offset below 5", 46, 0x40), ("data offset beyond the packet", 46, 0xf0)];
                let tcp = tcp.iter().filter(|_| flow.protocol == TCP);
                for (what, at, value) in udp.iter().chain(&lengths).chain(tcp) {
                    let mut bad = whole.clone();
                    bad[*at] = *value;
                    rows.push(Row::new(format!("{}: {what}", flow.what), side, bad, Expect::Nothing));
                }
            }
        }
        rows
    })
}

#[test]
fn a_dnat_backend_s_packet_without_a_flow_leaves_as_the_vip_s_as_any_edge_would_choose_that_backend() -> Result<()> {
    on_each_wire(|_, flows| {
        let strays = flows.iter().filter(|flow| flow.mode == mode::DNAT).map(|flow| {
            let elsewhere = SocketAddr::new(CLIENT.into(), 41_000);
            let stray = Frame { dst: elsewhere, ..flow.reply() };
            let bytes = stray.translated(flow.vip, elsewhere, Some((CLIENT_MAC, UPLINK_MAC)));
            Row::new(
                format!("{}: a stray reply", flow.what),
                flow.behind,
                stray.bytes(),
                Expect::Out(Side::Uplink, bytes),
            )
        });
        strays.collect()
    })
}

/// The VIP is the edge's own address: what listens there on other ports hears its clients.
#[test]
fn other_ports_of_a_vip_that_is_the_host_s_own_address_reach_the_host() -> Result<()> {
    for hook in HOOKS {
        in_namespace(|| {
            let mut rig = Rig::new(hook, Settings::default())?;
            rig.service(1, 8443, TCP, mode::FULL_NAT, 1, 443)?;
            let live = Live::new(&mut rig, hook, true)?;
            let listener = TcpListener::bind((VIP, 22))?;
            let local = live.client.run(|| Ok(TcpStream::connect((VIP, 22))?.local_addr()?))?;
            ensure!(listener.accept()?.1 == local, "somebody else connected");
            ensure!(live.client.run(|| Ok(TcpStream::connect((VIP, 23)).is_err()))?, "nobody listens on port 23");
            Ok(())
        })?;
    }
    Ok(())
}
