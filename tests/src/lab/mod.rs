//! The network of the first seed out of network namespaces: hosts, nodes with real BGP speakers, kube-dns and
//! ingress pods. Each lab has a prefix of its own, so that several can run at once; nothing in the default namespace
//! is touched.
//!
//! `Lab::up` gives a lab that takes itself down when dropped; `Lab::keep` leaves it running for other processes, which
//! find it by [`Lab::current`].

pub mod client;
pub mod dns;
pub mod dns_faults;
pub mod dns_server;
pub mod echo;
pub mod edge;
pub mod exec;
pub mod ipv6;
pub mod netns;
pub mod pods;
mod queues;
pub mod rolling;
mod rows;
pub mod smoke;
pub mod speaker;
pub mod topology;
pub(crate) mod xdp_pass;

use std::{
    collections::BTreeSet,
    fs::{self, OpenOptions},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use exec::{ip_batch, run, wait_for};
use pods::in_parallel;
pub use speaker::Speaker;
use topology::{HOSTS, NODES};

/// Folder of all labs' run folders, unless `EDGE_LAB_RUN` names another. Labs in different folders do not know of
/// each other.
const RUN: &str = "/run/edge-lab";
/// Where bpffs is mounted.
const BPFFS: &str = "/sys/fs/bpf";

/// What another process needs to know about a lab; `lab.json` in its run folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Prefix of its namespaces, without the dash.
    pub prefix: String,
    /// The process that made it.
    pub owner: u32,
    /// True where it outlives its owner.
    pub kept: bool,
    /// What the nodes run.
    pub speaker: Speaker,
    /// Ingress pods that run, by number.
    pub pods: BTreeSet<usize>,
    /// Ingress pods in the service: 1 to this.
    pub replicas: usize,
    /// Nodes that are stopped.
    pub stopped: BTreeSet<String>,
}

/// A running lab.
#[derive(Debug)]
pub struct Lab {
    /// What is written to `lab.json`.
    pub state: State,
    take_down: bool,
    /// Servers this process started, to be waited for once they have ended.
    servers: Mutex<Vec<Child>>,
}

impl Lab {
    /// Builds the network, starts the servers and waits until they answer: BGP mesh, DNS, and `replicas` ingress pods.
    ///
    /// # Errors
    /// Where something is missing or does not come up; what was built is taken down again.
    pub fn up(speaker: Speaker, replicas: usize) -> Result<Self> {
        if !netns::effective_user_is_root() {
            bail!("the lab makes network namespaces, which needs root: run it with sudo");
        }
        netns::raise_file_limit();
        sweep();
        let prefix = free_prefix();
        let state = State {
            prefix,
            owner: std::process::id(),
            kept: false,
            speaker,
            pods: BTreeSet::new(),
            replicas: 0,
            stopped: BTreeSet::new(),
        };
        let mut lab = Self { state, take_down: true, servers: Mutex::default() };
        let built = lab.build(replicas);
        built
            .with_context(|| format!("build the lab {}; its servers said:\n{}", lab.state.prefix, lab.last_words()))?;
        Ok(lab)
    }

    fn build(&mut self, replicas: usize) -> Result<()> {
        fs::create_dir_all(self.folder()).with_context(|| format!("make {}", self.folder().display()))?;
        self.save()?;
        self.make_zone()?;
        self.make_certificate()?;
        self.make_hosts()?;
        let lab: &Self = self;
        let dns = [topology::kube_dns(0), topology::kube_dns(1)];
        in_parallel(&NODES, |node| lab.start_speaker(*node))?;
        in_parallel(&dns, |pod| {
            lab.attach_pod(pod)?;
            lab.start_dns(pod)
        })?;
        self.scale(replicas)?;
        self.wait_for_mesh()
    }

