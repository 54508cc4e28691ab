//! Socket options that socket2 has no verb for: TCP MD5 signatures (RFC 2385), the least hop limit (RFC 5082), filters of raw
//! sockets and of neighbours' packets; and names of interfaces.
#![allow(unsafe_code, reason = "setsockopt of options that no safe crate covers; one call, one fact")]

use std::{
    ffi::{CStr, CString},
    io,
    mem::size_of,
    net::{IpAddr, SocketAddr, SocketAddrV6},
    os::fd::{AsFd, AsRawFd},
};

use ipnet::IpNet;
use socket2::{SockFilter, Socket};

use crate::model::scope;

/// `TCP_MD5SIG` of linux/tcp.h: the key is for a host.
const TCP_MD5SIG: libc::c_int = 14;
/// `TCP_MD5SIG_EXT`, since 4.13: the key is for a network.
const TCP_MD5SIG_EXT: libc::c_int = 32;
const TCP_MD5SIG_FLAG_PREFIX: u8 = 1;
/// `TCP_MD5SIG_MAXKEYLEN`.
pub const LONGEST_PASSWORD: usize = 80;
const IP_MINTTL: libc::c_int = 21;
const IPV6_MINHOPCOUNT: libc::c_int = 73;

/// `struct tcp_md5sig` of linux/tcp.h.
#[repr(C)]
struct Md5Key {
    address: [u8; 128],
    flags: u8,
    prefix_length: u8,
    length: u16,
    ifindex: i32,
    key: [u8; LONGEST_PASSWORD],
}

const _: () = assert!(size_of::<Md5Key>() == 128 + 8 + 80);

/// Signs what goes to hosts of `network` on this socket, and accepts only what they sign. An empty password takes the
/// key back.
///
/// # Errors
/// The kernel's; a password that is too long.
pub fn set_md5(socket: &impl AsFd, network: IpNet, password: &[u8]) -> io::Result<()> {
    let Ok(length) = u16::try_from(password.len()) else { return Err(too_long()) };
    let mut key = [0; LONGEST_PASSWORD];
    key.get_mut(..password.len()).ok_or_else(too_long)?.copy_from_slice(password);
    let (address, whole) = (sockaddr(network.addr()), network.max_prefix_len());
    // A key for a host is another one than a key for its whole-length network, and the older option sets it.
    let (option, flags) =
        if network.prefix_len() == whole { (TCP_MD5SIG, 0) } else { (TCP_MD5SIG_EXT, TCP_MD5SIG_FLAG_PREFIX) };
    let prefix_length = if flags == 0 { 0 } else { network.prefix_len() };
    let value = Md5Key { address, flags, prefix_length, length, ifindex: 0, key };
    match set(socket, libc::IPPROTO_TCP, option, &value) {
        // Taking back a key that is not there.
        Err(error) if password.is_empty() && error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        result => result,
    }
}

fn too_long() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, format!("a password has at most {LONGEST_PASSWORD} octets"))
}

/// Drops what arrives with a hop limit below `least`.
///
/// # Errors
/// The kernel's.
pub fn set_least_hop_limit(socket: &impl AsFd, peer: IpAddr, least: u8) -> io::Result<()> {
    let value = libc::c_int::from(least);
    match peer {
        IpAddr::V4(_) => set(socket, libc::IPPROTO_IP, IP_MINTTL, &value),
        IpAddr::V6(_) => set(socket, libc::IPPROTO_IPV6, IPV6_MINHOPCOUNT, &value),
    }
}

/// What a neighbour's packet arrives with, if it left with it (RFC 4861 6.1, RFC 5881 5).
pub const HOP_LIMIT: u8 = 255;

/// Whoever is not a neighbour cannot send a packet that arrives with 255 hops left. A filter of the kernel's looks at the
/// packet's own header: no packet that fails costs us more.
///
/// # Errors
/// The kernel's.
pub fn drop_what_was_routed(socket: &Socket, ipv4: bool) -> io::Result<()> {
    /// `BPF_LD | BPF_B | BPF_ABS`, `BPF_JMP | BPF_JEQ | BPF_K`, `BPF_RET | BPF_K` of linux/bpf_common.h.
    const LOAD_BYTE: u16 = 0x30;
    const JUMP_IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    /// `SKF_NET_OFF` of linux/filter.h: offsets from the network header.
    const NETWORK_HEADER: u32 = (-0x10_0000_i32).cast_unsigned();
    let hop_limit_at = if ipv4 { 8 } else { 7 };
    socket.attach_filter(&[
        SockFilter::new(LOAD_BYTE, 0, 0, NETWORK_HEADER + hop_limit_at),
        SockFilter::new(JUMP_IF_EQUAL, 0, 1, u32::from(HOP_LIMIT)),
        SockFilter::new(RETURN, 0, 0, u32::MAX),
        SockFilter::new(RETURN, 0, 0, 0),
    ])
}

