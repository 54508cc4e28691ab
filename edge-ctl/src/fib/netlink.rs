//! The real port: rtnetlink. Needs CAP_NET_ADMIN to change anything and nothing to read.

use std::{
    collections::BTreeMap,
    future::Future,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use futures::{Stream, StreamExt, TryStreamExt};
use ipnet::IpNet;
use rtnetlink::{
    Error, Handle, MulticastGroup, RouteMessageBuilder, RouteNextHopBuilder,
    packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload},
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressProtocol},
        link::{LinkAttribute, LinkFlags, LinkMessage},
        neighbour::{
            NeighbourAddress, NeighbourAttribute, NeighbourExtFlags, NeighbourFlags, NeighbourMessage, NeighbourState,
        },
        route::{
            RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteNextHop, RouteProtocol, RouteType, RouteVia,
        },
    },
};
use tokio::sync::mpsc;

use super::{
    FibError, Kernel, Link, LocalAddress, Neighbour, NextHopStyle, Notice, ObjectCounts, RouteTo, Snapshot,
    batch::Batches,
    monitor, nexthop,
    plan::{KernelRoute, NextHop, PROTOCOL_BGP, RouteChange, Table},
};

/// A kernel that does not answer within this time is taken for broken, and the request as failed.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// Mark of the addresses that we add: a label on IPv4, the protocol number on IPv6 (kept from Linux 5.18 on).
const LABEL: &str = "lo:edge";

pub(super) struct Netlink {
    handle: Handle,
    routes: Batches,
}

impl Netlink {
    /// Opens one socket for requests, one for route changes and one for notifications, so that a flood of the last loses
    /// no answer.
    pub(super) fn connect(next_hops: NextHopStyle) -> Result<(Self, mpsc::UnboundedReceiver<Notice>), FibError> {
        let failed = |error: std::io::Error| FibError::Socket(error.to_string());
        let (mut connection, handle, _) = rtnetlink::new_connection().map_err(failed)?;
        let port = {
            use rtnetlink::sys::AsyncSocket;
            connection.socket_mut().socket_mut().bind_auto().map_err(failed)?.port_number()
        };
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Neigh,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
        ];
        let routes = Batches::open(next_hops).map_err(failed)?;
        let (mut watching, _, messages) = rtnetlink::new_multicast_connection(&groups).map_err(failed)?;
        {
            use rtnetlink::sys::AsyncSocket;
            monitor::leave_out(watching.socket_mut().socket_mut(), routes.port).map_err(failed)?;
        }
        let (notices, receiver) = mpsc::unbounded_channel();
        tokio::spawn(connection);
        tokio::spawn(watching);
        let objects = monitor::of_objects().map_err(failed)?;
        tokio::spawn(monitor::forward_objects(objects, routes.port, notices.clone()));
        tokio::spawn(monitor::forward(messages, port, notices));
        Ok((Self { handle, routes }, receiver))
    }

    async fn request(
        &self,
        what: impl Fn() -> String,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<(), FibError> {
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        let mut handle = self.handle.clone();
        let answer = async move {
            let mut answers = handle.request(request)?;
            while let Some(answer) = answers.next().await {
                if let NetlinkPayload::Error(error) = answer.payload
                    && error.code.is_some()
                {
                    return Err(Error::NetlinkError(error));
                }
            }
            Ok(())
        };
        timely(what, answer).await
    }

    async fn links(&self) -> Result<BTreeMap<u32, Link>, FibError> {
        let links: Vec<LinkMessage> = collect("read the interfaces", self.handle.link().get().execute()).await?;
        Ok(links.iter().map(|message| (message.header.index, link(message))).collect())
    }

    async fn table(&self) -> Result<Table, FibError> {
        let mut routes = Vec::new();
        let objects = self.routes.objects()?;
        let (all, mut named) = (objects.as_deref().unwrap_or_default(), Vec::new());
        for message in [RouteMessageBuilder::<Ipv4Addr>::new().build(), RouteMessageBuilder::<Ipv6Addr>::new().build()]
        {
            let messages: Vec<RouteMessage> =
                collect("read the routes", self.handle.route().get(message).execute()).await?;
            for message in &messages {
                let Some(mut route) = kernel_route(message) else { continue };
                let object = object_of(message);
                // What the object stands for is said with the route, unless `net.ipv4.nexthop_compat_mode` is 0.
                if let Some(id) = object.filter(|_| route.next_hops.is_empty()) {
                    route.next_hops = nexthop::next_hops(all, id);
                }
                named.extend(object.map(|id| (route.prefix, id)));
                routes.push(route);
            }
        }
        if objects.is_some() {
            self.routes.settle(all, &named);
        }
        Ok(Table::new(routes))
    }
}