    fn make_hosts(&self) -> Result<()> {
        let names: Vec<String> = HOSTS.iter().chain([&"fabric"]).map(|host| self.namespace(host)).collect();
        in_parallel(&names, |name| run(Command::new("ip").args(["netns", "add", name])).map(|_| ()))?;
        let fabric = self.namespace("fabric");
        ip_batch(Some(&fabric), &topology::fabric_commands(&self.state.prefix))?;
        // XDP_TX out of the edge's interface needs a peer that takes frames, and is woken for them.
        let pin = Path::new(BPFFS).join(format!("edge-lab-{}-pass", self.state.prefix));
        xdp_pass::attach(&fabric, "p-edge", &pin)?;
        // The router's commands make client2's interface.
        let rest: Vec<&str> = HOSTS.into_iter().filter(|host| *host != "client2").collect();
        in_parallel(&rest, |host| self.make_host(host))?;
        self.make_host("client2")
    }

    fn make_host(&self, host: &str) -> Result<()> {
        let namespace = self.namespace(host);
        ip_batch(Some(&namespace), &topology::host_commands(&self.state.prefix, host))?;
        netns::within(&namespace, || {
            topology::sysctls(host).into_iter().try_for_each(|(key, value)| {
                let path = Path::new("/proc/sys/net/ipv4").join(key);
                fs::write(&path, value).with_context(|| format!("set {} in {host}", path.display()))
            })
        })?;
        // Sockets behind a veth send partial checksums and super-packets unless told otherwise, and the edge's
        // program sees them as they are.
        offload(&namespace, topology::interface(host), &["tx", "off"])
    }

    /// The lab that was left running, for commands in other processes.
    ///
    /// # Errors
    /// Where there is none.
    pub fn current() -> Result<Self> {
        let prefix = current_prefix().context("no lab is up: `cargo xtask lab up` makes one")?;
        let path = run_folder().join(&prefix).join("lab.json");
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        let state = serde_json::from_str(&text).with_context(|| format!("read {}", path.display()))?;
        Ok(Self { state, take_down: false, servers: Mutex::default() })
    }

    /// Refuses where a lab was left running.
    ///
    /// # Errors
    /// Names it.
    pub fn none_is_up() -> Result<()> {
        match current_prefix() {
            None => Ok(()),
            Some(prefix) => bail!("the lab {prefix} is up already; `cargo xtask lab down` takes it down"),
        }
    }

    /// Makes this the lab that other commands find, for as long as it is up.
    ///
    /// # Errors
    /// Where the file that names it cannot be written.
    pub fn publish(&self) -> Result<()> {
        let path = run_folder().join("current");
        fs::write(&path, &self.state.prefix).with_context(|| format!("write {}", path.display()))
    }

    /// Leaves the lab running when this value and this process are gone.
    ///
    /// # Errors
    /// Where that cannot be written down.
    pub fn keep(mut self) -> Result<()> {
        self.state.kept = true;
        self.save()?;
        self.publish()?;
        self.take_down = false;
        Ok(())
    }

