//! A daemon with a thousand services of fifty backends each: from its start to all maps, from a change to the map, what it
//! holds in memory, what it costs at rest. Changes are orders over the API's socket and are seen in the pinned maps, so
//! that everything in between is part of the figure; the orders' file lies in memory, since a disk's time is not ours.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, SocketAddr},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use aya::maps::{Array, MapData};
use edge_common::maps::{ServiceEntry, backend_state, name};
use edge_ctl::{
    datapath::{
        object::EBPF_OBJECT,
        pins::{self, Pins},
        tables::Tables,
    },
    model::{BackendVerb, query::Query},
    reconcile::ports::DatapathState,
};

use super::{Figure, Namespace, TICKS, await_ready, service_manager};
use crate::{
    lab::{
        exec::{ip_batch, product},
        netns,
    },
    skip::full,
};

const SERVICES: usize = 1000;
const BACKENDS: usize = 50;
const EDGE: Ipv4Addr = Ipv4Addr::new(172, 16, 1, 88);
/// Port of the first service.
const FIRST_PORT: u16 = 10_000;
/// Longest that anything here may take.
const LONGEST: Duration = Duration::from_secs(60);
/// Changes in a row whose 99th percentile is one value of the figure.
const WINDOW: usize = 100;

/// The daemon, and what it needs; taken down when dropped.
struct Daemon {
    child: Child,
    folder: PathBuf,
    pins: PathBuf,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Whatever is left of it is named.
        let ended = self.child.kill().and_then(|()| self.child.wait().map(drop));
        for (what, result) in [
            ("end the daemon", ended),
            ("remove its folder", fs::remove_dir_all(&self.folder)),
            ("remove its pins", fs::remove_dir_all(&self.pins)),
        ] {
            if let Err(error) = result {
                eprintln!("{what}: {error}");
            }
        }
    }
}

/// Measures; about three minutes.
///
/// # Errors
/// Where the namespace cannot be made, or the daemon does not do as it should.
pub fn run() -> Result<Vec<Figure>> {
    ensure!(netns::effective_user_is_root(), "namespaces need root: run it with sudo");
    let namespace = Namespace::make("pools")?;
    prepare(&namespace.0)?;
    let folder = Path::new("/dev/shm").join(&namespace.0);
    let pin_folder = Path::new("/sys/fs/bpf").join(&namespace.0);
    let (mut starts, mut readies) = (Vec::new(), Vec::new());
    let mut daemon = None;
    for _ in 0..if full() { 5 } else { 3 } {
        // From nothing: no maps, no program.
        drop(daemon.take());
        fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
        fs::create_dir_all(&pin_folder).with_context(|| format!("make {}", pin_folder.display()))?;
        let (started, took, ready) = start(&namespace.0, &folder, &pin_folder)?;
        starts.push(took.as_nanos() as f64);
        readies.push(ready.as_nanos() as f64);
        daemon = Some(started);
    }
    let daemon = daemon.context("no start")?;
    let tables = Pins::new(&daemon.pins, EBPF_OBJECT)?;
    let state = Tables::open(&tables)?.state()?;
    let eligible = state.backends.values().filter(|slot| slot.eligible()).count();
    let whole = state.regions.values().filter(|region| region.pool.len() == BACKENDS).count();
    ensure!(
        state.index.len() == SERVICES && whole == SERVICES && eligible == SERVICES * BACKENDS,
        "the maps hold {} services, {whole} whole pools and {eligible} eligible backends",
        state.index.len()
    );
    let (excluded, changed) = changes(&folder, &tables, &state)?;
    drop(state);
    let (memory, with_maps, cpu) = at_rest(&daemon)?;
    let name = |what: &str| format!("pools/1000x50/{what}");
    Ok(vec![
        Figure::net(name("start-to-maps"), "ns", starts, 0.0),
        Figure::net(name("start-to-ready"), "ns", readies, 0.0),
        Figure::net(name("exclude-to-map-p99"), "ns", excluded, 0.0),
        Figure::net(name("change-to-map-p99"), "ns", changed, 0.0),
        Figure::net(name("rss"), "bytes", memory, 0.0),
        Figure::net(name("rss-with-flow-cache"), "bytes", with_maps, 0.0),
        Figure::net(name("idle-cpu"), "cpu", cpu, 0.0),
    ])
}

