//! The other side of the sessions: one that plays a full table, and many that play a node each.

use std::{
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream as AsyncStream},
};

use super::{PLAYER, PLAYER_ASN, SPEAKER};

const OPEN: u8 = 1;
pub(super) const UPDATE: u8 = 2;
const NOTIFICATION: u8 = 3;
const KEEPALIVE: u8 = 4;
/// Octets of a message header.
const HEADER: usize = 19;
/// The shortest hold time that there is (RFC 4271 4.2).
pub(super) const HOLD: u16 = 3;
/// How much of a table is written before a KEEPALIVE may come between.
const SLICE: usize = 64 * 1024;

pub(super) fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut message = vec![0xff; 16];
    message.extend(u16::try_from(HEADER + body.len()).unwrap_or(u16::MAX).to_be_bytes());
    message.push(kind);
    message.extend(body);
    message
}

/// Version 4, no capabilities.
fn open(hold: u16, router_id: Ipv4Addr) -> Vec<u8> {
    let mut open = vec![4];
    open.extend(PLAYER_ASN.to_be_bytes());
    open.extend(hold.to_be_bytes());
    open.extend(router_id.octets());
    open.push(0);
    message(OPEN, &open)
}

fn prefix_octets((address, length): (Ipv4Addr, u8)) -> Vec<u8> {
    let mut octets = vec![length];
    octets.extend(&address.octets()[..usize::from(length.div_ceil(8))]);
    octets
}

/// An UPDATE that announces prefixes with the attributes of set number `set`.
pub(super) fn announce(prefixes: &[(Ipv4Addr, u8)], next_hop: Ipv4Addr, set: u32) -> Vec<u8> {
    let mut attributes = vec![0x40, 1, 1, 0, 0x40, 2, 6, 2, 2];
    attributes.extend(PLAYER_ASN.to_be_bytes());
    attributes.extend((64514 + u16::try_from(set % 1000).unwrap_or(0)).to_be_bytes());
    attributes.extend([0x40, 3, 4]);
    attributes.extend(next_hop.octets());
    attributes.extend([0x80, 4, 4]);
    attributes.extend(set.to_be_bytes());
    let mut body = vec![0, 0];
    body.extend(u16::try_from(attributes.len()).unwrap_or(0).to_be_bytes());
    body.extend(&attributes);
    body.extend(prefixes.iter().copied().flat_map(prefix_octets));
    message(UPDATE, &body)
}

pub(super) fn withdraw(prefixes: &[(Ipv4Addr, u8)]) -> Vec<u8> {
    let octets: Vec<u8> = prefixes.iter().copied().flat_map(prefix_octets).collect();
    let mut body = u16::try_from(octets.len()).unwrap_or(0).to_be_bytes().to_vec();
    body.extend(octets);
    body.extend([0, 0]);
    message(UPDATE, &body)
}

/// UPDATEs for `routes` /24s from 20.0.0.0 on: five prefixes to a message, ten to a set of attributes.
pub(super) fn table(routes: u32) -> Vec<u8> {
    let mut all = Vec::new();
    let numbers: Vec<u32> = (0..routes).collect();
    for chunk in numbers.chunks(5) {
        let set = chunk.first().map_or(0, |first| first / 10);
        let prefixes: Vec<(Ipv4Addr, u8)> =
            chunk.iter().map(|number| (Ipv4Addr::from((20 << 24) + (number << 8)), 24)).collect();
        all.extend(announce(&prefixes, PLAYER, set));
    }
    all
}

/// What the player has seen of a speaker.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// UPDATEs that announce or withdraw something.
    pub updates: AtomicU64,
    /// Longest time without a message, microseconds.
    pub silence: AtomicU64,
    /// The session has ended.
    pub ended: AtomicBool,
}

/// The player's end of an established session, which it holds up.
pub(super) struct Session {
    writer: Arc<Mutex<TcpStream>>,
    pub seen: Arc<Seen>,
}

