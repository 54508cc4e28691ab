//! Listening sockets. Who may connect is the actor's decision.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use ipnet::IpNet;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    net::{TcpListener, TcpStream},
    task::AbortHandle,
};

use super::{password::Password, socket, wire::Family};

/// Pause after an accept error such as "too many open files", which would otherwise spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why BGP cannot start.
#[derive(Debug, thiserror::Error)]
pub enum BgpError {
    /// The listening socket could not be made.
    #[error("cannot listen for BGP on {address}: {source}{}", hint(source, *address))]
    Listen {
        /// Address and port.
        address: SocketAddr,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The speaker has ended.
    #[error("the BGP speaker has ended")]
    Ended,
}

fn hint(error: &io::Error, address: SocketAddr) -> String {
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            format!("; port {} needs CAP_NET_BIND_SERVICE, or set bgp.listen_port", address.port())
        }
        io::ErrorKind::AddrInUse => {
            "; another BGP speaker runs here: stop it, or set bgp.listen_port (0: do not listen)".to_owned()
        }
        _ => String::new(),
    }
}

/// A bound socket and its accept task, which ends with it.
#[derive(Debug)]
pub struct Listener {
    task: AbortHandle,
    /// A second descriptor of the socket, for its options.
    options: OwnedFd,
}

impl Listener {
    /// Only who signs with this password may connect from `network`; an empty one takes that back.
    ///
    /// # Errors
    /// The socket option's error.
    pub fn set_password(&self, network: IpNet, password: &Password) -> io::Result<()> {
        socket::set_md5(&self.options, network, password.bytes())
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Binds the wildcard address of one family and hands every connection to `accepted`.
///
/// # Errors
/// [`BgpError::Listen`], with what to do about it.
pub fn listen<A, F>(family: Family, port: u16, accepted: A) -> Result<Listener, BgpError>
where
    A: Fn(TcpStream, SocketAddr) -> F + Send + 'static,
    F: Future<Output = ()> + Send,
{
    let wildcard = match family {
        Family::Ipv4 => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        Family::Ipv6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    let address = SocketAddr::new(wildcard, port);
    let listener = bind(address).map_err(|source| BgpError::Listen { address, source })?;
    let options = listener.as_fd().try_clone_to_owned().map_err(|source| BgpError::Listen { address, source })?;
    let task = tokio::spawn(async move {
        loop {
            match listener.accept().await {
                Ok((stream, remote)) => accepted(stream, remote).await,
                Err(error) => {
                    tracing::warn!(%address, %error, "BGP accept failed");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    });
    Ok(Listener { task: task.abort_handle(), options })
}

fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
        socket.set_unicast_hops_v6(255)?;
    } else {
        // A peer with GTSM (RFC 5082) takes our half of the handshake too only from 255.
        socket.set_ttl_v4(255)?;
    }
    socket.bind(&address.into())?;
    socket.listen(128)?;
    TcpListener::from_std(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_port_names_the_capability_that_is_missing() {
        let address = "0.0.0.0:179".parse().unwrap();
        let error = BgpError::Listen { address, source: io::Error::from_raw_os_error(libc::EACCES) }.to_string();
        assert!(error.contains("0.0.0.0:179") && error.contains("CAP_NET_BIND_SERVICE"), "{error}");
    }
}