/// An interface towards the pods, and the host's settings.
fn prepare(namespace: &str) -> Result<()> {
    let lines = [
        "link set lo up",
        "link add ens33 type veth peer name pods",
        "link set ens33 up",
        "link set pods up",
        "addr add 172.16.1.88/24 dev ens33",
        "neigh add 172.16.1.80 lladdr 02:00:00:00:00:01 dev ens33 nud permanent",
        "route add 10.1.0.0/16 via 172.16.1.80",
    ];
    ip_batch(Some(namespace), &lines.map(str::to_owned))?;
    netns::within(namespace, || {
        let values = ["all", "default", "ens33"].iter().flat_map(|whose| {
            [("rp_filter", "2"), ("accept_local", "1")].map(|(key, value)| (format!("conf/{whose}/{key}"), value))
        });
        values.chain([("ip_forward".to_owned(), "1")]).try_for_each(|(key, value)| {
            let path = Path::new("/proc/sys/net/ipv4").join(key);
            fs::write(&path, value).with_context(|| format!("set {}", path.display()))
        })
    })
}

fn backend(service: usize, member: usize) -> SocketAddr {
    let number = service * BACKENDS + member;
    let (third, fourth) = ((number >> 8) as u8, number as u8);
    (Ipv4Addr::new(10, 1, third, fourth), 8080).into()
}

fn configuration(folder: &Path, pins: &Path) -> String {
    let mut text = format!(
        "[edge]\ninterfaces = [\"ens33\"]\nhook = \"tc\"\npod_networks = [\"10.1.0.0/16\"]\npin_path = \"{}\"\nsocket = \
         \"{}\"\nstate_dir = \"{}\"\ntables = {{ backends = 65536, selection = 65536 }}\n[api]\nhttp = \"\"\n",
        pins.display(),
        folder.join("edge.sock").display(),
        folder.display()
    );
    for service in 0..SERVICES {
        let pool: Vec<String> = (0..BACKENDS).map(|member| format!("\"{}\"", backend(service, member))).collect();
        let port = usize::from(FIRST_PORT) + service;
        text += &format!(
            "[service.s{service:04}]\nlisten = [\"{EDGE}:{port}/tcp\"]\nbackends = {{ static = [{}] }}\nmaglev_size = 4093\n",
            pool.join(", ")
        );
    }
    text
}

