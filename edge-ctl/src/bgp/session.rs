//! One TCP connection: dialling, framing, writing. It decides nothing; the actor does.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicU16, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use ipnet::IpNet;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpSocket, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{mpsc, oneshot, watch},
    time::timeout,
};

use super::{
    password::Password,
    socket,
    wire::{self, Notification},
};
use crate::{config::valid::Peer, model::scope};

/// How much is read before the actor gets a turn; about two thousand prefixes.
const READ_SIZE: usize = 64 * 1024;
/// RFC 9687 5: a write that makes no progress for eight minutes, or two hold times, ends the session.
const SEND_HOLD: Duration = Duration::from_secs(480);
/// How long a connection that is being closed may take to write what is queued.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// How long a closing connection waits for the peer's own close, so that a NOTIFICATION is read and not reset away.
const LINGER: Duration = Duration::from_secs(1);

/// Identifies a connection for as long as the process runs.
pub type LinkId = u64;

/// What a connection tells the actor.
#[derive(Debug)]
pub enum LinkEvent {
    /// Complete messages, in order.
    Frames(Vec<Bytes>),
    /// What follows cannot be framed.
    BadHeader(Notification),
    /// The connection is gone.
    Closed(String),
    /// What we have to say could not be written for a send hold time.
    Stuck,
}

/// The actor's end of a connection. Dropping it closes the connection once everything queued is written.
#[derive(Debug)]
pub struct Link {
    /// Its identity.
    pub id: LinkId,
    /// Our address on it.
    pub local: SocketAddr,
    /// The peer's.
    pub remote: SocketAddr,
    outbox: mpsc::UnboundedSender<Bytes>,
    unsent: Arc<AtomicU64>,
    unread: Arc<AtomicU64>,
    longest: Arc<AtomicU16>,
    alive: watch::Receiver<()>,
    /// Tells the task that the actor has let go.
    _held: oneshot::Sender<()>,
    /// A second descriptor of the connection, for its options.
    options: Option<OwnedFd>,
}

impl Link {
    /// Queues a message. The queue is bounded by what we originate; see [`Link::unsent`] for who watches it.
    pub fn send(&self, message: Bytes) {
        self.unsent.fetch_add(1, Ordering::Relaxed);
        // A connection that has ended reports so itself.
        let _ = self.outbox.send(message);
    }

    /// Completes when the connection's task has ended: everything queued is written, or never will be.
    pub fn ended(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut alive = self.alive.clone();
        async move { while alive.changed().await.is_ok() {} }
    }

    /// From now on messages of this length are taken (RFC 8654).
    pub fn take_up_to(&self, longest: u16) {
        self.longest.store(longest, Ordering::Relaxed);
    }

    /// Signs with another password from now on, in both directions.
    ///
    /// # Errors
    /// The socket option's error.
    pub fn set_password(&self, password: &Password) -> io::Result<()> {
        let host = IpNet::from(self.remote.ip());
        self.options.as_ref().map_or(Ok(()), |socket| socket::set_md5(socket, host, password.bytes()))
    }

    /// Messages waiting to be written.
    pub fn unsent(&self) -> u64 {
        self.unsent.load(Ordering::Relaxed)
    }

    /// Bytes received and not yet processed.
    pub fn unread(&self) -> u64 {
        self.unread.load(Ordering::Relaxed)
    }

    /// Tells that `bytes` of a [`LinkEvent::Frames`] were processed.
    pub fn processed(&self, bytes: usize) {
        self.unread.fetch_sub(bytes as u64, Ordering::Relaxed);
    }
}

