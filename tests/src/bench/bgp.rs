//! A full table from one peer: how long the speaker takes to have it, and what it costs in memory, beside BIRD in the same
//! run. The table is played by this process over loopback: /24s, five to an UPDATE, ten prefixes to a set of attributes.

use std::{
    fs,
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use edge_ctl::{
    bgp::{self, BgpEvent},
    config,
};
use tokio::sync::mpsc;

use super::{Figure, Namespace};
use crate::lab::{exec::ip_batch, netns};

const SPEAKER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
const FEEDER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
const FEEDER_ASN: u16 = 64513;
/// How long a table may take to arrive.
const PATIENCE: Duration = Duration::from_secs(300);

/// Measures with a table of `routes` prefixes, at most 2^22.
///
/// # Errors
/// Where the namespace cannot be made, or a speaker does not take the table.
pub fn run(routes: u32) -> Result<Vec<Figure>> {
    ensure!(netns::effective_user_is_root(), "namespaces need root: run it with sudo");
    ensure!((10..1 << 22).contains(&routes), "--routes is from 10 to {}", (1 << 22) - 1);
    let namespace = Namespace::make("bgp")?;
    let addresses = [SPEAKER, FEEDER].map(|address| format!("addr add {address}/24 dev lo"));
    ip_batch(Some(&namespace.0), &[vec!["link set lo up".to_owned()], addresses.into()].concat())?;
    let table = updates(routes);
    let mut figures = Vec::new();
    let label = if routes == 1_000_000 { "1m".to_owned() } else { routes.to_string() };
    let mut add = |name: &str, (time, memory): (f64, f64)| {
        figures.push(Figure::net(format!("bgp/intake-{label}/{name}"), "s", vec![time], 0.0));
        figures.push(Figure::net(format!("bgp/rss-{label}/{name}"), "MB", vec![memory], 0.0));
    };
    add("edge", netns::within(&namespace.0, || edge(routes, &table))?);
    if Path::new("/usr/sbin/bird").exists() {
        add("bird", netns::within(&namespace.0, || bird(&namespace.0, routes, &table))?);
    } else {
        println!("SKIPPED bgp/*/bird: bird is not installed");
    }
    Ok(figures)
}

fn edge(routes: u32, table: &[u8]) -> Result<(f64, f64)> {
    let text = format!(
        "[edge]\ninterfaces = [\"lo\"]\npod_networks = [\"10.1.0.0/16\"]\n[bgp]\nasn = 64512\nrouter_id = \"{SPEAKER}\"\n\
         [[bgp.peer]]\naddress = \"{FEEDER}\"\nremote_asn = {FEEDER_ASN}\npassive = true\nimport = [\"0.0.0.0/0 le 32\"]\n\
         [service.web]\nlisten = [\"192.0.2.1:80/tcp\"]\nbackends = {{ static = [\"10.1.0.1:80\"] }}\n"
    );
    let config = config::parse(&text, Path::new("bench.toml"))?.bgp.context("there is a [bgp]")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let (sender, mut events) = mpsc::channel::<BgpEvent>(4);
        let handle = bgp::spawn(config, sender).await?;
        tokio::spawn(async move { while events.recv().await.is_some() {} });
        let before = resident(std::process::id())?;
        let session = Session::open()?;
        let start = Instant::now();
        let feeding = session.feed(table)?;
        while start.elapsed() < PATIENCE {
            let rows = handle.summary().await;
            if rows.first().is_some_and(|row| row.pfx_received == u64::from(routes)) {
                let time = start.elapsed().as_secs_f64();
                let memory = resident(std::process::id())? - before;
                drop(feeding);
                handle.shutdown().await;
                return Ok((time, memory));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        anyhow::bail!("the speaker did not take the table within {PATIENCE:?}")
    })
}

/// Ends the daemon with the measurement.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn bird(namespace: &str, routes: u32, table: &[u8]) -> Result<(f64, f64)> {
    let folder = std::env::temp_dir().join(namespace);
    fs::create_dir_all(&folder)?;
    let (file, socket) = (folder.join("bird.conf"), folder.join("bird.ctl"));
    fs::write(
        &file,
        format!(
            "router id {SPEAKER};\nprotocol device {{}}\nprotocol bgp feeder {{ local {SPEAKER} as 64512; \
             neighbor {FEEDER} as {FEEDER_ASN}; passive on; multihop 2; strict bind yes; ipv4 {{ import all; export none; }}; }}\n"
        ),
    )?;
    let mut command = Command::new("/usr/sbin/bird");
    command.arg("-f").arg("-c").arg(&file).arg("-s").arg(&socket).arg("-P").arg(folder.join("bird.pid"));
    let daemon = Daemon(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().context("start bird")?);
    let session = (0..100).find_map(|_| match Session::open() {
        Ok(session) => Some(session),
        Err(_) => {
            thread::sleep(Duration::from_millis(50));
            None
        }
    });
    let session = session.context("bird takes no session")?;
    let start = Instant::now();
    let feeding = session.feed(table)?;
    let wanted = format!("{routes} of {routes} routes");
    while start.elapsed() < PATIENCE {
        let output = Command::new("birdc").arg("-s").arg(&socket).args(["show", "route", "count"]).output()?;
        if String::from_utf8_lossy(&output.stdout).contains(&wanted) {
            let figures = (start.elapsed().as_secs_f64(), resident(daemon.0.id())?);
            drop(feeding);
            fs::remove_dir_all(&folder)?;
            return Ok(figures);
        }
        thread::sleep(Duration::from_millis(10));
    }
    anyhow::bail!("bird did not take the table within {PATIENCE:?}")
}