    /// Ends every process of the lab and removes its namespaces, pins and run folder. May be called again.
    ///
    /// # Errors
    /// Where something could not be removed; everything else is removed all the same.
    pub fn down(&mut self) -> Result<()> {
        self.take_down = false;
        let result = tear_down(&self.state.prefix);
        for mut server in self.servers.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // Ended by tear_down; one that is not is in its error.
            let _ = server.try_wait();
        }
        result
    }

    /// Stops a node as a power cut does, but tells its peers: its BGP speaker is killed, its connections are closed
    /// by the kernel, then its link goes down.
    ///
    /// # Errors
    /// Where it is no node, or does not stop.
    pub fn stop_node(&mut self, name: &str) -> Result<()> {
        let node = topology::node(name).with_context(|| format!("{name} is not a node: kcontrol, knode1, knode2"))?;
        self.kill_speaker(node)?;
        ip_batch(Some(&self.namespace(name)), &["link set eth0 down".to_owned()])?;
        self.state.stopped.insert(name.to_owned());
        self.save()
    }

    /// Starts a stopped node again: link, routes, BGP speaker.
    ///
    /// # Errors
    /// Where it is no node, or does not start.
    pub fn start_node(&mut self, name: &str) -> Result<()> {
        let node = topology::node(name).with_context(|| format!("{name} is not a node: kcontrol, knode1, knode2"))?;
        self.kill_speaker(node)?;
        ip_batch(Some(&self.namespace(name)), &topology::node_link_commands())?;
        self.start_speaker(node)?;
        self.state.stopped.remove(name);
        self.save()
    }

    /// Ends a node's BGP speaker, its network and pods staying up.
    ///
    /// # Errors
    /// Where it is no node.
    pub fn kill_bgp(&self, name: &str) -> Result<()> {
        self.kill_speaker(topology::node(name).with_context(|| format!("{name} is not a node"))?)
    }

    /// Starts a node's BGP speaker again after [`Lab::kill_bgp`].
    ///
    /// # Errors
    /// Where it is no node, or the speaker does not start.
    pub fn start_bgp(&self, name: &str) -> Result<()> {
        self.start_speaker(topology::node(name).with_context(|| format!("{name} is not a node"))?)
    }

    /// The namespace of a host, node or pod.
    pub fn namespace(&self, host: &str) -> String {
        format!("{}-{host}", self.state.prefix)
    }

    /// Every namespace of this lab that exists.
    pub fn namespaces(&self) -> Vec<String> {
        namespaces(&self.state.prefix)
    }

    /// The run folder: configurations, logs, sockets.
    pub fn folder(&self) -> PathBuf {
        run_folder().join(&self.state.prefix)
    }

    /// Folder for the pins of a daemon in this lab.
    pub fn pins(&self) -> PathBuf {
        Path::new(BPFFS).join(format!("edge-lab-{}", self.state.prefix))
    }

    /// Runs `work` on a thread inside a host's namespace.
    ///
    /// # Errors
    /// As [`netns::within`].
    pub fn within<T: Send>(&self, host: &str, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        netns::within(&self.namespace(host), work)
    }

    /// A command that starts inside a host's namespace, at this terminal.
    ///
    /// # Errors
    /// Where there is no such host.
    pub fn command(&self, host: &str, program: impl AsRef<std::ffi::OsStr>) -> Result<Command> {
        let mut command = Command::new(program);
        netns::start_inside(&mut command, &self.namespace(host), false)?;
        Ok(command)
    }

    /// Starts a server inside a host that runs until the lab goes down.
    ///
    /// # Errors
    /// As [`Lab::spawn`].
    pub fn serve(&self, host: &str, name: &str, command: &mut Command) -> Result<()> {
        let child = self.spawn(host, name, command)?;
        self.servers.lock().unwrap_or_else(PoisonError::into_inner).push(child);
        Ok(())
    }

    /// Starts a server inside a host; what it prints goes to `HOST.NAME.log` in the run folder. It is ended with the
    /// lab, since it lives in one of its namespaces.
    ///
    /// # Errors
    /// Where it cannot be started.
    pub fn spawn(&self, host: &str, name: &str, command: &mut Command) -> Result<Child> {
        let path = self.log(host, name);
        let log = OpenOptions::new().create(true).append(true).open(&path);
        let log = log.with_context(|| format!("open {}", path.display()))?;
        netns::start_inside(command, &self.namespace(host), true)?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        command.spawn().with_context(|| format!("start {}", exec::show(command)))
    }

    /// Where a server's output goes.
    pub fn log(&self, host: &str, name: &str) -> PathBuf {
        self.folder().join(format!("{host}.{name}.log"))
    }

    /// The last lines of every server's log, for errors.
    fn last_words(&self) -> String {
        let Ok(entries) = fs::read_dir(self.folder()) else { return String::new() };
        let logs =
            entries.flatten().map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|e| e == "log"));
        let said = logs.filter_map(|path| {
            let text = fs::read_to_string(&path).ok()?;
            let lines: Vec<&str> = text.lines().collect();
            let last = lines[lines.len().saturating_sub(3)..].join("\n  ");
            (!last.is_empty()).then(|| format!("{}:\n  {last}\n", path.display()))
        });
        said.collect()
    }

    /// Ends all processes in these hosts.
    fn kill_in(&self, hosts: &[&str]) -> Result<()> {
        let names: Vec<String> = hosts.iter().map(|host| self.namespace(host)).collect();
        kill_all(&names)
    }

    fn save(&self) -> Result<()> {
        let path = self.folder().join("lab.json");
        let new = self.folder().join("lab.json.new");
        fs::write(&new, serde_json::to_string_pretty(&self.state)?)
            .with_context(|| format!("write {}", new.display()))?;
        fs::rename(&new, &path).with_context(|| format!("write {}", path.display()))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.take_down
            && let Err(error) = self.down()
        {
            eprintln!("lab {}: {error:#}", self.state.prefix);
        }
    }
}