impl Kernel for Netlink {
    async fn snapshot(&self) -> Result<Snapshot, FibError> {
        let (links, addresses, table) = (self.links().await?, self.addresses().await?, self.table().await?);
        let table = table.with_interfaces(links.iter().map(|(ifindex, link)| (*ifindex, link.name.as_str())));
        Ok(Snapshot { links, addresses, table })
    }

    async fn addresses(&self) -> Result<Vec<LocalAddress>, FibError> {
        let messages: Vec<AddressMessage> =
            collect("read the addresses", self.handle.address().get().execute()).await?;
        let mut addresses: Vec<LocalAddress> = messages.iter().filter_map(local_address).collect();
        addresses.sort();
        Ok(addresses)
    }

    async fn neighbours(&self) -> Result<Vec<Neighbour>, FibError> {
        let messages: Vec<NeighbourMessage> =
            collect("read the neighbours", self.handle.neighbours().get().execute()).await?;
        Ok(messages.iter().filter_map(neighbour).collect())
    }

    async fn change(&self, changes: &[RouteChange]) -> Vec<Result<(), FibError>> {
        self.routes.change(changes)
    }

    fn objects(&self) -> ObjectCounts {
        self.routes.counts()
    }

    async fn route_to(&self, destination: IpAddr) -> Result<Option<RouteTo>, FibError> {
        let length = if destination.is_ipv4() { 32 } else { 128 };
        let mut message = RouteMessage::default();
        message.header.address_family = family(destination);
        message.header.destination_prefix_length = length;
        message.attributes.push(RouteAttribute::Destination(destination.into()));
        let what = format!("look up {destination}");
        match collect::<RouteMessage, Vec<_>>(&what, self.handle.route().get(message).execute()).await {
            Ok(messages) => Ok(messages.first().and_then(route_to)),
            Err(FibError::Refused {
                errno: libc::ENETUNREACH | libc::EHOSTUNREACH | libc::EACCES | libc::EINVAL,
                ..
            }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn add_address(&self, ifindex: u32, address: IpAddr) -> Result<(), FibError> {
        let message = RouteNetlinkMessage::NewAddress(address_message(ifindex, address));
        self.request(|| format!("put {address} on lo"), message, NLM_F_CREATE | NLM_F_REPLACE).await
    }

    async fn remove_address(&self, ifindex: u32, address: IpAddr) -> Result<(), FibError> {
        let message = RouteNetlinkMessage::DelAddress(address_message(ifindex, address));
        match self.request(|| format!("take {address} off lo"), message, 0).await {
            Err(FibError::Refused { errno: libc::EADDRNOTAVAIL, .. }) => Ok(()),
            result => result,
        }
    }

    async fn probe(&self, ifindex: u32, address: IpAddr, managed: bool) -> Result<(), FibError> {
        let mut message = NeighbourMessage::default();
        message.header.family = family(address);
        message.header.ifindex = ifindex;
        message.header.state = NeighbourState::None;
        message.header.flags = NeighbourFlags::Use;
        message.attributes.push(NeighbourAttribute::Destination(match address {
            IpAddr::V4(address) => NeighbourAddress::Inet(address),
            IpAddr::V6(address) => NeighbourAddress::Inet6(address),
        }));
        if managed {
            // Kernels before 5.16 ignore the attribute and do what NTF_USE says.
            message.attributes.push(NeighbourAttribute::ExtFlags(NeighbourExtFlags::Managed));
        }
        let what = || format!("resolve neighbour {address}");
        self.request(what, RouteNetlinkMessage::NewNeighbour(message), NLM_F_CREATE).await
    }
}

async fn timely<T>(what: impl Fn() -> String, answer: impl Future<Output = Result<T, Error>>) -> Result<T, FibError> {
    let refused = |reason: String, errno: i32| FibError::Refused { what: what(), reason, errno };
    match tokio::time::timeout(REQUEST_TIMEOUT, answer).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(Error::NetlinkError(error))) => Err(refused(error.to_io().to_string(), -error.raw_code())),
        Ok(Err(error)) => Err(refused(error.to_string(), 0)),
        Err(_) => Err(refused(format!("no answer from the kernel within {REQUEST_TIMEOUT:?}"), libc::ETIMEDOUT)),
    }
}

async fn collect<T, C: Default + Extend<T>>(
    what: &str,
    answers: impl Stream<Item = Result<T, Error>>,
) -> Result<C, FibError> {
    timely(|| what.to_owned(), answers.try_collect::<C>()).await
}

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

pub(super) fn route_message(prefix: IpNet, metric: u32, next_hops: &[NextHop]) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(prefix.addr());
    message.header.destination_prefix_length = prefix.prefix_len();
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::from(PROTOCOL_BGP);
    message.header.kind = RouteType::Unicast;
    message.attributes.push(RouteAttribute::Destination(prefix.network().into()));
    message.attributes.push(RouteAttribute::Priority(metric));
    if let [hop] = next_hops {
        message.attributes.extend(hop.gateway.map(|gateway| via(prefix, gateway)));
        message.attributes.push(RouteAttribute::Oif(hop.ifindex));
    } else if !next_hops.is_empty() {
        let hops = next_hops.iter().map(|hop| {
            let mut built = RouteNextHopBuilder::new(family(prefix.addr())).interface(hop.ifindex).build();
            built.attributes.extend(hop.gateway.map(|gateway| via(prefix, gateway)));
            built
        });
        message.attributes.push(RouteAttribute::MultiPath(hops.collect()));
    }
    message
}