/// A raw ICMPv6 socket is given messages of these types alone (RFC 3542 3.2).
///
/// # Errors
/// The kernel's.
pub fn take_icmpv6(socket: &Socket, types: &[u8]) -> io::Result<()> {
    /// `ICMPV6_FILTER` of linux/icmpv6.h: a set bit keeps its type out.
    const ICMPV6_FILTER: libc::c_int = 1;
    let mut kept_out = [u32::MAX; 8];
    for kind in types {
        kept_out[usize::from(kind >> 5)] &= !(1 << (kind & 31));
    }
    set(socket, libc::IPPROTO_ICMPV6, ICMPV6_FILTER, &kept_out)
}

/// Where a peer is dialled: a link-local one on its interface.
///
/// # Errors
/// The interface is not there (yet).
pub fn destination(peer: IpAddr, port: u16) -> io::Result<SocketAddr> {
    match (scope::bare(peer), scope::interface(peer)) {
        (IpAddr::V6(address), Some(interface)) => {
            let index = interface_index(&interface)
                .map_err(|error| io::Error::new(error.kind(), format!("interface {interface}: {error}")))?;
            Ok(SocketAddrV6::new(address, port, 0, index).into())
        }
        (address, _) => Ok(SocketAddr::new(address, port)),
    }
}

/// Who has connected: a link-local address with the interface that it came by.
pub fn origin(remote: SocketAddr) -> IpAddr {
    match remote {
        SocketAddr::V6(v6) if v6.scope_id() != 0 => match interface_name(v6.scope_id()) {
            Some(name) => scope::on(remote.ip(), &name),
            None => remote.ip(),
        },
        _ => remote.ip(),
    }
}

/// The kernel's number of an interface.
///
/// # Errors
/// It is not there.
pub fn interface_index(name: &str) -> io::Result<u32> {
    let name = CString::new(name).map_err(io::Error::other)?;
    // SAFETY: `name` is a string that ends in a zero, which the call only reads.
    match unsafe { libc::if_nametoindex(name.as_ptr()) } {
        0 => Err(io::Error::last_os_error()),
        index => Ok(index),
    }
}

/// The name of an interface; `None`: it has gone.
pub fn interface_name(index: u32) -> Option<String> {
    let mut buffer = [0u8; libc::IF_NAMESIZE];
    // SAFETY: the buffer has the IF_NAMESIZE octets that the call may write, the ending zero included.
    let found = unsafe { libc::if_indextoname(index, buffer.as_mut_ptr().cast()) };
    if found.is_null() {
        return None;
    }
    CStr::from_bytes_until_nul(&buffer).ok()?.to_str().ok().map(str::to_owned)
}

/// A `sockaddr_storage` with port 0.
fn sockaddr(address: IpAddr) -> [u8; 128] {
    let mut bytes = [0; 128];
    let address = socket2::SockAddr::from(SocketAddr::new(address, 0));
    // SAFETY: `as_ptr` points at `len` initialized bytes of a sockaddr_in or sockaddr_in6, which `address` keeps alive.
    let raw = unsafe { std::slice::from_raw_parts(address.as_ptr().cast::<u8>(), address.len() as usize) };
    let length = raw.len().min(bytes.len());
    bytes[..length].copy_from_slice(&raw[..length]);
    bytes
}

fn set<T>(socket: &impl AsFd, level: libc::c_int, name: libc::c_int, value: &T) -> io::Result<()> {
    let length = libc::socklen_t::try_from(size_of::<T>()).map_err(io::Error::other)?;
    // SAFETY: the descriptor is borrowed for the call, and the kernel reads `length` bytes of `value`, a repr(C) type.
    let result =
        unsafe { libc::setsockopt(socket.as_fd().as_raw_fd(), level, name, std::ptr::from_ref(value).cast(), length) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
