//! One check, made with a socket of its own. It leaves from the address that traffic uses and from a port that the kernel
//! gives out of its ephemeral range, which SNAT leaves alone.
//!
//! Connections end with a reset (SO_LINGER 0): thousands of checks a second must not leave as many sockets in TIME_WAIT,
//! and a port for each of them.

mod exchange;
mod grpc;
mod http;
pub mod tls;

use std::{
    io,
    net::SocketAddr,
    time::{Duration, Instant},
};

use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpSocket, TcpStream},
    time::timeout,
};

use self::tls::Connector;
use super::{book::Order, state::Outcome};
use crate::model::Check;

/// Most of an answer that is looked at.
const MOST_BYTES: usize = 64 << 10;

/// Both kinds of stream.
trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// Why a check did not pass.
#[derive(Debug)]
enum Trouble {
    /// The backend's doing.
    Backend(String),
    /// This host's: nothing was learnt about the backend.
    Local(String),
}

impl Trouble {
    fn backend(text: impl Into<String>) -> Self {
        Self::Backend(text.into())
    }

    /// What the kernel said during `what`.
    fn io(what: &str, error: &io::Error) -> Self {
        // What this host lacks: descriptors, memory, ports, its own address, permission. EHOSTUNREACH and ENETUNREACH are
        // not among them: clients' packets would not get there either.
        let local = [
            libc::EMFILE,
            libc::ENFILE,
            libc::ENOMEM,
            libc::ENOBUFS,
            libc::EADDRINUSE,
            libc::EADDRNOTAVAIL,
            libc::EACCES,
            libc::EPERM,
        ];
        let text = format!("{what}: {}", plain(error));
        match error.raw_os_error() {
            Some(code) if local.contains(&code) => Self::Local(text),
            _ => Self::Backend(text),
        }
    }
}

/// Without the kernel's error number.
fn plain(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or_default().to_lowercase()
}

/// Makes the check.
pub async fn probe(order: &Order, connector: Option<&Result<Connector, String>>) -> Outcome {
    let mut connect = None;
    let limit = order.health.timeout;
    let result = timeout(limit, attempt(order, connector, &mut connect)).await;
    match (result, connect) {
        (Ok(Ok(())), connect) => Outcome::Pass { connect: connect.unwrap_or_default() },
        (Ok(Err(Trouble::Backend(reason))), _) => Outcome::Fail { reason },
        (Ok(Err(Trouble::Local(reason))), _) => Outcome::Local { reason },
        (Err(_), None) => Outcome::Fail { reason: format!("no connection within {}", ms(limit)) },
        (Err(_), Some(_)) => Outcome::Fail { reason: format!("connected, but no good answer within {}", ms(limit)) },
    }
}

fn ms(duration: Duration) -> String {
    format!("{} ms", duration.as_millis())
}

async fn attempt(
    order: &Order,
    connector: Option<&Result<Connector, String>>,
    connected: &mut Option<Duration>,
) -> Result<(), Trouble> {
    let start = Instant::now();
    if let Check::Udp(wanted) = &order.health.check {
        let answered = exchange::udp(order, wanted).await?;
        *connected = Some(answered);
        return Ok(());
    }
    let mut tcp = connect(order).await?;
    *connected = Some(start.elapsed());
    // What becomes of the socket from here on, whoever drops it: a reset.
    if let Err(error) = SockRef::from(&tcp).set_linger(Some(Duration::ZERO)) {
        return Err(Trouble::io("SO_LINGER", &error));
    }
    let address = order.address;
    match &order.health.check {
        Check::Tcp(wanted) => exchange::stream(&mut tcp, wanted).await,
        Check::Tls(_) => tls::handshake(tcp, address, connector).await.map(|_| ()),
        Check::Http(wanted, None) => http::ask(tcp, address, wanted).await,
        Check::Http(wanted, Some(_)) => {
            http::ask(tls::handshake(tcp, address, connector).await?, address, wanted).await
        }
        Check::Grpc { service, tls: None } => grpc::ask(tcp, address, service).await,
        Check::Grpc { service, tls: Some(_) } => {
            grpc::ask(tls::handshake(tcp, address, connector).await?, address, service).await
        }
        Check::Udp(_) | Check::None => Ok(()),
    }
}

async fn connect(order: &Order) -> Result<TcpStream, Trouble> {
    let socket = match order.address {
        SocketAddr::V4(_) => TcpSocket::new_v4(),
        SocketAddr::V6(_) => TcpSocket::new_v6(),
    };
    let socket = socket.map_err(|error| Trouble::io("socket", &error))?;
    if let Some(source) = order.source {
        let from = |error: io::Error| Trouble::io(&format!("bind to {source}"), &error);
        socket.bind((source, 0).into()).map_err(from)?;
    }
    socket.connect(order.address).await.map_err(|error| Trouble::io("connect", &error))
}

/// True where `needle` is in `haystack`; an empty one always is.
fn holds(haystack: &[u8], needle: &[u8]) -> bool {
    needle.is_empty() || haystack.windows(needle.len()).any(|window| window == needle)
}

#[cfg(test)]
mod tests;