/// The gateway of a route; one of the other family goes into RTA_VIA (since 5.2 for IPv4 routes).
fn via(prefix: IpNet, gateway: IpAddr) -> RouteAttribute {
    match (prefix, gateway) {
        (IpNet::V4(_), IpAddr::V6(gateway)) => RouteAttribute::Via(RouteVia::Inet6(gateway)),
        _ => RouteAttribute::Gateway(gateway.into()),
    }
}

/// The gateway that a route's attribute names.
fn gateway_of(attribute: &RouteAttribute) -> Option<IpAddr> {
    match attribute {
        RouteAttribute::Gateway(value) => ip(value),
        RouteAttribute::Via(RouteVia::Inet6(address)) => Some(IpAddr::V6(*address)),
        RouteAttribute::Via(RouteVia::Inet(address)) => Some(IpAddr::V4(*address)),
        _ => None,
    }
}

fn address_message(ifindex: u32, address: IpAddr) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(address);
    message.header.index = ifindex;
    message.header.prefix_len = if address.is_ipv4() { 32 } else { 128 };
    message.attributes.push(AddressAttribute::Local(address));
    message.attributes.push(AddressAttribute::Address(address));
    if address.is_ipv4() {
        message.attributes.push(AddressAttribute::Label(LABEL.into()));
    } else {
        // Duplicate address detection is pointless on lo and would keep the address tentative.
        message.header.flags = AddressHeaderFlags::Nodad;
        message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        message.attributes.push(AddressAttribute::Protocol(AddressProtocol::Other(PROTOCOL_BGP)));
    }
    message
}

fn link(message: &LinkMessage) -> Link {
    let flags = message.header.flags;
    let mut link = Link {
        name: String::new(),
        up: flags.contains(LinkFlags::Up | LinkFlags::LowerUp),
        loopback: flags.contains(LinkFlags::Loopback),
        mtu: 0,
        mac: None,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Address(address) => link.mac = address.as_slice().try_into().ok(),
            _ => {}
        }
    }
    link
}