impl Drop for Session {
    fn drop(&mut self) {
        let writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        // It may be gone.
        let _ = writer.shutdown(std::net::Shutdown::Both);
    }
}

impl Session {
    /// Dials from [`PLAYER`] until the speaker takes the session.
    pub fn open(hold: u16, patience: Duration) -> Result<Self> {
        let end = Instant::now() + patience;
        loop {
            match Self::try_open(hold) {
                Ok(session) => return Ok(session),
                Err(error) if Instant::now() > end => return Err(error.context("the speaker takes no session")),
                Err(_) => thread::sleep(Duration::from_millis(50)),
            }
        }
    }

    fn try_open(hold: u16) -> Result<Self> {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
        socket.bind(&SocketAddr::new(IpAddr::V4(PLAYER), 0).into())?;
        socket.connect_timeout(&SocketAddr::new(IpAddr::V4(SPEAKER), 179).into(), Duration::from_secs(1))?;
        let mut stream = TcpStream::from(socket);
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(&open(hold, PLAYER))?;
        let (kind, _) = read(&mut stream)?;
        ensure!(kind == OPEN, "message {kind} instead of an OPEN");
        stream.write_all(&message(KEEPALIVE, &[]))?;
        let (kind, _) = read(&mut stream)?;
        ensure!(kind == KEEPALIVE, "message {kind} instead of a KEEPALIVE");
        stream.set_read_timeout(None)?;
        let (seen, writer) = (Arc::new(Seen::default()), Arc::new(Mutex::new(stream.try_clone()?)));
        let watched = Arc::clone(&seen);
        thread::spawn(move || watch(stream, &watched));
        if hold > 0 {
            let (weak, pause) = (Arc::downgrade(&writer), Duration::from_secs(u64::from(hold)) / 3);
            thread::spawn(move || {
                while let Some(writer) = weak.upgrade() {
                    let mut stream = writer.lock().unwrap_or_else(PoisonError::into_inner);
                    if stream.write_all(&message(KEEPALIVE, &[])).is_err() {
                        return;
                    }
                    drop(stream);
                    drop(writer);
                    thread::sleep(pause);
                }
            });
        }
        Ok(Self { writer, seen })
    }

    /// Writes messages, with room for KEEPALIVEs between slices.
    pub fn send(&self, messages: &[u8]) -> Result<()> {
        let mut rest = messages;
        while !rest.is_empty() {
            let mut length = 0;
            while length < SLICE.min(rest.len()) {
                let head = rest.get(length + 16..length + 18).context("a message without a length")?;
                length += usize::from(u16::from_be_bytes([head[0], head[1]]));
            }
            let (slice, more) = rest.split_at(length);
            self.writer.lock().unwrap_or_else(PoisonError::into_inner).write_all(slice)?;
            rest = more;
        }
        Ok(())
    }
}

/// Type and body of the next message.
fn read(stream: &mut impl Read) -> Result<(u8, Vec<u8>)> {
    let mut header = [0; HEADER];
    stream.read_exact(&mut header)?;
    let length = usize::from(u16::from_be_bytes([header[16], header[17]]));
    let mut body = vec![0; length.saturating_sub(HEADER)];
    stream.read_exact(&mut body)?;
    Ok((header[18], body))
}

fn watch(mut stream: TcpStream, seen: &Seen) {
    let mut last = Instant::now();
    while let Ok((kind, body)) = read(&mut stream) {
        let silence = u64::try_from(last.elapsed().as_micros()).unwrap_or(u64::MAX);
        seen.silence.fetch_max(silence, Ordering::Relaxed);
        last = Instant::now();
        match kind {
            // One that says nothing ends the initial table (RFC 4724, section 2).
            UPDATE if body.iter().any(|octet| *octet != 0) => drop(seen.updates.fetch_add(1, Ordering::Release)),
            NOTIFICATION => break,
            _ => {}
        }
    }
    seen.ended.store(true, Ordering::Relaxed);
}

