//! The speakers that are measured: ours by itself and in the daemon, BIRD, FRR, GoBGP; each takes one session.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use edge_ctl::{
    bgp::{self, BgpEvent},
    config,
};
use tokio::sync::mpsc;

use super::{
    super::{await_ready, service_manager},
    PLAYER, PLAYER_ASN, SPEAKER, SPEAKER_ASN,
};
use crate::lab::{
    exec::{product, program},
    netns,
};

/// Who is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Edge,
    Bird,
    Frr,
    Gobgp,
}

impl Kind {
    pub const ALL: [Self; 4] = [Self::Edge, Self::Bird, Self::Frr, Self::Gobgp];

    /// As figures have it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Edge => "edge",
            Self::Bird => "bird",
            Self::Frr => "frr",
            Self::Gobgp => "gobgpd",
        }
    }

    /// Why it brings no routes into the kernel's table, if it does not.
    pub const fn cannot_fill_kernel(self) -> Option<&'static str> {
        match self {
            Self::Gobgp => Some("Debian's gobgpd ends with a panic in its client of Debian's zebra (FRR 8.4)"),
            Self::Edge | Self::Bird | Self::Frr => None,
        }
    }

    /// Why it cannot be measured here, if it cannot.
    pub fn missing(self) -> Option<String> {
        let (name, package) = match self {
            Self::Edge => return None,
            Self::Bird => ("bird", "bird2"),
            Self::Frr => ("bgpd", "frr"),
            Self::Gobgp => ("gobgpd", "gobgpd"),
        };
        program(name, package).err().map(|error| error.to_string())
    }
}

/// Daemons that end when dropped.
pub(super) struct Running {
    kind: Kind,
    /// The one that speaks BGP is the last.
    children: Vec<Child>,
    folder: PathBuf,
    namespace: String,
    pins: Option<PathBuf>,
    /// What our speaker has printed: sessions, prefixes.
    told: Arc<(AtomicU64, AtomicU64)>,
}

impl Drop for Running {
    fn drop(&mut self) {
        for child in self.children.iter_mut().rev() {
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = fs::remove_dir_all(&self.folder);
        if let Some(pins) = &self.pins {
            let _ = fs::remove_dir_all(pins);
        }
    }
}

impl Running {
    /// Prefixes that it has received; `None` while it does not answer.
    pub fn received(&self) -> Option<u64> {
        let first_number = |text: &str, before: &str| -> Option<u64> {
            let (_, rest) = text.split_once(before)?;
            rest.trim_start().split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
        };
        match self.kind {
            Kind::Edge => Some(self.told.1.load(Ordering::Relaxed)),
            Kind::Bird => {
                let socket = self.folder.join("bird.ctl");
                let text = output(Command::new("birdc").arg("-s").arg(socket).args(["show", "route", "count"]))?;
                let line = text.lines().find(|line| line.contains("routes for"))?;
                line.split_whitespace().next()?.parse().ok()
            }
            Kind::Frr => {
                let mut vtysh = Command::new("vtysh");
                vtysh.arg("--vty_socket").arg(&self.folder).args(["-d", "bgpd", "-c"]);
                first_number(&output(vtysh.arg("show bgp ipv4 unicast summary json"))?, "\"pfxRcd\":")
            }
            Kind::Gobgp => {
                let mut gobgp = Command::new("gobgp");
                netns::start_inside(&mut gobgp, &self.namespace, false).ok()?;
                first_number(&output(gobgp.args(["global", "rib", "summary"]))?, "Destination:")
            }
        }
    }

    /// Sessions that our speaker has established.
    pub fn sessions(&self) -> u64 {
        self.told.0.load(Ordering::Relaxed)
    }

