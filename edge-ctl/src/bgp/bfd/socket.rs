//! Sockets of BFD (RFC 5881 4 and 5, RFC 5883 5).

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    ops::RangeInclusive,
};

use socket2::{Domain, Protocol, Socket, Type};

use super::super::socket::{HOP_LIMIT, drop_what_was_routed};

/// Where single-hop sessions listen.
pub const SINGLE_HOP: u16 = 3784;
/// Where multihop sessions listen.
pub const MULTIHOP: u16 = 4784;
/// What packets leave from; one of them for the life of a session.
const SOURCES: RangeInclusive<u16> = 49152..=65535;
/// Class selector 6: routing keeps up where there is no room for others.
const TRAFFIC_CLASS: u32 = 0xc0;

/// A socket that listens for one family and kind of session.
///
/// # Errors
/// The port is another program's, mostly.
pub fn listen(ipv4: bool, port: u16) -> io::Result<UdpSocket> {
    let any = if ipv4 { IpAddr::V4(Ipv4Addr::UNSPECIFIED) } else { IpAddr::V6(Ipv6Addr::UNSPECIFIED) };
    let address = SocketAddr::new(any, port);
    let socket = new(address)?;
    if port == SINGLE_HOP {
        drop_what_was_routed(&socket, ipv4)?;
    }
    socket.bind(&address.into())?;
    Ok(socket.into())
}

/// A socket that sends from `local` to `remote`'s BFD port. `random` says which of the source ports is tried first.
///
/// # Errors
/// The address is no interface's, or no port is free.
pub fn sender(local: SocketAddr, remote: SocketAddr, multihop: bool, random: u32) -> io::Result<UdpSocket> {
    let socket = new(local)?;
    if local.is_ipv4() {
        socket.set_ttl_v4(HOP_LIMIT.into())?;
        socket.set_tos_v4(TRAFFIC_CLASS)?;
    } else {
        socket.set_unicast_hops_v6(HOP_LIMIT.into())?;
        socket.set_tclass_v6(TRAFFIC_CLASS)?;
    }
    let (first, count) = (*SOURCES.start(), SOURCES.len());
    let start = random as usize % count;
    let mut ports = (0..count).filter_map(|n| first.checked_add(u16::try_from((start + n) % count).ok()?));
    let bound = ports.try_for_each(|port| {
        let mut address = local;
        address.set_port(port);
        match socket.bind(&address.into()) {
            Ok(()) => Err(Ok(())),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => Ok(()),
            Err(error) => Err(Err(error)),
        }
    });
    match bound {
        Err(Ok(())) => {}
        Err(Err(error)) => return Err(error),
        Ok(()) => return Err(io::Error::new(io::ErrorKind::AddrInUse, "no source port from 49152 on is free")),
    }
    let mut destination = remote;
    destination.set_port(if multihop { MULTIHOP } else { SINGLE_HOP });
    socket.connect(&destination.into())?;
    Ok(socket.into())
}

fn new(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_nonblocking(true)?;
    Ok(socket)
}