/// Nodes with four routes each, which wait to be dialled.
#[derive(Debug, Default)]
pub(super) struct Nodes {
    /// Sessions established so far.
    pub established: AtomicU64,
    /// Sessions that ended.
    pub ended: AtomicU64,
    /// Each node withdraws a route and announces it again in turn, twenty times a second.
    pub busy: AtomicBool,
    /// UPDATEs sent while busy.
    pub updates: AtomicU64,
}

/// The routes of a node, by its address 10.0.X.Y.
fn routes(node: Ipv4Addr) -> [(Ipv4Addr, u8); 4] {
    let [_, _, third, fourth] = node.octets();
    let number = (u32::from(third) << 8 | u32::from(fourth)) * 4;
    [0, 1, 2, 3].map(|route| (Ipv4Addr::from((30 << 24) + ((number + route) << 8)), 24))
}

impl Nodes {
    /// Accepts sessions at every address of the calling thread's namespace until `nodes` is dropped elsewhere.
    pub fn serve(self: &Arc<Self>) -> Result<()> {
        let listener = std::net::TcpListener::bind((Ipv4Addr::UNSPECIFIED, 179)).context("listen as the nodes")?;
        listener.set_nonblocking(true)?;
        let nodes = Arc::downgrade(self);
        thread::spawn(move || -> Result<()> {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let listener = TcpListener::from_std(listener)?;
                loop {
                    let accepted = tokio::time::timeout(Duration::from_millis(200), listener.accept()).await;
                    let Some(nodes) = nodes.upgrade() else { return Ok(()) };
                    if let Ok(Ok((stream, _))) = accepted {
                        tokio::spawn(async move {
                            // An end is counted, whatever it was.
                            let _ = nodes.node(stream).await;
                            nodes.ended.fetch_add(1, Ordering::Relaxed);
                        });
                    }
                }
            })
        });
        Ok(())
    }

    async fn node(&self, mut stream: AsyncStream) -> Result<()> {
        stream.set_nodelay(true)?;
        let IpAddr::V4(own) = stream.local_addr()?.ip() else { return Ok(()) };
        stream.write_all(&open(HOLD * 30, own)).await?;
        let mut kind = read_one(&mut stream).await?;
        ensure!(kind == OPEN, "message {kind} instead of an OPEN");
        stream.write_all(&message(KEEPALIVE, &[])).await?;
        while kind != KEEPALIVE {
            kind = read_one(&mut stream).await?;
        }
        self.established.fetch_add(1, Ordering::Relaxed);
        let routes = routes(own);
        stream.write_all(&announce(&routes, own, 0)).await?;
        let (mut reader, mut writer) = stream.split();
        let reading = async { while read_one(&mut reader).await.is_ok_and(|kind| kind != NOTIFICATION) {} };
        let writing = async {
            // Not all at the same moment.
            tokio::time::sleep(Duration::from_millis(u64::from(own.octets()[3]) % 50)).await;
            let mut tick = tokio::time::interval(Duration::from_millis(50));
            for number in 0_u64.. {
                tick.tick().await;
                let sent = if self.busy.load(Ordering::Relaxed) {
                    self.updates.fetch_add(1, Ordering::Relaxed);
                    let one = &routes[..1];
                    let update = if number.is_multiple_of(2) { withdraw(one) } else { announce(one, own, 0) };
                    writer.write_all(&update).await
                } else if number.is_multiple_of(200) {
                    writer.write_all(&message(KEEPALIVE, &[])).await
                } else {
                    Ok(())
                };
                if sent.is_err() {
                    return;
                }
            }
        };
        tokio::select! {
            () = reading => {}
            () = writing => {}
        }
        Ok(())
    }
}

async fn read_one(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> Result<u8> {
    let mut header = [0; HEADER];
    stream.read_exact(&mut header).await?;
    let length = usize::from(u16::from_be_bytes([header[16], header[17]]));
    let mut body = vec![0; length.saturating_sub(HEADER)];
    stream.read_exact(&mut body).await?;
    Ok(header[18])
}
