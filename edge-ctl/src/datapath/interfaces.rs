//! What the kernel says of an interface: index, kind, the XDP program on it, and whether XDP may redirect to it. Asked by
//! netlink in the caller's network namespace, synchronously: it happens at start and when an interface comes or goes.

use std::{fs, io, path::Path};

use edge_common::maps::{CUSTOMER_TAG, SERVICE_TAG, tag};
use rtnetlink::{
    packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload},
    packet_route::{
        RouteNetlinkMessage,
        link::{
            InfoData, InfoKind, InfoVlan, LinkAttribute, LinkInfo, LinkMessage, LinkXdp, VlanProtocol, XdpAttached,
        },
    },
    sys::{Socket, SocketAddr, protocols},
};

use super::object::has_frags;

/// An interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interface {
    /// Name.
    pub name: String,
    /// Kernel index.
    pub ifindex: u32,
    /// True for veth.
    pub veth: bool,
    /// The XDP program on it: kernel id, and whether it runs in generic (skb) mode.
    pub xdp: Option<(u32, bool)>,
    /// Largest packet, bytes from the IP header on.
    pub mtu: u32,
    /// Index of the bridge or bond that this is a port of.
    pub controller: Option<u32>,
    /// True for a bond.
    pub bond: bool,
    /// Of a VLAN device of this namespace: the index of the interface below it, and its own tag as
    /// [`edge_common::maps::tag`] makes it.
    pub vlan: Option<(u32, u32)>,
}

/// All interfaces of this network namespace.
///
/// # Errors
/// Those of the netlink socket.
pub fn list() -> io::Result<Vec<Interface>> {
    let mut request = NetlinkMessage::from(RouteNetlinkMessage::GetLink(LinkMessage::default()));
    request.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    read(&exchange(protocols::NETLINK_ROUTE, &bytes)?)
}

/// The interfaces that the kernel's answer tells of.
fn read(messages: &[Vec<u8>]) -> io::Result<Vec<Interface>> {
    let mut interfaces = Vec::new();
    for message in messages {
        let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(message).map_err(io::Error::other)?;
        if let NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) = message.payload {
            interfaces.extend(interface(&link));
        }
    }
    Ok(interfaces)
}

fn interface(link: &LinkMessage) -> Option<Interface> {
    let mut found = Interface { ifindex: link.header.index, ..Interface::default() };
    let (mut lower, mut tag) = (None, None);
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(name) => found.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => found.mtu = *mtu,
            LinkAttribute::Controller(index) => found.controller = (*index != 0).then_some(*index),
            LinkAttribute::LinkInfo(infos) => {
                found.veth = infos.iter().any(|info| matches!(info, LinkInfo::Kind(InfoKind::Veth)));
                found.bond = infos.iter().any(|info| matches!(info, LinkInfo::Kind(InfoKind::Bond)));
                tag = infos.iter().find_map(vlan_tag);
            }
            LinkAttribute::Link(index) => lower = Some(*index),
            LinkAttribute::Xdp(parts) => {
                let generic = parts.iter().any(|part| matches!(part, LinkXdp::Attached(XdpAttached::SocketBuffer)));
                let program = parts.iter().find_map(|part| match part {
                    LinkXdp::ProgId(id) | LinkXdp::DrvProgId(id) | LinkXdp::SkbProgId(id) => Some(*id),
                    _ => None,
                });
                found.xdp = program.map(|id| (id, generic));
            }
            _ => {}
        }
    }
    let elsewhere = link.attributes.iter().any(|attribute| matches!(attribute, LinkAttribute::LinkNetNsId(_)));
    found.vlan = lower.filter(|_| !elsewhere).zip(tag);
    (!found.name.is_empty()).then_some(found)
}