fn run_folder() -> PathBuf {
    std::env::var_os("EDGE_LAB_RUN").map_or_else(|| PathBuf::from(RUN), PathBuf::from)
}

/// Switches offloads of an interface.
fn offload(namespace: &str, interface: &str, settings: &[&str]) -> Result<()> {
    let mut command = Command::new(exec::program("ethtool", "ethtool")?);
    command.args(["-K", interface]).args(settings);
    netns::start_inside(&mut command, namespace, false)?;
    run(&mut command).map(|_| ())
}

/// A prefix no namespace has: interface and namespace names stay short. The lab's folder is made here, so that tests that
/// begin at once have one each.
fn free_prefix() -> String {
    let pid = std::process::id();
    // Where that cannot be, building the lab says so.
    let claim = |prefix: &str| match fs::create_dir_all(run_folder())
        .and_then(|()| fs::create_dir(run_folder().join(prefix)))
    {
        Err(error) => error.kind() != std::io::ErrorKind::AlreadyExists,
        Ok(()) => true,
    };
    let candidates = (0..).map(|number| if number == 0 { format!("e{pid:x}") } else { format!("e{pid:x}n{number}") });
    let mut free = candidates.filter(|prefix| namespaces(prefix).is_empty() && claim(prefix));
    free.next().unwrap_or_default()
}

fn namespaces(prefix: &str) -> Vec<String> {
    let Ok(entries) = fs::read_dir("/run/netns") else { return Vec::new() };
    let start = format!("{prefix}-");
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names.filter(|name| name.starts_with(&start)).collect()
}

fn current_prefix() -> Option<String> {
    let prefix = fs::read_to_string(run_folder().join("current")).ok()?;
    run_folder().join(&prefix).join("lab.json").is_file().then_some(prefix)
}

/// Takes down labs whose process was killed before it could.
fn sweep() {
    let Ok(entries) = fs::read_dir(run_folder()) else { return };
    for entry in entries.flatten() {
        let Ok(text) = fs::read_to_string(entry.path().join("lab.json")) else { continue };
        let Ok(state) = serde_json::from_str::<State>(&text) else { continue };
        if !state.kept && !netns::running(state.owner) {
            eprintln!("lab {}: its process {} is gone, taking it down", state.prefix, state.owner);
            if let Err(error) = tear_down(&state.prefix) {
                eprintln!("lab {}: {error:#}", state.prefix);
            }
        }
    }
}

fn kill_all(names: &[String]) -> Result<()> {
    wait_for("the lab's processes to end", Duration::from_secs(10), || {
        let pids = netns::processes(names.iter().map(String::as_str));
        let left: Vec<u32> = pids.into_iter().filter(|pid| netns::running(*pid)).collect();
        left.iter().try_for_each(|pid| netns::signal(*pid, libc::SIGKILL))?;
        Ok(left.is_empty())
    })?;
    Ok(())
}

fn tear_down(prefix: &str) -> Result<()> {
    let names = namespaces(prefix);
    let mut first = kill_all(&names);
    let mut note = |result: Result<()>| {
        if first.is_ok() {
            first = result;
        }
    };
    note(in_parallel(&names, |name| run(Command::new("ip").args(["netns", "del", name])).map(|_| ())));
    note(remove_folder(&Path::new(BPFFS).join(format!("edge-lab-{prefix}"))));
    if current_prefix().is_some_and(|current| current == prefix) {
        note(fs::remove_file(run_folder().join("current")).context("remove the name of the current lab"));
    }
    note(remove_folder(&run_folder().join(prefix)));
    first
}

fn remove_folder(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}