/// Dials a peer from its configured local address.
///
/// # Errors
/// The socket, bind or connect error, as it is to be told.
pub async fn dial(peer: &Peer, internal: bool, password: &Password) -> io::Result<TcpStream> {
    let remote = socket::destination(peer.address, peer.port)?;
    let socket = Socket::new(Domain::for_address(remote), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    set_hop_limits(&socket, peer, internal)?;
    if !password.bytes().is_empty() {
        socket::set_md5(&socket, IpNet::from(scope::bare(peer.address)), password.bytes())
            .map_err(|error| io::Error::new(error.kind(), format!("TCP MD5 password: {error}")))?;
    }
    if let Some(local) = peer.local_address {
        socket.bind(&SocketAddr::new(local, 0).into()).map_err(|error| {
            let hint = if error.kind() == io::ErrorKind::AddrNotAvailable { "; no interface has it (yet)" } else { "" };
            io::Error::new(error.kind(), format!("local address {local}: {error}{hint}"))
        })?;
    }
    let stream = TcpSocket::from_std_stream(socket.into()).connect(remote).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Prepares an accepted connection as [`dial`] prepares its own. Its password is the listener's.
///
/// # Errors
/// The socket option's error.
pub fn prepare_accepted(stream: &TcpStream, peer: &Peer, internal: bool) -> io::Result<()> {
    set_hop_limits(&socket2::SockRef::from(stream), peer, internal)?;
    stream.set_nodelay(true)
}

/// External peers are neighbours on the wire unless `ebgp_multihop` says otherwise: a hop limit of one keeps it so. With
/// `ttl_security` packets start at 255, and those that have come further than allowed are dropped by the kernel.
fn set_hop_limits(socket: &Socket, peer: &Peer, internal: bool) -> io::Result<()> {
    let hops = match peer.session.ttl_security {
        Some(hops) => {
            socket::set_least_hop_limit(socket, peer.address, u8::MAX - hops + 1)?;
            u32::from(u8::MAX)
        }
        None if internal => return Ok(()),
        None => u32::from(peer.ebgp_multihop.max(1)),
    };
    match peer.address {
        IpAddr::V4(_) => socket.set_ttl_v4(hops),
        IpAddr::V6(_) => socket.set_unicast_hops_v6(hops),
    }
}

/// The send hold time of a peer (RFC 9687 5).
pub fn send_hold(peer: &Peer) -> Duration {
    peer.session.send_hold.unwrap_or_else(|| SEND_HOLD.max(2 * peer.hold))
}

/// Starts the task of a connection. `report` delivers its events and waits while the actor is busy, which stops the
/// reading and so the peer: no update is ever dropped.
///
/// # Errors
/// The connection has no addresses any more: it is gone.
pub fn start<R, F>(id: LinkId, stream: TcpStream, send_hold: Duration, report: R) -> io::Result<Link>
where
    R: Fn(LinkEvent) -> F + Send + Sync + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    let (local, remote) = (stream.local_addr()?, stream.peer_addr()?);
    let options = stream.as_fd().try_clone_to_owned().ok();
    let (outbox, inbox) = mpsc::unbounded_channel();
    let (unsent, unread) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let longest = Arc::new(AtomicU16::new(wire::MAX_MESSAGE));
    let (living, alive) = watch::channel(());
    let (held, released) = oneshot::channel();
    let task = Task {
        inbox,
        released,
        unsent: Arc::clone(&unsent),
        unread: Arc::clone(&unread),
        longest: Arc::clone(&longest),
        send_hold,
        report,
    };
    tokio::spawn(async move {
        task.run(stream).await;
        drop(living);
    });
    Ok(Link { id, local, remote, outbox, unsent, unread, longest, alive, _held: held, options })
}

/// Sends a NOTIFICATION on a connection that no state machine wants, and closes it.
pub fn refuse(stream: TcpStream, notification: &Notification) {
    if let Ok(message) = notification.encode() {
        tokio::spawn(async move {
            let (reader, mut writer) = stream.into_split();
            if let Ok(Ok(())) = timeout(LINGER, writer.write_all(&message)).await {
                linger(reader, writer).await;
            }
        });
    }
}

/// The task's end of a connection.
struct Task<R> {
    inbox: mpsc::UnboundedReceiver<Bytes>,
    released: oneshot::Receiver<()>,
    unsent: Arc<AtomicU64>,
    unread: Arc<AtomicU64>,
    longest: Arc<AtomicU16>,
    send_hold: Duration,
    report: R,
}

/// How the writing ended.
enum Written {
    /// The actor let go, and everything is written.
    All,
    Failed(io::Error),
    Stuck,
}

impl<R, F> Task<R>
where
    R: Fn(LinkEvent) -> F,
    F: Future<Output = ()>,
{
    async fn run(mut self, stream: TcpStream) {
        let (mut reader, mut writer) = stream.into_split();
        let (unread, longest, report) = (&self.unread, &self.longest, &self.report);
        let writing = async {
            tokio::select! {
                written = write(&mut writer, &mut self.inbox, &self.unsent, self.send_hold) => written,
                // What is still queued when the actor lets go gets a last chance, but not eight minutes.
                _ = async { let _ = (&mut self.released).await; tokio::time::sleep(LAST_WORDS).await } => Written::Stuck,
            }
        };
        let written = tokio::select! {
            reason = read(&mut reader, unread, longest, report) => return report(LinkEvent::Closed(reason)).await,
            written = writing => written,
        };
        match written {
            Written::All => linger(reader, writer).await,
            Written::Failed(error) => report(LinkEvent::Closed(format!("connection lost: {error}"))).await,
            Written::Stuck => report(LinkEvent::Stuck).await,
        }
    }
}

/// Reads until the connection ends; the reason why it did.
async fn read<R, F>(reader: &mut OwnedReadHalf, unread: &AtomicU64, longest: &AtomicU16, report: &R) -> String
where
    R: Fn(LinkEvent) -> F,
    F: Future<Output = ()>,
{
    let mut buffer = BytesMut::with_capacity(READ_SIZE);
    loop {
        buffer.reserve(READ_SIZE);
        match reader.read_buf(&mut buffer).await {
            Ok(0) => return "the peer closed the connection".to_owned(),
            Ok(_) => {}
            Err(error) => return format!("connection lost: {error}"),
        }
        let (frames, error) = split(&mut buffer, longest.load(Ordering::Relaxed));
        if !frames.is_empty() {
            let bytes: usize = frames.iter().map(Bytes::len).sum();
            unread.fetch_add(bytes as u64, Ordering::Relaxed);
            report(LinkEvent::Frames(frames)).await;
        }
        if let Some(notification) = error {
            report(LinkEvent::BadHeader(notification)).await;
            // Nothing behind a bad header can be trusted; the actor closes the connection.
            std::future::pending::<()>().await;
        }
    }
}

/// Takes the complete messages off the front of `buffer`.
fn split(buffer: &mut BytesMut, longest: u16) -> (Vec<Bytes>, Option<Notification>) {
    let mut frames = Vec::new();
    loop {
        match wire::message_length(buffer, longest) {
            Ok(Some(length)) if buffer.len() >= length => frames.push(buffer.split_to(length).freeze()),
            Ok(_) => return (frames, None),
            Err(notification) => return (frames, Some(notification)),
        }
    }
}

/// Writes until the actor lets go of the link or the connection fails.
async fn write(
    writer: &mut OwnedWriteHalf,
    outbox: &mut mpsc::UnboundedReceiver<Bytes>,
    unsent: &AtomicU64,
    send_hold: Duration,
) -> Written {
    while let Some(message) = outbox.recv().await {
        match timeout(send_hold, writer.write_all(&message)).await {
            Ok(Ok(())) => unsent.fetch_sub(1, Ordering::Relaxed),
            Ok(Err(error)) => return Written::Failed(error),
            Err(_) => return Written::Stuck,
        };
    }
    Written::All
}

/// Closing with unread data would reset the connection and could take our last NOTIFICATION with it.
async fn linger(mut reader: OwnedReadHalf, mut writer: OwnedWriteHalf) {
    if writer.shutdown().await.is_err() {
        return;
    }
    let drain = async {
        let mut sink = vec![0; 4096];
        while reader.read(&mut sink).await.is_ok_and(|read| read > 0) {}
    };
    let _ = timeout(LINGER, drain).await;
}