fn local_address(message: &AddressMessage) -> Option<LocalAddress> {
    let (mut local, mut address, mut ours) = (None, None, false);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(value) => local = Some(*value),
            AddressAttribute::Address(value) => address = Some(*value),
            AddressAttribute::Label(label) => ours |= label == LABEL,
            AddressAttribute::Protocol(protocol) => ours |= *protocol == AddressProtocol::Other(PROTOCOL_BGP),
            _ => {}
        }
    }
    // On a point-to-point link IFA_ADDRESS is the peer's.
    let address = local.or(address)?;
    Some(LocalAddress { ifindex: message.header.index, address, length: message.header.prefix_len, ours })
}

pub(super) fn neighbour(message: &NeighbourMessage) -> Option<Neighbour> {
    let (mut address, mut lladdr, mut managed) = (None, None, false);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(value)) => address = Some(IpAddr::V4(*value)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(value)) => address = Some(IpAddr::V6(*value)),
            NeighbourAttribute::LinkLayerAddress(value) => lladdr = value.as_slice().try_into().ok(),
            NeighbourAttribute::ExtFlags(flags) => managed |= flags.contains(NeighbourExtFlags::Managed),
            _ => {}
        }
    }
    let address = address.filter(|address| !address.is_multicast())?;
    let state = message.header.state;
    let fixed = matches!(state, NeighbourState::Permanent | NeighbourState::Noarp);
    let usable = !matches!(state, NeighbourState::Failed | NeighbourState::Incomplete | NeighbourState::None);
    Some(Neighbour { ifindex: message.header.ifindex, address, mac: lladdr.filter(|_| usable), fixed, managed })
}

/// The route, where it is a unicast route of the main table.
pub(super) fn kernel_route(message: &RouteMessage) -> Option<KernelRoute> {
    let header = &message.header;
    let (mut table, mut metric, mut prefix) = (u32::from(header.table), 0, None);
    let (mut gateway, mut oif, mut multipath) = (None, None, Vec::new());
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(value) => table = *value,
            RouteAttribute::Priority(value) => metric = *value,
            RouteAttribute::Destination(value) => prefix = ip(value),
            RouteAttribute::Gateway(_) | RouteAttribute::Via(_) => gateway = gateway_of(attribute),
            RouteAttribute::Oif(value) => oif = Some(*value),
            RouteAttribute::MultiPath(hops) => multipath = hops.iter().map(next_hop).collect(),
            _ => {}
        }
    }
    if table != u32::from(RouteHeader::RT_TABLE_MAIN) || header.kind != RouteType::Unicast {
        return None;
    }
    let any = match header.address_family {
        AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        AddressFamily::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        _ => return None,
    };
    let prefix = IpNet::new(prefix.unwrap_or(any), header.destination_prefix_length).ok()?;
    let mut next_hops = multipath;
    if next_hops.is_empty() {
        next_hops.extend(oif.map(|ifindex| NextHop { gateway, ifindex }));
    }
    next_hops.sort();
    Some(KernelRoute { prefix, metric, protocol: header.protocol.into(), next_hops })
}

fn object_of(message: &RouteMessage) -> Option<u32> {
    message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::NhId(id) => Some(*id),
        _ => None,
    })
}

fn next_hop(hop: &RouteNextHop) -> NextHop {
    let gateway = hop.attributes.iter().find_map(gateway_of);
    NextHop { gateway, ifindex: hop.interface_index }
}

fn route_to(message: &RouteMessage) -> Option<RouteTo> {
    let mut route = RouteTo { ifindex: 0, gateway: None, source: None, local: message.header.kind == RouteType::Local };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(value) => route.ifindex = *value,
            RouteAttribute::Gateway(_) | RouteAttribute::Via(_) => route.gateway = gateway_of(attribute),
            RouteAttribute::PrefSource(value) => route.source = ip(value),
            _ => {}
        }
    }
    matches!(message.header.kind, RouteType::Unicast | RouteType::Local).then_some(route)
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some(IpAddr::V4(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::V6(*address)),
        _ => None,
    }
}