/// Megabytes that a process holds.
fn resident(pid: u32) -> Result<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kilobytes: f64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kilobytes / 1024.0)
}

/// The feeder's end of an established session.
struct Session(TcpStream);

impl Session {
    fn open() -> Result<Self> {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
        socket.bind(&SocketAddr::new(IpAddr::V4(FEEDER), 0).into())?;
        socket.connect(&SocketAddr::new(IpAddr::V4(SPEAKER), 179).into())?;
        let mut stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        // Version 4, hold time 0 (no keepalives), no capabilities.
        let mut open = vec![4];
        open.extend(FEEDER_ASN.to_be_bytes());
        open.extend([0, 0]);
        open.extend(FEEDER.octets());
        open.push(0);
        stream.write_all(&message(1, &open))?;
        stream.write_all(&message(4, &[]))?;
        // The speaker's OPEN and KEEPALIVE.
        for expected in [1, 4] {
            let mut header = [0; 19];
            stream.read_exact(&mut header)?;
            ensure!(header[18] == expected, "message {} instead of {expected}", header[18]);
            let mut body = vec![0; usize::from(u16::from_be_bytes([header[16], header[17]])) - header.len()];
            stream.read_exact(&mut body)?;
        }
        Ok(Self(stream))
    }

    /// Writes the table and reads what comes back, so that neither side waits for the other. The session ends with what
    /// is returned.
    fn feed(self, table: &[u8]) -> Result<TcpStream> {
        let mut reader = self.0.try_clone()?;
        thread::spawn(move || {
            let mut sink = [0; 4096];
            while reader.read(&mut sink).is_ok_and(|read| read > 0) {}
        });
        let mut stream = self.0;
        stream.write_all(table)?;
        Ok(stream)
    }
}

fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut message = vec![0xff; 16];
    message.extend(u16::try_from(19 + body.len()).unwrap_or(u16::MAX).to_be_bytes());
    message.push(kind);
    message.extend(body);
    message
}

/// UPDATEs for `routes` /24s from 20.0.0.0 on.
fn updates(routes: u32) -> Vec<u8> {
    let mut all = Vec::new();
    let numbers: Vec<u32> = (0..routes).collect();
    for chunk in numbers.chunks(5) {
        let set = chunk.first().map_or(0, |first| first / 10);
        let mut attributes = vec![0x40, 1, 1, 0, 0x40, 2, 6, 2, 2];
        attributes.extend(FEEDER_ASN.to_be_bytes());
        attributes.extend((64514 + u16::try_from(set % 1000).unwrap_or(0)).to_be_bytes());
        attributes.extend([0x40, 3, 4]);
        attributes.extend(FEEDER.octets());
        attributes.extend([0x80, 4, 4]);
        attributes.extend(set.to_be_bytes());
        let mut body = vec![0, 0];
        body.extend(u16::try_from(attributes.len()).unwrap_or(0).to_be_bytes());
        body.extend(&attributes);
        for number in chunk {
            let address = (20 << 24) + (number << 8);
            body.push(24);
            body.extend(&u32::to_be_bytes(address)[..3]);
        }
        all.extend(message(2, &body));
    }
    all
}