fn vlan_tag(info: &LinkInfo) -> Option<u32> {
    let LinkInfo::Data(InfoData::Vlan(facts)) = info else {
        return None;
    };
    let id = facts.iter().find_map(|fact| if let InfoVlan::Id(id) = fact { Some(*id) } else { None })?;
    let service = facts.iter().any(|fact| matches!(fact, InfoVlan::Protocol(VlanProtocol::Ieee8021Ad)));
    Some(tag(if service { SERVICE_TAG } else { CUSTOMER_TAG }, id))
}

/// Interfaces to which XDP programs may redirect: their driver has `ndo_xdp_xmit`, and it works now (for veth: the peer
/// has a native XDP program or GRO on). Kernels from 6.3 say so per interface, by the `netdev` generic netlink family;
/// on older ones the driver's name decides, and veth is left out, since there the peer's state cannot be seen. The kernel
/// drops a redirected packet that the target does not take, so what cannot be seen counts as no.
pub fn redirectable(interfaces: &[Interface]) -> Vec<u32> {
    let features = netdev_features().ok();
    let takes = |interface: &&Interface| {
        let bits = match &features {
            Some(features) => {
                features.iter().find(|(index, _)| *index == interface.ifindex).map_or(0, |(_, bits)| *bits)
            }
            None if driver(&interface.name).is_some_and(|driver| XMIT_DRIVERS.contains(&driver.as_str())) => NDO_XMIT,
            None => 0,
        };
        takes_redirects(bits, interface.mtu, has_frags())
    };
    interfaces.iter().filter(takes).map(|interface| interface.ifindex).collect()
}

/// Whether every packet that fits the interface's MTU may be redirected to it. With multi-buffer XDP (`frags`) a packet
/// longer than [`ONE_BUFFER`] may lie in several buffers, which not every driver that sends for XDP can send.
fn takes_redirects(features: u64, mtu: u32, frags: bool) -> bool {
    features & NDO_XMIT != 0 && (!frags || mtu <= ONE_BUFFER || features & NDO_XMIT_SG != 0)
}

/// `NETDEV_XDP_ACT_NDO_XMIT`.
const NDO_XMIT: u64 = 1 << 2;
/// `NETDEV_XDP_ACT_NDO_XMIT_SG`.
const NDO_XMIT_SG: u64 = 1 << 6;
/// Bytes from the IP header on that every driver receives into one buffer.
const ONE_BUFFER: u32 = 1500;

/// Drivers that had `ndo_xdp_xmit` without further conditions in 5.15.
const XMIT_DRIVERS: [&str; 10] = ["bnxt_en", "ena", "i40e", "ice", "igb", "igc", "ixgbe", "mlx5_core", "sfc", "tun"];

fn driver(interface: &str) -> Option<String> {
    let link = fs::read_link(Path::new("/sys/class/net").join(interface).join("device/driver")).ok()?;
    Some(link.file_name()?.to_string_lossy().into_owned())
}

/// Which of two configured interfaces would see each other's packets again: a port, and the bridge or bond it belongs to.
/// The one above.
pub fn seen_twice<'a>(interface: &Interface, configured: &[String], known: &'a [Interface]) -> Option<&'a Interface> {
    let above = known.iter().find(|above| Some(above.ifindex) == interface.controller)?;
    configured.contains(&above.name).then_some(above)
}

const NETLINK_GENERIC: isize = 16;
const GENL_ID_CTRL: u16 = 16;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
const NETDEV_CMD_DEV_GET: u8 = 1;
const NETDEV_A_DEV_IFINDEX: u16 = 1;
const NETDEV_A_DEV_XDP_FEATURES: u16 = 3;
const NETLINK_HEADER: usize = 16;
const GENL_HEADER: usize = 4;