/// Starts the daemon; how long it took until all maps were written, which is so when the last frontend is in the index, and
/// until it said that it is ready, which takes the kernel's verification of the program too.
fn start(namespace: &str, folder: &Path, pins: &Path) -> Result<(Daemon, Duration, Duration)> {
    let file = folder.join("edge.toml");
    fs::write(&file, configuration(folder, pins)).context("write the configuration")?;
    let notify = folder.join("notify");
    let manager = service_manager(&notify)?;
    let log = fs::File::create(folder.join("log")).context("make the log")?;
    let mut command = Command::new(product("edge-ctl", "EDGE_CTL")?);
    command.arg("run").arg("-c").arg(&file).env("NOTIFY_SOCKET", &notify).stdin(Stdio::null());
    command.stdout(log.try_clone()?).stderr(log);
    netns::start_inside(&mut command, namespace, true)?;
    let begun = Instant::now();
    let child = command.spawn().context("start edge-ctl")?;
    let daemon = Daemon { child, folder: folder.to_owned(), pins: pins.to_owned() };
    // The pins are there before anything is in the maps.
    let written = loop {
        ensure!(begun.elapsed() < LONGEST, "the maps were not written in {LONGEST:?}");
        let tables = Pins::new(pins, EBPF_OBJECT).and_then(|pins| Tables::open(&pins));
        if tables.is_ok_and(|tables| tables.count(name::SERVICE_INDEX).is_ok_and(|found| found == SERVICES as u64)) {
            break begun.elapsed();
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    await_ready(&manager, &folder.join("log"))?;
    Ok((daemon, written, begun.elapsed()))
}

/// Takes backends out and in again, one here, one there: how long until the map says so, and until the service has
/// another table. Each value is the 99th percentile of a hundred changes.
fn changes(folder: &Path, tables: &Pins, state: &DatapathState) -> Result<(Vec<f64>, Vec<f64>)> {
    let states: Array<MapData, u32> = pins::open(tables, name::BACKEND_STATE)?;
    let services: Array<MapData, ServiceEntry> = pins::open(tables, name::SERVICES)?;
    let selection = |number: u32| -> Result<u32> { Ok(services.get(&number, 0)?.selection) };
    let mut connection = Connection::open(&folder.join("edge.sock"))?;
    let (mut excluded, mut changed) = (Vec::new(), Vec::new());
    let mut steps = (0..SERVICES).cycle().step_by(37);
    for _ in 0..if full() { 10 } else { 5 } {
        let (mut exclusions, mut tables) = (Vec::new(), Vec::new());
        for number in 0..WINDOW {
            let service = steps.next().context("no step")?;
            let member = backend(service, number % BACKENDS);
            let port = u16::try_from(service)? + FIRST_PORT;
            let of = |(_, slot): &(&u32, &edge_ctl::reconcile::ports::ServiceSlot)| slot.entry.port == port.to_be();
            let (of_service, _) = state.services.iter().find(of).context("no such service")?;
            let mut slots = state.backends.iter();
            let (of_backend, _) = slots
                .find(|(_, slot)| slot.entry.service == *of_service && slot.address() == member)
                .context("no such backend")?;
            for verb in [BackendVerb::Down, BackendVerb::Up] {
                let before = selection(*of_service)?;
                let begun = Instant::now();
                connection.send(&format!("s{service:04}"), member, verb)?;
                if verb == BackendVerb::Down {
                    let is_out = || Ok(states.get(of_backend, 0)? & backend_state::ELIGIBLE == 0);
                    exclusions.push(until(begun, "the backend to be excluded", is_out)?);
                }
                tables.push(until(begun, "another table", || Ok(selection(*of_service)? != before))?);
                connection.answered()?;
            }
        }
        for (all, window) in [(&mut excluded, exclusions), (&mut changed, tables)] {
            all.push(Figure::net(String::new(), "ns", window, 0.0).p99);
        }
    }
    Ok((excluded, changed))
}

/// Asks without pause until it is so; nanoseconds since `begun`.
fn until(begun: Instant, what: &str, is_so: impl Fn() -> Result<bool>) -> Result<f64> {
    while !is_so()? {
        ensure!(begun.elapsed() < LONGEST, "waited {LONGEST:?} for {what}");
        // Whoever wakes up on this CPU, the daemon above all, goes first: else it would wait for the end of our slice.
        std::thread::yield_now();
    }
    Ok(begun.elapsed().as_nanos() as f64)
}

/// A connection to the daemon's socket that is kept open, as a collector's or a controller's is.
pub(super) struct Connection {
    stream: BufReader<UnixStream>,
}

impl Connection {
    pub(super) fn open(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).with_context(|| format!("connect to {}", socket.display()))?;
        stream.set_read_timeout(Some(LONGEST))?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    pub(super) fn send(&mut self, service: &str, backend: SocketAddr, verb: BackendVerb) -> Result<()> {
        let (method, path) = Query::Order { service: service.to_owned(), backend, verb }.request();
        let request = format!("{method} {path} HTTP/1.1\r\nHost: edge\r\nContent-Length: 0\r\n\r\n");
        self.stream.get_mut().write_all(request.as_bytes()).context("send an order")
    }

    pub(super) fn answered(&mut self) -> Result<()> {
        let (mut line, mut length) = (String::new(), 0);
        self.stream.read_line(&mut line).context("read the answer")?;
        ensure!(line.starts_with("HTTP/1.1 200"), "the daemon refused: {line}");
        loop {
            line.clear();
            self.stream.read_line(&mut line).context("read the answer")?;
            match line.trim_end().split_once(':') {
                None if line.trim_end().is_empty() => break,
                Some((key, value)) if key.eq_ignore_ascii_case("content-length") => length = value.trim().parse()?,
                Some((key, _)) if key.eq_ignore_ascii_case("transfer-encoding") => bail!("an answer in pieces"),
                _ => {}
            }
        }
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body).context("read the answer's body")
    }
}

/// Memory in bytes, the process's own and with the flow cache, and CPU time as a share of one core, in windows that hold an
/// audit each.
fn at_rest(daemon: &Daemon) -> Result<(Vec<f64>, Vec<f64>, Vec<f64>)> {
    let (mut memory, mut with_maps, mut cpu) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..if full() { 6 } else { 3 } {
        let (used, begun) = (cpu_seconds(daemon.child.id())?, Instant::now());
        // The daemon audits every 30 s.
        std::thread::sleep(Duration::from_secs(31));
        cpu.push((cpu_seconds(daemon.child.id())? - used) / begun.elapsed().as_secs_f64());
        let (all, maps) = resident(daemon.child.id())?;
        memory.push(all - maps);
        with_maps.push(all);
    }
    Ok((memory, with_maps, cpu))
}

/// Resident memory in bytes: all of it, and what of it are maps of the kernel's that the process only looks into. The flow
/// cache is one: it is as large as `tables` says whether a daemon runs or not.
fn resident(pid: u32) -> Result<(f64, f64)> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps")).context("read the daemon's memory")?;
    let (mut all, mut maps, mut is_map) = (0.0, 0.0, false);
    for line in text.lines() {
        if let Some(size) = line.strip_prefix("Rss:") {
            let kilobytes: f64 = size.trim().trim_end_matches(" kB").parse().context("read a mapping's Rss")?;
            all += kilobytes * 1024.0;
            maps += if is_map { kilobytes * 1024.0 } else { 0.0 };
        } else if line.split_whitespace().next().is_some_and(|word| word.contains('-')) {
            is_map = line.ends_with("anon_inode:bpf-map");
        }
    }
    Ok((all, maps))
}

fn cpu_seconds(pid: u32) -> Result<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).context("read the daemon's times")?;
    super::ticks_of(&text).map(|ticks| ticks as f64 / TICKS).context("read the daemon's times")
}
