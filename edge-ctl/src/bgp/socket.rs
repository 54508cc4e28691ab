//! Socket options that socket2 has no verb for: TCP MD5 signatures (RFC 2385) and the least hop limit (RFC 5082).
#![allow(unsafe_code, reason = "setsockopt of options that no safe crate covers; one call, one fact")]

use std::{
    io,
    mem::size_of,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, AsRawFd},
};

use ipnet::IpNet;

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
