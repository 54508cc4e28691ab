//! The sockets of the lab's DNS server (`edge-lab dns-server`), UDP and TCP.

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use anyhow::{Context, Result};
use hickory_proto::rr::Record;

use super::{
    dns::{Transport, Zone, answer},
    dns_faults::{Sends, spoil},
};

/// CoreDNS closes an idle connection after 10 s, and one that never asked after 3 s.
const IDLE: Duration = Duration::from_secs(10);
const FIRST_QUERY: Duration = Duration::from_secs(3);

/// The zone file, read anew for every query: it is small, and neither inode nor time tells two quick changes apart.
struct ZoneFile {
    path: PathBuf,
    last: Zone,
}

impl ZoneFile {
    fn open(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        let last = serde_json::from_str(&text).with_context(|| format!("{}: not a zone file", path.display()))?;
        Ok(Self { path: path.to_owned(), last })
    }

    /// What the file says now; what it said before, should it be unreadable.
    fn current(&mut self) -> Zone {
        let read = fs::read_to_string(&self.path).ok().and_then(|text| serde_json::from_str(&text).ok());
        if let Some(zone) = read {
            self.last = zone;
        }
        self.last.clone()
    }
}

/// A shuffle good enough to mix addresses: xorshift from a seed.
fn shuffle(seed: &mut u64, records: &mut [Record]) {
    for last in (1..records.len()).rev() {
        *seed ^= *seed << 13;
        *seed ^= *seed >> 7;
        *seed ^= *seed << 17;
        let other = usize::try_from(*seed % (last as u64 + 1)).unwrap_or(0);
        records.swap(last, other);
    }
}

/// What is sent for a query, with the fault of the server at this address, and when.
fn replies(
    zone: &Zone,
    listen: SocketAddr,
    query: &[u8],
    transport: Transport,
    shuffle: &mut dyn FnMut(&mut [Record]),
) -> Sends {
    let fault = zone.faults.get(&listen.ip().to_string()).or_else(|| zone.faults.get("*"));
    match (answer(zone, query, transport, shuffle), fault) {
        (None, _) => Vec::new(),
        (Some(answer), None) => vec![(Duration::ZERO, answer)],
        (Some(answer), Some(fault)) => spoil(fault, query, answer, transport),
    }
}

/// Serves `zone` on `listen` until the process is ended.
///
/// # Errors
/// Where the zone cannot be read or the address is taken.
pub fn serve(listen: SocketAddr, zone: &Path) -> Result<()> {
    let file = Arc::new(Mutex::new(ZoneFile::open(zone)?));
    let udp = UdpSocket::bind(listen).with_context(|| format!("listen on {listen}/udp"))?;
    let tcp = TcpListener::bind(listen).with_context(|| format!("listen on {listen}/tcp"))?;
    let streams = Arc::clone(&file);
    thread::spawn(move || {
        for stream in tcp.incoming().flatten() {
            let file = Arc::clone(&streams);
            thread::spawn(move || serve_stream(stream, listen, &file));
        }
    });
    let udp = Arc::new(udp);
    let mut buffer = [0_u8; 4096];
    let mut seed = u64::from(std::process::id()) << 32 | 0x9e37_79b9;
    loop {
        let (length, client) = udp.recv_from(&mut buffer).context("receive a query")?;
        let zone = file.lock().unwrap_or_else(PoisonError::into_inner).current();
        let mut mix = |list: &mut [Record]| shuffle(&mut seed, list);
        for (wait, reply) in replies(&zone, listen, &buffer[..length], Transport::Udp, &mut mix) {
            // A client that has gone is its own affair.
            if wait.is_zero() {
                let _ = udp.send_to(&reply, client);
                continue;
            }
            let udp = Arc::clone(&udp);
            thread::spawn(move || {
                thread::sleep(wait);
                let _ = udp.send_to(&reply, client);
            });
        }
    }
}

/// Answers the queries of one connection, in order, until it ends or idles.
fn serve_stream(mut stream: TcpStream, listen: SocketAddr, file: &Mutex<ZoneFile>) -> Option<()> {
    let mut seed = 0x2545_f491_4f6c_dd1d ^ u64::from(stream.peer_addr().ok()?.port());
    stream.set_read_timeout(Some(FIRST_QUERY)).ok()?;
    loop {
        let mut length = [0_u8; 2];
        stream.read_exact(&mut length).ok()?;
        let mut query = vec![0_u8; usize::from(u16::from_be_bytes(length))];
        stream.read_exact(&mut query).ok()?;
        stream.set_read_timeout(Some(IDLE)).ok()?;
        let zone = file.lock().unwrap_or_else(PoisonError::into_inner).current();
        let mut mix = |list: &mut [Record]| shuffle(&mut seed, list);
        let sends = replies(&zone, listen, &query, Transport::Tcp, &mut mix);
        if sends.is_empty() && !zone.faults.is_empty() {
            return None;
        }
        for (wait, reply) in sends {
            thread::sleep(wait);
            let length = u16::try_from(reply.len()).ok()?;
            stream.write_all(&[&length.to_be_bytes()[..], &reply].concat()).ok()?;
        }
    }
}
