//! The sockets of the lab's DNS server (`edge-lab dns-server`), UDP and TCP.

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use anyhow::{Context, Result};
use hickory_proto::rr::Record;

use super::dns::{Transport, Zone, answer};

/// CoreDNS closes an idle connection after 10 s, and one that never asked after 3 s.
const IDLE: Duration = Duration::from_secs(10);
const FIRST_QUERY: Duration = Duration::from_secs(3);

/// Reads the zone file again when another has been put in its place.
struct ZoneFile {
    path: PathBuf,
    inode: u64,
    zone: Zone,
}

impl ZoneFile {
    fn current(&mut self) -> Zone {
        if let Ok(found) = fs::metadata(&self.path)
            && found.ino() != self.inode
            && let Ok(text) = fs::read_to_string(&self.path)
            && let Ok(zone) = serde_json::from_str(&text)
        {
            self.zone = zone;
            self.inode = found.ino();
        }
        self.zone.clone()
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

/// Serves `zone` on `listen` until the process is ended.
///
/// # Errors
/// Where the zone cannot be read or the address is taken.
pub fn serve(listen: SocketAddr, zone: &Path) -> Result<()> {
    let path = zone.to_owned();
    let mut file = ZoneFile { path, inode: 0, zone: Zone::default() };
    file.current();
    anyhow::ensure!(file.inode != 0, "{}: not a zone file", zone.display());
    let file = Arc::new(Mutex::new(file));
    let udp = UdpSocket::bind(listen).with_context(|| format!("listen on {listen}/udp"))?;
    let tcp = TcpListener::bind(listen).with_context(|| format!("listen on {listen}/tcp"))?;
    let streams = Arc::clone(&file);
    thread::spawn(move || {
        for stream in tcp.incoming().flatten() {
            let file = Arc::clone(&streams);
            thread::spawn(move || serve_stream(stream, &file));
        }
    });
    let mut buffer = [0_u8; 4096];
    let mut seed = u64::from(std::process::id()) << 32 | 0x9e37_79b9;
    loop {
        let (length, client) = udp.recv_from(&mut buffer).context("receive a query")?;
        let zone = file.lock().unwrap_or_else(PoisonError::into_inner).current();
        if let Some(reply) = answer(&zone, &buffer[..length], Transport::Udp, &mut |list| shuffle(&mut seed, list)) {
            // A client that has gone is its own affair.
            let _ = udp.send_to(&reply, client);
        }
    }
}

/// Answers the queries of one connection, in order, until it ends or idles.
fn serve_stream(mut stream: TcpStream, file: &Mutex<ZoneFile>) -> Option<()> {
    let mut seed = 0x2545_f491_4f6c_dd1d ^ u64::from(stream.peer_addr().ok()?.port());
    stream.set_read_timeout(Some(FIRST_QUERY)).ok()?;
    loop {
        let mut length = [0_u8; 2];
        stream.read_exact(&mut length).ok()?;
        let mut query = vec![0_u8; usize::from(u16::from_be_bytes(length))];
        stream.read_exact(&mut query).ok()?;
        stream.set_read_timeout(Some(IDLE)).ok()?;
        let zone = file.lock().unwrap_or_else(PoisonError::into_inner).current();
        if let Some(reply) = answer(&zone, &query, Transport::Tcp, &mut |list| shuffle(&mut seed, list)) {
            let length = u16::try_from(reply.len()).ok()?;
            stream.write_all(&[&length.to_be_bytes()[..], &reply].concat()).ok()?;
        }
    }
}