    /// Bytes that the process that speaks BGP holds.
    pub fn resident(&self) -> Result<f64> {
        let pid = self.children.last().context("no process")?.id();
        let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        let kilobytes: f64 = line.trim().trim_end_matches(" kB").parse()?;
        Ok(kilobytes * 1024.0)
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub fn pins(&self) -> Result<&Path> {
        self.pins.as_deref().context("it has no maps")
    }
}

fn output(command: &mut Command) -> Option<String> {
    let output = command.stdin(Stdio::null()).output().ok()?;
    Some(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn spawn(namespace: &str, command: &mut Command, log: &Path) -> Result<Child> {
    netns::start_inside(command, namespace, true)?;
    let log = fs::File::create(log)?;
    command.stdin(Stdio::null()).stderr(log);
    command.spawn().with_context(|| format!("start {:?}", command.get_program()))
}

/// The part of our configuration that is about BGP, with more in `[bgp]` and more peers.
pub(super) fn bgp_section(player: &str, peers: &str) -> String {
    format!(
        "[bgp]\nasn = {SPEAKER_ASN}\nrouter_id = \"{SPEAKER}\"\n[[bgp.peer]]\naddress = \"{PLAYER}\"\nremote_asn = \
         {PLAYER_ASN}\npassive = true\nimport = [\"0.0.0.0/0 le 32\"]\nexport = [\"192.0.2.0/24 le 32\"]\n\
         graceful_restart = false\n{player}\n{peers}"
    )
}

/// Starts our speaker alone, in a process of its own.
pub(super) fn edge_alone(namespace: &str, bgp: &str) -> Result<Running> {
    let folder = fresh_folder(namespace)?;
    let file = folder.join("edge.toml");
    let rest = "[edge]\ninterfaces = [\"ens33\"]\npod_networks = [\"10.1.0.0/16\"]\n[service.web]\nlisten = \
                [\"192.0.2.1:80/tcp\"]\nbackends = { static = [\"10.1.0.1:80\"] }\n";
    fs::write(&file, format!("{rest}{bgp}"))?;
    let mut command = Command::new(std::env::current_exe().context("find the running executable")?);
    command.arg("bgp-speaker").arg(&file).stdout(Stdio::piped());
    let mut child = spawn(namespace, &mut command, &folder.join("log"))?;
    let told = Arc::new((AtomicU64::new(0), AtomicU64::new(0)));
    let stdout = child.stdout.take().context("no output")?;
    let heard = Arc::clone(&told);
    thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            let mut numbers = line.split(' ').filter_map(|number| number.parse().ok());
            if let (Some(sessions), Some(prefixes)) = (numbers.next(), numbers.next()) {
                heard.0.store(sessions, Ordering::Relaxed);
                heard.1.store(prefixes, Ordering::Relaxed);
            }
        }
    });
    Ok(Running { kind: Kind::Edge, children: vec![child], folder, namespace: namespace.to_owned(), pins: None, told })
}

/// What [`edge_alone`] starts: the speaker of a configuration file, until it is killed. Prints its established sessions
/// and the prefixes it has received whenever they change.
///
/// # Errors
/// The configuration cannot be read, or the port not be bound.
pub fn speak(file: &Path) -> Result<()> {
    let text = fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
    let config = config::parse(&text, file)?.bgp.context("there is a [bgp]")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let (sender, mut events) = mpsc::channel::<BgpEvent>(4);
        let handle = bgp::spawn(config, sender).await?;
        tokio::spawn(async move { while events.recv().await.is_some() {} });
        let mut before = (0, 0);
        loop {
            let rows = handle.summary().await;
            let sessions = rows.iter().filter(|row| row.state == "Established").count();
            let now = (sessions, rows.iter().map(|row| row.pfx_received).sum::<u64>());
            if now != before {
                println!("{} {}", now.0, now.1);
                before = now;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
}

/// Starts the whole daemon. `services` is the configuration's part about services.
pub(super) fn edge_daemon(namespace: &str, bgp: &str, services: &str) -> Result<Running> {
    let folder = fresh_folder(namespace)?;
    let pins = Path::new("/sys/fs/bpf").join(namespace);
    fs::create_dir_all(&pins).with_context(|| format!("make {}", pins.display()))?;
    let file = folder.join("edge.toml");
    let rest = format!(
        "[edge]\ninterfaces = [\"ens33\"]\nhook = \"tc\"\npod_networks = [\"10.1.0.0/16\"]\npin_path = \"{}\"\nsocket = \
         \"{}\"\nstate_dir = \"{}\"\n[api]\nhttp = \"\"\n",
        pins.display(),
        folder.join("edge.sock").display(),
        folder.display()
    );
    fs::write(&file, format!("{rest}{services}{bgp}"))?;
    let mut command = Command::new(product("edge-ctl", "EDGE_CTL")?);
    command.arg("run").arg("-c").arg(&file).stdout(fs::File::create(folder.join("out"))?);
    let notify = folder.join("notify");
    let manager = service_manager(&notify)?;
    let child = spawn(namespace, command.env("NOTIFY_SOCKET", &notify), &folder.join("log"))?;
    let (told, namespace) = (Arc::default(), namespace.to_owned());
    let running = Running { kind: Kind::Edge, children: vec![child], folder, namespace, pins: Some(pins), told };
    // The kernel verifies the program on every CPU before that, which is no time to measure in.
    await_ready(&manager, &running.folder.join("log"))?;
    Ok(running)
}

/// Starts somebody else's speaker, with the kernel's table to fill or without.
pub(super) fn other(kind: Kind, namespace: &str, fib: bool) -> Result<Running> {
    let folder = fresh_folder(namespace)?;
    let (told, namespace) = (Arc::default(), namespace.to_owned());
    let mut running = Running { kind, children: vec![], folder, namespace, pins: None, told };
    match kind {
        Kind::Edge => bail!("edge is not another"),
        Kind::Bird => bird(&mut running, fib)?,
        Kind::Frr => frr(&mut running, fib)?,
        Kind::Gobgp => gobgp(&mut running)?,
    }
    Ok(running)
}

fn start(running: &mut Running, command: &mut Command, log: &str) -> Result<()> {
    command.stdout(Stdio::null());
    let child = spawn(&running.namespace, command, &running.folder.join(log))?;
    running.children.push(child);
    Ok(())
}

fn bird(running: &mut Running, fib: bool) -> Result<()> {
    let folder = running.folder.clone();
    let kernel = if fib { "protocol kernel { ipv4 { import none; export all; }; }\n" } else { "" };
    let file = folder.join("bird.conf");
    fs::write(
        &file,
        format!(
            "router id {SPEAKER};\nprotocol device {{}}\n{kernel}protocol bgp player {{ local {SPEAKER} as {SPEAKER_ASN}; \
             neighbor {PLAYER} as {PLAYER_ASN}; passive on; ipv4 {{ import all; export none; }}; }}\n"
        ),
    )?;
    let mut command = Command::new(program("bird", "bird2")?);
    command.arg("-f").arg("-c").arg(&file).arg("-s").arg(folder.join("bird.ctl"));
    start(running, command.arg("-P").arg(folder.join("bird.pid")), "log")
}

/// FRR's daemons give up being root before they write into their folder.
fn frr(running: &mut Running, fib: bool) -> Result<()> {
    let folder = running.folder.clone();
    let owned = Command::new("chown").arg("frr:frr").arg(&folder).status()?;
    ensure!(owned.success(), "{} cannot be given to frr", folder.display());
    let body = format!(
        "router bgp {SPEAKER_ASN}\n bgp router-id {SPEAKER}\n no bgp ebgp-requires-policy\n neighbor {PLAYER} remote-as \
         {PLAYER_ASN}\n neighbor {PLAYER} passive\n neighbor {PLAYER} timers 0 0\nexit\n"
    );
    for (daemon, body) in [("zebra", ""), ("bgpd", &*body)] {
        if daemon == "zebra" && !fib {
            continue;
        }
        let file = folder.join(format!("{daemon}.conf"));
        fs::write(&file, format!("hostname bench\n{body}"))?;
        let mut command = Command::new(program(daemon, "frr")?);
        command.arg("-f").arg(&file).arg("-i").arg(folder.join(format!("{daemon}.pid")));
        command.arg("--vty_socket").arg(&folder).args(["-A", "127.0.0.1", "-P", "0"]);
        if fib {
            command.arg("-z").arg(folder.join("zserv.api"));
        } else {
            command.arg("-Z");
        }
        start(running, &mut command, &format!("{daemon}.log"))?;
        let end = Instant::now() + Duration::from_secs(10);
        while !folder.join(format!("{daemon}.vty")).exists() {
            ensure!(Instant::now() < end, "{daemon} does not start");
            thread::sleep(Duration::from_millis(50));
        }
    }
    Ok(())
}

/// GoBGP fills no table of the kernel's by itself ([`Kind::cannot_fill_kernel`]).
fn gobgp(running: &mut Running) -> Result<()> {
    let folder = running.folder.clone();
    let text = format!(
        "[global.config]\nas = {SPEAKER_ASN}\nrouter-id = \"{SPEAKER}\"\n[[neighbors]]\n[neighbors.config]\n\
         neighbor-address = \"{PLAYER}\"\npeer-as = {PLAYER_ASN}\n[neighbors.transport.config]\npassive-mode = true\n"
    );
    let file = folder.join("gobgpd.toml");
    fs::write(&file, text)?;
    let mut command = Command::new(program("gobgpd", "gobgpd")?);
    start(running, command.arg("-f").arg(&file).args(["--pprof-disable"]), "log")
}

fn fresh_folder(namespace: &str) -> Result<PathBuf> {
    let folder = std::env::temp_dir().join(namespace);
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    Ok(folder)
}
