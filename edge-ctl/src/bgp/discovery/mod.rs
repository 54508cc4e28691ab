//! Finding the neighbour on a link by router advertisements (RFC 4861), as FRR's `neighbor eth0 interface` does: both sides
//! advertise themselves, and each takes the other's link-local address from what it hears.
//!
//! One raw socket for all links; it needs CAP_NET_RAW. Ours say a router lifetime of 0, so that no host on the link takes us
//! for its default router.

mod message;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6},
    sync::Arc,
    time::Duration,
};

use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    // Of a raw socket too it receives from, and sends to, an address.
    net::UdpSocket,
    sync::Notify,
    task::AbortHandle,
    time::{Instant, sleep_until},
};

use self::message::Message;
use super::socket::{HOP_LIMIT, interface_index, interface_name};
use crate::model::scope;

/// Between advertisements on a quiet link, as FRR has it for such neighbours.
const INTERVAL: Duration = Duration::from_secs(10);
/// Between the first ones, and after a link came back.
const FIRST_INTERVAL: Duration = Duration::from_secs(1);
/// How many of those.
const FIRST: u32 = 5;
/// A solicitation is answered at most this often on a link.
const ANSWER_INTERVAL: Duration = Duration::from_millis(500);
/// ff02::1.
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
/// ff02::2.
const ALL_ROUTERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);
/// No message that is of interest is longer than a frame.
const LONGEST: usize = 1500;

/// A neighbour that was heard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The link.
    pub interface: String,
    /// The neighbour's link-local address with its interface, as [`scope::on`] has it.
    pub address: IpAddr,
}

/// The links that are listened on; ends when it is dropped.
#[derive(Debug)]
pub struct Discovery {
    interfaces: BTreeSet<String>,
    task: AbortHandle,
    again: Arc<Notify>,
}

impl Discovery {
    /// Advertises on these links, in the current network namespace, and reports every advertisement that comes by them.
    ///
    /// # Errors
    /// The socket cannot be made: in words, with what to do.
    pub fn start<F>(interfaces: BTreeSet<String>, found: impl Fn(Found) -> F + Send + 'static) -> Result<Self, String>
    where
        F: Future<Output = ()> + Send,
    {
        let socket = socket().map_err(|error| match error.kind() {
            io::ErrorKind::PermissionDenied => {
                format!("cannot listen for router advertisements: {error}; it needs CAP_NET_RAW")
            }
            _ => format!("cannot listen for router advertisements: {error}"),
        })?;
        let again = Arc::new(Notify::new());
        let mut speaker =
            Speaker { socket, links: interfaces.iter().map(|name| (name.clone(), Link::default())).collect() };
        let notified = Arc::clone(&again);
        let task = tokio::spawn(async move { speaker.run(&notified, found).await });
        Ok(Self { interfaces, task: task.abort_handle(), again })
    }

    /// The links.
    pub const fn interfaces(&self) -> &BTreeSet<String> {
        &self.interfaces
    }

    /// A link may have come back: whoever is on it is asked at once.
    pub fn ask_again(&self) {
        self.again.notify_one();
    }
}

impl Drop for Discovery {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What is known of a link.
#[derive(Debug, Default)]
struct Link {
    /// The kernel's number that the group of all routers was joined on.
    joined: Option<u32>,
    answered: Option<Instant>,
}

struct Speaker {
    socket: UdpSocket,
    links: BTreeMap<String, Link>,
}

impl Speaker {
    async fn run<F: Future<Output = ()>>(&mut self, again: &Notify, found: impl Fn(Found) -> F) {
        let mut first = FIRST;
        let mut next = Instant::now();
        let mut buffer = [0; LONGEST];
        loop {
            tokio::select! {
                () = sleep_until(next) => {
                    self.advertise(first > 0);
                    first = first.saturating_sub(1);
                    next = Instant::now() + if first > 0 { FIRST_INTERVAL } else { INTERVAL };
                }
                () = again.notified() => {
                    first = FIRST;
                    next = next.min(Instant::now() + FIRST_INTERVAL);
                }
                received = self.socket.recv_from(&mut buffer) => match received {
                    Ok((length, from)) => {
                        let neighbour = buffer.get(..length).and_then(|bytes| self.heard(bytes, from));
                        if let Some(neighbour) = neighbour {
                            found(neighbour).await;
                        }
                    }
                    Err(error) => {
                        tracing::warn!(%error, "router advertisements: receiving failed");
                        tokio::time::sleep(FIRST_INTERVAL).await;
                    }
                },
            }
        }
    }

    /// Says on every link that we are here, and asks who else is.
    fn advertise(&mut self, ask: bool) {
        for (name, link) in &mut self.links {
            // An interface that is not there yet, or is down, is tried again at the next turn.
            let Ok(index) = interface_index(name) else {
                link.joined = None;
                continue;
            };
            if link.joined != Some(index) {
                // Already a member: the name has gone from one interface to another and back.
                let _ = self.socket.join_multicast_v6(&ALL_ROUTERS, index);
                link.joined = Some(index);
            }
            send(&self.socket, name, index, ALL_NODES, &message::advertisement());
            if ask {
                send(&self.socket, name, index, ALL_ROUTERS, &message::solicitation());
            }
        }
    }

    /// Whom a message makes known; a question is answered.
    fn heard(&mut self, bytes: &[u8], from: SocketAddr) -> Option<Found> {
        let SocketAddr::V6(from) = from else { return None };
        if !from.ip().is_unicast_link_local() {
            return None;
        }
        let interface = interface_name(from.scope_id())?;
        let link = self.links.get_mut(&interface)?;
        match message::read(bytes)? {
            Message::Advertisement => {
                let address = scope::on(IpAddr::V6(*from.ip()), &interface);
                Some(Found { interface, address })
            }
            Message::Solicitation => {
                let now = Instant::now();
                if link.answered.is_none_or(|at| at + ANSWER_INTERVAL <= now) {
                    link.answered = Some(now);
                    send(&self.socket, &interface, from.scope_id(), *from.ip(), &message::advertisement());
                }
                None
            }
        }
    }
}

fn send(socket: &UdpSocket, interface: &str, index: u32, to: Ipv6Addr, message: &[u8]) {
    let to = SocketAddr::from(SocketAddrV6::new(to, 0, 0, index));
    if let Err(error) = socket.try_send_to(message, to) {
        tracing::debug!(interface, %to, %error, "router advertisement not sent");
    }
}

fn socket() -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6))?;
    super::socket::drop_what_was_routed(&socket, false)?;
    super::socket::take_icmpv6(&socket, &[message::SOLICITATION, message::ADVERTISEMENT])?;
    socket.set_nonblocking(true)?;
    socket.set_multicast_hops_v6(HOP_LIMIT.into())?;
    socket.set_unicast_hops_v6(HOP_LIMIT.into())?;
    socket.set_multicast_loop_v6(false)?;
    UdpSocket::from_std(socket.into())
}