/// XDP features by interface index.
fn netdev_features() -> io::Result<Vec<(u32, u64)>> {
    let name = attribute(CTRL_ATTR_FAMILY_NAME, b"netdev\0");
    let replies = exchange(NETLINK_GENERIC, &generic(GENL_ID_CTRL, NLM_F_REQUEST, CTRL_CMD_GETFAMILY, &name))?;
    let id = replies.iter().flat_map(|reply| attributes(reply)).find_map(|(kind, value)| {
        (kind == CTRL_ATTR_FAMILY_ID).then(|| value.first_chunk::<2>().map(|bytes| u16::from_ne_bytes(*bytes)))?
    });
    let id = id.ok_or_else(|| io::Error::other("no netdev family"))?;
    let mut features = Vec::new();
    for reply in exchange(NETLINK_GENERIC, &generic(id, NLM_F_REQUEST | NLM_F_DUMP, NETDEV_CMD_DEV_GET, &[]))? {
        let (mut ifindex, mut bits) = (0, 0);
        for (kind, value) in attributes(&reply) {
            match kind {
                NETDEV_A_DEV_IFINDEX => ifindex = value.first_chunk::<4>().map_or(0, |b| u32::from_ne_bytes(*b)),
                NETDEV_A_DEV_XDP_FEATURES => bits = value.first_chunk::<8>().map_or(0, |b| u64::from_ne_bytes(*b)),
                _ => {}
            }
        }
        features.push((ifindex, bits));
    }
    Ok(features)
}

