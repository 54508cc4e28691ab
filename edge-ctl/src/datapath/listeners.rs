//! Ports on which sockets of this host listen, asked of the kernel's socket diagnosis (linux/inet_diag.h): /proc/net/tcp walks the
//! table of all connections for them, which takes milliseconds however few there are.

use std::io;

use rtnetlink::{
    packet_core::{NLM_F_DUMP, NLM_F_REQUEST},
    sys::protocols,
};

use super::interfaces::exchange;

/// `SOCK_DIAG_BY_FAMILY` of linux/sock_diag.h.
const SOCK_DIAG_BY_FAMILY: u16 = 20;
/// Of a message's head (linux/netlink.h), bytes.
const HEADER: usize = 16;
/// Of `struct inet_diag_req_v2`, bytes.
const REQUEST: usize = 56;
/// `TCP_LISTEN` as a bit, for that state alone.
const LISTENING: u32 = 1 << 10;

/// Local ports of the TCP sockets that listen now, of both families.
///
/// # Errors
/// Those of the netlink socket; a kernel without the diagnosis says that there is no such thing.
pub fn tcp() -> io::Result<Vec<u16>> {
    let mut ports = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        for message in exchange(protocols::NETLINK_SOCK_DIAG, &request(family))? {
            ports.extend(port(&message));
        }
    }
    Ok(ports)
}

fn request(family: libc::c_int) -> Vec<u8> {
    let mut bytes = u32::try_from(HEADER + REQUEST).unwrap_or(0).to_ne_bytes().to_vec();
    bytes.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    bytes.extend((NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    bytes.extend([0; 8]);
    let small = |number: libc::c_int| u8::try_from(number).unwrap_or_default();
    bytes.extend([small(family), small(libc::IPPROTO_TCP), 0, 0]);
    bytes.extend(LISTENING.to_ne_bytes());
    bytes.resize(HEADER + REQUEST, 0);
    bytes
}

/// The local port in a `struct inet_diag_msg`, which follows its first four bytes in network order.
fn port(message: &[u8]) -> Option<u16> {
    message.get(HEADER + 4..)?.first_chunk().map(|bytes| u16::from_be_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn ports_of_listening_sockets_are_found_and_those_of_connections_are_not() {
        let (v4, v6) = (TcpListener::bind("127.0.0.1:0").unwrap(), TcpListener::bind("[::1]:0").unwrap());
        let client = TcpStream::connect(v4.local_addr().unwrap()).unwrap();
        let found = tcp().unwrap();
        for listener in [&v4, &v6] {
            assert!(found.contains(&listener.local_addr().unwrap().port()));
        }
        assert!(!found.contains(&client.local_addr().unwrap().port()));
    }
}
