//! A new program under traffic: the same maps, and maps of another layout, there and back.
#![allow(unsafe_code, reason = "setsockopt(2) has no safe wrapper among our dependencies")]

use std::{
    fs,
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd as _,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use edge_common::{
    flow::{TCP, UDP},
    maps::{mode, name},
};
use edge_ctl::{
    config::valid::{self, Edge, Tables},
    datapath::{loader::Datapath, object::EBPF_OBJECT, pins},
};
use edge_tests::{
    datapath::{
        OTHER_LAYOUT,
        live::{Host, Live},
        namespace::{Folder, in_namespace},
        rig::{HOOKS, Hook, Rig, Settings, VIP},
    },
    skip::count,
};

const PATIENCE: Duration = Duration::from_secs(10);
/// Time between two datagrams: 2,000 a second.
const PACE: Duration = Duration::from_micros(500);

fn vip() -> SocketAddr {
    SocketAddr::new(VIP.into(), 8443)
}

fn edge(folder: &Path, hook: Hook) -> Edge {
    Edge {
        interfaces: vec!["uplink".to_owned(), "pods".to_owned()],
        hook: if hook == Hook::Xdp { valid::Hook::XdpNative } else { valid::Hook::Tc },
        pod_networks: Vec::new(),
        pin_path: folder.join("bpf/edge"),
        socket: folder.join("edge.sock"),
        state_dir: folder.join("state"),
        seed_file: None,
        tables: Tables { established: 4096, half_open: 4096, closing: 4096, ..Tables::default() },
    }
}

/// The same program in another file.
fn newer() -> &'static [u8] {
    let mut bytes = EBPF_OBJECT.to_vec();
    bytes.extend([0; 8]);
    Box::leak(bytes.into_boxed_slice())
}

/// Opens and attaches as a starting daemon does; returns the links, which no swap may change.
fn start(edge: &Edge, object: &'static [u8]) -> Result<Datapath> {
    let mut datapath = Datapath::open(edge, object)?;
    let failed = datapath.attach_missing();
    ensure!(failed.is_empty(), "{failed:?}");
    Ok(datapath)
}

fn links(datapath: &Datapath) -> Vec<Option<u32>> {
    datapath.xdp_rows().into_iter().map(|row| row.link).collect()
}

/// Echoes datagrams and TCP bytes until the namespace ends.
fn serve(pod: &Host) -> Result<()> {
    pod.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:443")?;
        roomy(&socket)?;
        thread::spawn(move || -> std::io::Result<()> {
            let mut buffer = [0; 64];
            loop {
                let (n, from) = socket.recv_from(&mut buffer)?;
                socket.send_to(&buffer[..n], from)?;
            }
        });
        let listener = TcpListener::bind("0.0.0.0:443")?;
        thread::spawn(move || -> std::io::Result<()> {
            let (mut stream, _) = listener.accept()?;
            let mut buffer = [0; 64];
            loop {
                let n = stream.read(&mut buffer)?;
                // The client is through: reading on would take a core from the tests that follow.
                if n == 0 {
                    return Ok(());
                }
                stream.write_all(&buffer[..n])?;
            }
        });
        Ok(())
    })
}

/// Numbered datagrams at a steady pace, and what came back, in order.
struct Stream {
    stop: Arc<AtomicBool>,
    received: Arc<AtomicU64>,
    sender: thread::JoinHandle<Result<u64>>,
    receiver: thread::JoinHandle<Result<Vec<u64>>>,
}

impl Stream {
    fn start(client: &Host) -> Result<Self> {
        client.run(|| {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            roomy(&socket)?;
            socket.connect(vip())?;
            socket.set_read_timeout(Some(Duration::from_millis(100)))?;
            let (stop, received) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
            let total = Arc::new(AtomicU64::new(u64::MAX));
            let (from, counter, expected) = (socket.try_clone()?, Arc::clone(&received), Arc::clone(&total));
            let receiver = thread::spawn(move || {
                let (mut seen, mut buffer) = (Vec::new(), [0; 8]);
                let mut last = Instant::now();
                // A pause while the machine is busy with other things is no loss: only a count that stays short is.
                while expected.load(Ordering::Acquire) != seen.len() as u64 && last.elapsed() < 2 * PATIENCE {
                    match from.recv(&mut buffer) {
                        Ok(length) => {
                            ensure!(length == 8, "a datagram came back with {length} bytes");
                            seen.push(u64::from_be_bytes(buffer));
                            counter.fetch_add(1, Ordering::Relaxed);
                            last = Instant::now();
                        }
                        Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                        Err(error) => return Err(error).context("receive"),
                    }
                }
                Ok(seen)
            });
            let stopped = Arc::clone(&stop);
            let sender = thread::spawn(move || {
                let started = Instant::now();
                let mut number = 0_u64;
                while !stopped.load(Ordering::Relaxed) {
                    socket.send(&number.to_be_bytes())?;
                    number += 1;
                    let due = started + PACE * u32::try_from(number)?;
                    thread::sleep(due.saturating_duration_since(Instant::now()));
                }
                total.store(number, Ordering::Release);
                Ok(number)
            });
            Ok(Self { stop, received, sender, receiver })
        })
    }