fn generic(family: u16, flags: u16, command: u8, attributes: &[u8]) -> Vec<u8> {
    let length = u32::try_from(NETLINK_HEADER + GENL_HEADER + attributes.len()).unwrap_or(0);
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend(family.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend([command, 1, 0, 0]);
    bytes.extend(attributes);
    bytes
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).unwrap_or(4);
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// Top-level attributes of a generic netlink message.
fn attributes(message: &[u8]) -> Vec<(u16, &[u8])> {
    let mut rest = message.get(NETLINK_HEADER + GENL_HEADER..).unwrap_or_default();
    let mut found = Vec::new();
    while let Some([a, b, c, d]) = rest.first_chunk::<4>() {
        let length = usize::from(u16::from_ne_bytes([*a, *b]));
        let Some(value) = rest.get(4..length) else { break };
        // The two highest bits are flags.
        found.push((u16::from_ne_bytes([*c, *d]) & 0x3fff, value));
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

/// Sends one request and collects the messages of its answer: up to NLMSG_DONE for a dump, else one datagram.
pub(super) fn exchange(protocol: isize, request: &[u8]) -> io::Result<Vec<Vec<u8>>> {
    const NLMSG_ERROR: u16 = 2;
    const NLMSG_DONE: u16 = 3;
    const NLM_F_MULTI: u16 = 2;
    let mut socket = Socket::new(protocol)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    socket.send(request, 0)?;
    let mut messages = Vec::new();
    loop {
        let (datagram, _) = socket.recv_from_full()?;
        let mut rest = datagram.as_slice();
        let mut more = false;
        while let Some(header) = rest.first_chunk::<NETLINK_HEADER>() {
            let [l0, l1, l2, l3, k0, k1, f0, f1, ..] = *header;
            let length = u32::from_ne_bytes([l0, l1, l2, l3]) as usize;
            let Some(message) = rest.get(..length).filter(|message| message.len() >= NETLINK_HEADER) else {
                return Err(io::Error::other("netlink message cut short"));
            };
            more = u16::from_ne_bytes([f0, f1]) & NLM_F_MULTI != 0;
            match u16::from_ne_bytes([k0, k1]) {
                NLMSG_DONE => return Ok(messages),
                NLMSG_ERROR => {
                    let code = message.get(NETLINK_HEADER..).and_then(|code| code.first_chunk::<4>());
                    let code = code.map_or(0, |bytes| i32::from_ne_bytes(*bytes));
                    return if code == 0 { Ok(messages) } else { Err(io::Error::from_raw_os_error(-code)) };
                }
                _ => messages.push(message.to_vec()),
            }
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
        if !more {
            return Ok(messages);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::datapath::vlans;

    fn interface(name: &str, ifindex: u32, controller: Option<u32>) -> Interface {
        Interface { name: name.to_owned(), ifindex, mtu: 1500, controller, ..Interface::default() }
    }

    #[test]
    fn jumbo_packets_are_redirected_only_to_drivers_that_send_several_buffers() {
        assert!(takes_redirects(NDO_XMIT, 1500, true));
        assert!(!takes_redirects(NDO_XMIT, 9000, true));
        assert!(takes_redirects(NDO_XMIT | NDO_XMIT_SG, 9000, true));
        assert!(
            takes_redirects(NDO_XMIT, 9000, false),
            "one buffer holds whatever a kernel without frags gives to XDP"
        );
        assert!(!takes_redirects(NDO_XMIT_SG, 1500, true));
    }

    #[test]
    fn a_port_beside_its_own_bridge_is_found_and_other_ports_are_not() {
        let known = [interface("br0", 7, None), interface("port", 8, Some(7)), interface("eth0", 9, None)];
        let configured = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let above = seen_twice(&known[1], &configured(&["port", "br0"]), &known);
        assert_eq!(above.map(|above| above.name.as_str()), Some("br0"));
        assert_eq!(seen_twice(&known[1], &configured(&["port", "eth0"]), &known), None);
        assert_eq!(seen_twice(&known[0], &configured(&["port", "br0"]), &known), None);
    }
    /// What Linux 6.1 said of the interfaces that `tests/fixtures/netlink/README.md` lists.
    fn recorded() -> Vec<Interface> {
        let text = include_str!("../../tests/fixtures/netlink/links.hex");
        let byte = |line: &str, at: usize| u8::from_str_radix(&line[at..at + 2], 16).expect("a byte");
        let message = |line: &str| (0..line.len()).step_by(2).map(|at| byte(line, at)).collect();
        read(&text.lines().map(message).collect::<Vec<_>>()).expect("messages of the kernel")
    }

    #[test]
    fn vlans_of_both_kinds_bonds_and_their_ports_are_read_out_of_what_the_kernel_said() {
        let known = recorded();
        let named = |name: &str| known.iter().find(|interface| interface.name == name).expect("recorded");
        let below = |name: &str, protocol: u16, id: u16| Some((named(name).ifindex, tag(protocol, id)));
        assert_eq!(named("eth0.100").vlan, below("eth0", CUSTOMER_TAG, 100));
        assert_eq!(named("eth0.9").vlan, below("eth0", SERVICE_TAG, 9));
        assert_eq!(named("eth0.9.6").vlan, below("eth0.9", CUSTOMER_TAG, 6));
        assert_eq!(named("bond0.7").vlan, below("bond0", CUSTOMER_TAG, 7));
        let of = |is: &dyn Fn(&Interface) -> bool| {
            known.iter().filter(|interface| is(interface)).map(|interface| interface.name.as_str()).collect::<Vec<_>>()
        };
        assert_eq!(of(&|interface| interface.bond), ["bond0"]);
        assert_eq!(of(&|interface| interface.controller == Some(named("bond0").ifindex)), ["eth1", "eth2"]);
        // A veth too has an interface "below" it, its peer, which is no VLAN's.
        assert_eq!(of(&|interface| interface.vlan.is_some() && interface.veth), [""; 0]);
        assert_eq!(of(&|interface| interface.veth).len(), 6);
        assert_eq!((named("eth0").mtu, named("eth0").xdp), (1500, None));
    }

    #[test]
    fn the_program_runs_below_the_vlans_and_bonds_that_the_kernel_told_of() {
        let known = recorded();
        let configured = ["eth0.100", "eth0.9.6", "bond0.7", "bond0"].map(str::to_owned);
        let bases = ["eth0", "eth0", "bond0", "bond0"].map(str::to_owned);
        let expected: BTreeMap<_, _> = configured.iter().cloned().zip(bases).collect();
        assert_eq!(vlans::bases(&configured, &known), expected);
        let port = known.iter().find(|interface| interface.name == "eth1").expect("recorded");
        let above = seen_twice(port, &["eth1".to_owned(), "bond0".to_owned()], &known);
        assert_eq!(above.map(|above| above.name.as_str()), Some("bond0"));
    }
}
