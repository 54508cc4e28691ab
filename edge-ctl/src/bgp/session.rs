//! One TCP connection: dialling, framing, writing. It decides nothing; the actor does.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpSocket, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{mpsc, watch},
    time::timeout,
};

use super::wire::{self, Notification};
use crate::config::valid::Peer;

/// How much is read before the actor gets a turn; about two thousand prefixes.
const READ_SIZE: usize = 64 * 1024;
/// A write that makes no progress for this long ends the session (RFC 9687's recommended minimum).
const SEND_HOLD: Duration = Duration::from_secs(480);
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
}

/// The actor's end of a connection. Dropping it closes the connection once everything queued is written.
#[derive(Debug)]
pub struct Link {
    /// Its identity.
    pub id: LinkId,
    /// Our address on it.
    pub local: IpAddr,
    outbox: mpsc::UnboundedSender<Bytes>,
    unsent: Arc<AtomicU64>,
    unread: Arc<AtomicU64>,
    alive: watch::Receiver<()>,
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
/// The socket, bind or connect error.
pub async fn dial(peer: &Peer, internal: bool) -> io::Result<TcpStream> {
    let remote = SocketAddr::new(peer.address, peer.port);
    let socket = Socket::new(Domain::for_address(remote), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    set_hop_limit(&socket, peer, internal)?;
    if let Some(local) = peer.local_address {
        socket.bind(&SocketAddr::new(local, 0).into())?;
    }
    let stream = TcpSocket::from_std_stream(socket.into()).connect(remote).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Prepares an accepted connection as [`dial`] prepares its own.
///
/// # Errors
/// The socket option's error.
pub fn prepare_accepted(stream: &TcpStream, peer: &Peer, internal: bool) -> io::Result<()> {
    set_hop_limit(&socket2::SockRef::from(stream), peer, internal)?;
    stream.set_nodelay(true)
}

/// External peers are neighbours on the wire unless `ebgp_multihop` says otherwise: a hop limit of one keeps it so.
fn set_hop_limit(socket: &Socket, peer: &Peer, internal: bool) -> io::Result<()> {
    if internal {
        return Ok(());
    }
    let hops = u32::from(peer.ebgp_multihop.max(1));
    match peer.address {
        IpAddr::V4(_) => socket.set_ttl_v4(hops),
        IpAddr::V6(_) => socket.set_unicast_hops_v6(hops),
    }
}

/// Starts the task of a connection. `report` delivers its events and waits while the actor is busy, which stops the
/// reading and so the peer: no update is ever dropped.
pub fn start<R, F>(id: LinkId, stream: TcpStream, local: IpAddr, report: R) -> Link
where
    R: Fn(LinkEvent) -> F + Send + Sync + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    let (outbox, inbox) = mpsc::unbounded_channel();
    let (unsent, unread) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let (living, alive) = watch::channel(());
    let task = run(stream, inbox, Arc::clone(&unsent), Arc::clone(&unread), report);
    tokio::spawn(async move {
        task.await;
        drop(living);
    });
    Link { id, local, outbox, unsent, unread, alive }
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

async fn run<R, F>(
    stream: TcpStream,
    mut outbox: mpsc::UnboundedReceiver<Bytes>,
    unsent: Arc<AtomicU64>,
    unread: Arc<AtomicU64>,
    report: R,
) where
    R: Fn(LinkEvent) -> F,
    F: Future<Output = ()>,
{
    let (mut reader, mut writer) = stream.into_split();
    let written = tokio::select! {
        reason = read(&mut reader, &unread, &report) => return report(LinkEvent::Closed(reason)).await,
        written = write(&mut writer, &mut outbox, &unsent) => written,
    };
    match written {
        Ok(()) => linger(reader, writer).await,
        Err(reason) => report(LinkEvent::Closed(reason)).await,
    }
}

/// Reads until the connection ends; the reason why it did.
async fn read<R, F>(reader: &mut OwnedReadHalf, unread: &AtomicU64, report: &R) -> String
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
        let (frames, error) = split(&mut buffer);
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
fn split(buffer: &mut BytesMut) -> (Vec<Bytes>, Option<Notification>) {
    let mut frames = Vec::new();
    loop {
        match wire::message_length(buffer) {
            Ok(Some(length)) if buffer.len() >= length => frames.push(buffer.split_to(length).freeze()),
            Ok(_) => return (frames, None),
            Err(notification) => return (frames, Some(notification)),
        }
    }
}

/// Writes until the actor lets go of the link (`Ok`) or the connection fails.
async fn write(
    writer: &mut OwnedWriteHalf,
    outbox: &mut mpsc::UnboundedReceiver<Bytes>,
    unsent: &AtomicU64,
) -> Result<(), String> {
    while let Some(message) = outbox.recv().await {
        match timeout(SEND_HOLD, writer.write_all(&message)).await {
            Ok(Ok(())) => unsent.fetch_sub(1, Ordering::Relaxed),
            Ok(Err(error)) => return Err(format!("connection lost: {error}")),
            Err(_) => return Err("send hold timer expired: the peer reads nothing (RFC 9687)".to_owned()),
        };
    }
    Ok(())
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