    /// Waits for this many datagrams more.
    fn flows_on(&self, more: u64) -> Result<()> {
        let (until, deadline) = (self.received.load(Ordering::Relaxed) + more, Instant::now() + PATIENCE);
        while self.received.load(Ordering::Relaxed) < until {
            ensure!(Instant::now() < deadline, "no traffic any more");
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// How many were sent, and which came back.
    fn end(self) -> Result<(u64, Vec<u64>)> {
        self.stop.store(true, Ordering::Relaxed);
        let sent = self.sender.join().ok().context("the sender panicked")??;
        let received = self.receiver.join().ok().context("the receiver panicked")??;
        Ok((sent, received))
    }
}

/// Room for seconds of datagrams: a thread that the machine does not run in time must not look like a loss at the edge.
fn roomy(socket: &UdpSocket) -> Result<()> {
    let size: libc::c_int = 16 << 20;
    // SAFETY: an open socket, and an integer of the size given that outlives the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVBUFFORCE,
            (&raw const size).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    ensure!(result == 0, "SO_RCVBUFFORCE: {}", std::io::Error::last_os_error());
    Ok(())
}

fn ping(stream: &TcpStream, text: &[u8; 4]) -> Result<()> {
    let (mut stream, mut back) = (stream, [0; 4]);
    stream.write_all(text)?;
    stream.read_exact(&mut back)?;
    ensure!(back == *text, "other bytes came back");
    Ok(())
}

/// Runs `swaps` under traffic and checks that nothing was lost, changed places or was reset.
fn under_traffic(hook: Hook, swaps: impl Fn(&Edge, &dyn Fn() -> Result<()>) -> Result<()> + Send + Sync) -> Result<()> {
    // One at a time: the pace of one stream is what two cores keep.
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    in_namespace(|| {
        let folder = Folder::new()?;
        let edge = edge(&folder.0, hook);
        let datapath = Datapath::open(&edge, EBPF_OBJECT)?;
        let mut rig = Rig::over_pins(datapath.pins(), hook, Settings::default())?;
        rig.service(1, 8443, UDP, mode::FULL_NAT, 1, 443)?;
        rig.service(2, 8443, TCP, mode::FULL_NAT, 1, 443)?;
        let live = Live::without_program(hook, true)?;
        drop(datapath);
        let before = links(&start(&edge, EBPF_OBJECT)?);
        serve(&live.pod)?;
        let tcp = live.client.run(|| {
            let stream = TcpStream::connect_timeout(&vip(), PATIENCE)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            Ok(stream)
        })?;
        ping(&tcp, b"tcp0")?;
        let stream = Stream::start(&live.client)?;
        stream.flows_on(200)?;
        swaps(&edge, &|| {
            ping(&tcp, b"tcp1")?;
            stream.flows_on(200)
        })?;
        let (sent, received) = stream.end()?;
        ping(&tcp, b"tcp2")?;
        ensure!(received.is_sorted(), "datagrams changed places");
        let lost = sent - received.len() as u64;
        ensure!(lost == 0, "{lost} of {sent} datagrams lost on {hook:?}: {:?}", rig.reasons()?);
        let last = start(&edge, EBPF_OBJECT)?;
        ensure!(links(&last) == before, "links were made anew");
        Ok(())
    })
}

#[test]
fn a_program_is_swapped_again_and_again_under_traffic_and_no_datagram_is_lost_or_overtaken() -> Result<()> {
    let (newer, swaps) = (newer(), count("swaps of the program under traffic, a hook", 3, 20));
    for hook in HOOKS {
        under_traffic(hook, |edge, traffic| {
            for swap in 0..swaps {
                start(edge, if swap % 2 == 0 { newer } else { EBPF_OBJECT })?;
                traffic()?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn flows_live_through_a_change_of_layout_and_back_under_traffic() -> Result<()> {
    let times = count("changes of layout and back under traffic, a hook", 1, 2);
    for hook in HOOKS {
        under_traffic(hook, |edge, traffic| {
            for object in [OTHER_LAYOUT, EBPF_OBJECT].repeat(times) {
                let datapath = start(edge, object)?;
                ensure!(datapath.notes().is_empty(), "{:?}", datapath.notes());
                let maps = pins::files(&datapath.pins().maps())?;
                let tables = maps.iter().filter(|map| map.starts_with("ESTABLISHED-")).count();
                ensure!(tables == 1, "the old table is retired: {maps:?}");
                traffic()?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn a_daemon_that_dies_between_any_two_steps_of_a_migration_is_followed_by_one_that_finishes_it() -> Result<()> {
    under_traffic(Hook::Xdp, |edge, traffic| {
        // Dies while it fills the new maps: some are there, none has moved.
        let other = pins::Pins::new(&edge.pin_path, OTHER_LAYOUT)?;
        let half_made = aya::maps::Array::<_, u64>::create(1, 0)?;
        half_made.pin(other.incoming(name::ESTABLISHED))?;
        start(edge, EBPF_OBJECT)?;
        ensure!(pins::files(&other.arrivals())?.is_empty(), "what was half made is cleared");
        traffic()?;
        // Dies when some of the new maps have moved.
        drop(Datapath::open(edge, OTHER_LAYOUT)?);
        fs::remove_file(other.map(name::CLOSING))?;
        traffic()?;
        // Dies before the links are updated; rolled back before it was ever attached.
        drop(Datapath::open(edge, OTHER_LAYOUT)?);
        traffic()?;
        start(edge, EBPF_OBJECT)?;
        traffic()?;
        drop(Datapath::open(edge, OTHER_LAYOUT)?);
        // Dies after the links were updated: an interface that is missing keeps the old maps.
        let mut missing = edge.clone();
        missing.interfaces.push("absent".to_owned());
        let mut datapath = Datapath::open(&missing, OTHER_LAYOUT)?;
        ensure!(datapath.attach_missing().len() == 1, "only the absent interface fails");
        drop(datapath);
        traffic()?;
        let datapath = start(edge, OTHER_LAYOUT)?;
        let maps = pins::files(&datapath.pins().maps())?;
        ensure!(maps.iter().filter(|map| map.starts_with("ESTABLISHED-")).count() == 1, "{maps:?}");
        traffic()?;
        start(edge, EBPF_OBJECT)?;
        traffic()
    })
}
