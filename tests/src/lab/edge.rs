//! The daemon in the lab: its configuration, starting, stopping, killing and asking it.

use std::{
    fs,
    net::SocketAddr,
    os::unix::fs::chown,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::Value;

use super::{
    Lab, exec, netns,
    pods::{SERVICE_NAME, TCP_ECHO, UDP_ECHO},
    topology::{ASN, DEDICATED_VIP, DNS_PODS, EDGE, EDGE_INTERFACE, NODES, ROUTER, TOR_ASN},
    xdp_pass,
};

/// What clients connect to.
pub mod vip {
    /// HTTP, full-nat, to port 80.
    pub const HTTP: u16 = 8080;
    /// HTTPS, full-nat, to port 443.
    pub const HTTPS: u16 = 8443;
    /// HTTP, dnat, to port 80.
    pub const HTTP_DNAT: u16 = 8081;
    /// TCP line echo, full-nat, to port 9000.
    pub const ECHO: u16 = 9000;
    /// UDP echo, full-nat, to port 5353.
    pub const UDP: u16 = 5353;
}

/// A port of the VIP.
pub fn vip(port: u16) -> SocketAddr {
    (EDGE, port).into()
}

/// The capabilities `deploy/edge.service` gives the daemon, as setpriv spells them.
pub const UNIT_CAPABILITIES: [&str; 5] = ["bpf", "net_admin", "perfmon", "net_bind_service", "net_raw"];
const ORDINARY_USER: u32 = 65534;

/// A service on [`DEDICATED_VIP`], announced with these attributes while it has a backend.
pub fn dedicated_service(name: &str, port: u16, target: u16, mode: &str) -> String {
    format!(
        "\n[service.{name}]\nlisten = [\"{DEDICATED_VIP}:{port}/tcp\"]\nbackends = {{ dns = \"{SERVICE_NAME}\", \
         port = {target}, resolver = \"kube-dns\", record = \"a\" }}\nmode = \"{mode}\"\nannounce = {{ min_backends = 1, \
         communities = [\"64512:100\", \"64512:200\"], med = 10, local_pref = 200 }}\n"
    )
}

/// `configuration` with sessions whose routes go at once when they are lost, graceful restart or not.
pub fn without_graceful_restart(configuration: &str) -> String {
    let group = "[bgp.group.calico]\n";
    configuration.replace(group, &format!("{group}graceful_restart = false\n"))
}

/// The session to the router of [`Lab::start_tor`], which is told of dedicated VIPs and teaches nothing.
pub fn tor_peer() -> String {
    format!(
        "\n[[bgp.peer]]\naddress = \"{ROUTER}\"\nremote_asn = {TOR_ASN}\ndescription = \"tor\"\nimport = []\n\
         export = [\"198.51.100.0/24 le 32\"]\n"
    )
}

impl Lab {
    /// The configuration of the first seed, with folders of this lab. `valid` is how long a DNS answer counts.
    pub fn edge_configuration(&self, valid: &str) -> String {
        let servers = DNS_PODS.map(|address| format!("\"{address}\"")).join(", ");
        let peers: String = NODES
            .iter()
            .map(|node| {
                let (address, name) = (node.address(), node.name);
                format!("\n[[bgp.peer]]\naddress = \"{address}\"\ngroup = \"calico\"\ndescription = \"{name}\"\n")
            })
            .collect();
        let service = |name: &str, port: u16, protocol: &str, target: u16, mode: &str| {
            format!(
                "\n[service.{name}]\nlisten = [\"{EDGE}:{port}/{protocol}\"]\nbackends = {{ dns = \"{SERVICE_NAME}\", \
                 port = {target}, resolver = \"kube-dns\", record = \"a\" }}\nmode = \"{mode}\"\nbalance = \"maglev\"\n"
            )
        };
        let services = [
            service("ingress-http", vip::HTTP, "tcp", 80, "full-nat"),
            service("ingress-https", vip::HTTPS, "tcp", 443, "full-nat"),
            service("ingress-http-dnat", vip::HTTP_DNAT, "tcp", 80, "dnat"),
            service("echo", vip::ECHO, "tcp", TCP_ECHO, "full-nat"),
            service("echo-udp", vip::UDP, "udp", UDP_ECHO, "full-nat"),
        ]
        .concat();
        format!(
            r#"[edge]
interfaces = ["{EDGE_INTERFACE}"]
# veth would get TC by default.
hook = "xdp-native"
pod_networks = ["10.1.0.0/16"]
pin_path = "{pins}"
socket = "{socket}"
state_dir = "{state}"

[resolver.kube-dns]
servers = [{servers}]
valid = "{valid}"

[bgp]
asn = {ASN}
router_id = "{EDGE}"
listen_port = 179

[bgp.group.calico]
remote_asn = {ASN}
import = ["10.1.0.0/16 le 32"]
{peers}{services}"#,
            pins = self.pins().display(),
            socket = self.edge_socket().display(),
            state = self.folder().join("edge-state").display(),
        )
    }

    /// The API socket of the daemon in this lab.
    pub fn edge_socket(&self) -> PathBuf {
        self.folder().join("edge.sock")
    }

    /// Starts the daemon in the edge's namespace, as root. It is ready when [`EdgeDaemon::wait_ready`] says so.
    ///
    /// # Errors
    /// Where `edge-ctl` is not built, or bpffs is not mounted.
    pub fn start_edge(&self, configuration: &str) -> Result<EdgeDaemon> {
        self.start_edge_as(configuration, None, &UNIT_CAPABILITIES)
    }

    /// Starts the daemon as an ordinary user with exactly the capabilities of the unit.
    ///
    /// # Errors
    /// As [`Lab::start_edge`]; also without setpriv.
    pub fn start_edge_as_ordinary_user(&self, configuration: &str) -> Result<EdgeDaemon> {
        self.start_edge_with(configuration, &UNIT_CAPABILITIES)
    }

    /// Starts the daemon as an ordinary user with these capabilities.
    ///
    /// # Errors
    /// As [`Lab::start_edge_as_ordinary_user`].
    pub fn start_edge_with(&self, configuration: &str, capabilities: &[&str]) -> Result<EdgeDaemon> {
        self.start_edge_as(configuration, Some(ORDINARY_USER), capabilities)
    }

    fn start_edge_as(&self, configuration: &str, user: Option<u32>, capabilities: &[&str]) -> Result<EdgeDaemon> {
        let mounts = fs::read_to_string("/proc/mounts").context("read /proc/mounts")?;
        ensure!(
            mounts.lines().any(|line| line.split(' ').nth(1) == Some("/sys/fs/bpf")),
            "bpffs is not mounted: `cargo xtask setup` mounts it (mount -t bpf bpf /sys/fs/bpf)"
        );
        let file = self.folder().join("edge.toml");
        fs::write(&file, configuration).with_context(|| format!("write {}", file.display()))?;
        let state = self.folder().join("edge-state");
        for folder in [&state, &self.pins()] {
            fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
            chown(folder, user, user).with_context(|| format!("give {} to the daemon's user", folder.display()))?;
        }
        // The socket lies in the run folder, where the ordinary user may not write otherwise.
        chown(self.folder(), user, user).context("give the run folder to the daemon's user")?;
        let program = exec::product("edge-ctl", "EDGE_CTL")?;
        let mut daemon = EdgeDaemon {
            program,
            file,
            user,
            capabilities: capabilities.iter().map(|name| format!("+{name}")).collect::<Vec<_>>().join(","),
            namespace: self.namespace("edge"),
            socket: self.edge_socket(),
            log: self.log("edge", "edge-ctl"),
            child: None,
        };
        daemon.start(self)?;
        Ok(daemon)
    }

    /// Starts the daemon with the lab's own configuration and waits until it is ready.
    ///
    /// # Errors
    /// As [`Lab::start_edge`] and [`EdgeDaemon::wait_ready`].
    pub fn start_ready_edge(&self, valid: &str) -> Result<EdgeDaemon> {
        let mut daemon = self.start_edge(&self.edge_configuration(valid))?;
        daemon.wait_ready(self, NODES.len() as u64, Duration::from_secs(30))?;
        Ok(daemon)
    }

    /// Asks the daemon of this lab, from whichever process started it.
    ///
    /// # Errors
    /// Where `edge-ctl` is not built, fails, or does not print JSON.
    pub fn edge_ctl(&self, arguments: &[&str]) -> Result<Value> {
        let mut command = self.edge_ctl_command(arguments)?;
        command.args(["-o", "json"]);
        let output = command.stdin(Stdio::null()).output().context("run edge-ctl")?;
        // 3 is `status` of a degraded daemon, which still tells.
        if !matches!(output.status.code(), Some(0 | 3)) {
            let said = String::from_utf8_lossy(&output.stderr);
            bail!("`{}` failed ({}): {}", exec::show(&command), output.status, said.trim());
        }
        serde_json::from_slice(&output.stdout).with_context(|| {
            format!("`{}` printed no JSON: {}", exec::show(&command), String::from_utf8_lossy(&output.stdout))
        })
    }

    /// `edge-ctl` with these arguments in the edge's namespace, whatever it answers.
    ///
    /// # Errors
    /// Where it cannot be run.
    pub fn edge_ctl_raw(&self, arguments: &[&str]) -> Result<Output> {
        let mut command = self.command("edge", exec::product("edge-ctl", "EDGE_CTL")?)?;
        command.args(arguments).stdin(Stdio::null()).output().context("run edge-ctl")
    }

    /// The table a user would see.
    ///
    /// # Errors
    /// As [`Lab::edge_ctl`].
    pub fn edge_ctl_text(&self, arguments: &[&str]) -> Result<String> {
        exec::run(&mut self.edge_ctl_command(arguments)?)
    }

    fn edge_ctl_command(&self, arguments: &[&str]) -> Result<Command> {
        let mut command = self.command("edge", exec::product("edge-ctl", "EDGE_CTL")?)?;
        // The kernel takes seconds to verify the program, and on a busy machine many: no answer comes meanwhile.
        command.args(arguments).args(["--timeout", "60"]).arg("--socket").arg(self.edge_socket());
        Ok(command)
    }

    /// Attaches an XDP program that passes everything to the edge's interface, as another tool on the host would.
    ///
    /// # Errors
    /// Where the kernel refuses, or bpffs is not mounted.
    pub fn attach_foreign_xdp(&self) -> Result<()> {
        let pin = PathBuf::from(format!("{}-foreign", self.pins().display()));
        xdp_pass::attach(&self.namespace("edge"), EDGE_INTERFACE, &pin)
    }

    /// The kernel's IPv4 routes with protocol bgp on the edge, as `PREFIX via GATEWAY`, sorted.
    ///
    /// # Errors
    /// Where `ip` fails.
    pub fn bgp_routes(&self) -> Result<Vec<String>> {
        self.bgp_routes_of("-4")
    }

    /// As [`Lab::bgp_routes`], of IPv6.
    ///
    /// # Errors
    /// Where `ip` fails.
    pub fn bgp_routes_v6(&self) -> Result<Vec<String>> {
        self.bgp_routes_of("-6")
    }

    fn bgp_routes_of(&self, family: &str) -> Result<Vec<String>> {
        let edge = self.namespace("edge");
        let text = exec::run(Command::new("ip").args(["-n", &edge, family, "-j", "route", "show", "proto", "bgp"]))?;
        let routes: Value = serde_json::from_str(&text).context("read `ip -j route`")?;
        let line = |route: &Value| {
            let gateway = route["gateway"].as_str().map(|via| format!(" via {via}")).unwrap_or_default();
            format!("{}{gateway}", route["dst"].as_str().unwrap_or_default())
        };
        let mut lines: Vec<String> = routes.as_array().map(|list| list.iter().map(line).collect()).unwrap_or_default();
        lines.sort();
        Ok(lines)
    }
}

/// A daemon started in the lab. Dropping it ends it.
#[derive(Debug)]
pub struct EdgeDaemon {
    program: PathBuf,
    file: PathBuf,
    user: Option<u32>,
    /// Where it runs as an ordinary user, as setpriv spells them.
    capabilities: String,
    namespace: String,
    socket: PathBuf,
    log: PathBuf,
    child: Option<Child>,
}

impl EdgeDaemon {
    /// Starts it again with the same configuration file, after [`EdgeDaemon::kill`] or [`EdgeDaemon::stop`].
    ///
    /// # Errors
    /// Where it runs already or cannot be started.
    pub fn start(&mut self, lab: &Lab) -> Result<()> {
        ensure!(self.child.is_none(), "the daemon runs already");
        let mut command = match self.user {
            None => Command::new(&self.program),
            Some(user) => {
                let capabilities = &self.capabilities;
                let mut command = Command::new(exec::program("setpriv", "util-linux")?);
                command.arg(format!("--reuid={user}")).arg(format!("--regid={user}")).arg("--clear-groups");
                command.arg(format!("--inh-caps=-all,{capabilities}"));
                command.arg(format!("--bounding-set=-all,{capabilities}"));
                command.arg(format!("--ambient-caps=-all,{capabilities}")).arg("--no-new-privs");
                command.arg(&self.program);
                command
            }
        };
        command.arg("run").arg("-c").arg(&self.file);
        self.child = Some(lab.spawn("edge", "edge-ctl", &mut command)?);
        Ok(())
    }

    /// Waits until the daemon answers, its sessions to `peers` nodes are up and their routes in the kernel, its program
    /// is attached and each of the services has backends, all of them eligible.
    ///
    /// # Errors
    /// Where that takes longer than `limit`, or the daemon ends; the message holds the end of its log.
    pub fn wait_ready(&mut self, lab: &Lab, peers: u64, limit: Duration) -> Result<Duration> {
        let mut ended = None;
        let waited = exec::wait_for("the daemon to be ready", limit, || {
            ended = self.ended()?;
            if ended.is_some() {
                return Ok(true);
            }
            let status = one(lab.edge_ctl(&["status"])?)?;
            let number = |key: &str| status[key].as_u64().unwrap_or_default();
            let services = lab.edge_ctl(&["service", "list"])?;
            let served = services.as_array().is_some_and(|rows| {
                !rows.is_empty()
                    && rows.iter().all(|row| {
                        let share = row["backends"].as_str().and_then(|text| text.split_once('/'));
                        share.is_some_and(|(eligible, all)| eligible == all && all != "0")
                    })
            });
            ensure!(
                number("peers_established") >= peers && number("attached") > 0 && served,
                "status is {status}, services are {services}"
            );
            let routes = lab.bgp_routes()?;
            ensure!(routes.len() as u64 >= peers.min(NODES.len() as u64), "the kernel's routes are {routes:?}");
            Ok(true)
        });
        let waited = match ended {
            Some(status) => Err(anyhow!("the daemon ended: {status}")),
            None => waited,
        };
        waited.with_context(|| format!("{}:\n{}", self.log.display(), tail(&self.log)))
    }

    /// How it ended, if it did.
    ///
    /// # Errors
    /// Where the kernel does not tell.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.child.as_mut().map_or(Ok(None), |child| child.try_wait().context("ask for the daemon's state"))
    }

    /// Waits for it to end by itself, and tells how.
    ///
    /// # Errors
    /// Where it still runs after `limit`.
    pub fn wait_end(&mut self, limit: Duration) -> Result<ExitStatus> {
        let mut status = None;
        exec::wait_for("the daemon to end", limit, || {
            status = self.ended()?;
            Ok(status.is_some())
        })
        .with_context(|| self.log())?;
        self.child = None;
        status.context("it ended without a status")
    }

    /// Its process id while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Writes the configuration file anew; [`EdgeDaemon::reload`] makes the daemon read it.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn configure(&self, text: &str) -> Result<()> {
        fs::write(&self.file, text).with_context(|| format!("write {}", self.file.display()))
    }

    /// `edge-ctl reload`, whatever it answers.
    ///
    /// # Errors
    /// Where it cannot be run.
    pub fn reload(&self) -> Result<Output> {
        let mut command = Command::new(&self.program);
        netns::start_inside(&mut command, &self.namespace, false)?;
        command.arg("reload").arg("--socket").arg(&self.socket).stdin(Stdio::null());
        command.output().context("run edge-ctl reload")
    }

    /// SIGKILL.
    ///
    /// # Errors
    /// Where it does not end.
    pub fn kill(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill().context("kill the daemon")?;
            child.wait().context("wait for the daemon")?;
        }
        Ok(())
    }

    /// SIGTERM, and SIGKILL after 10 s.
    ///
    /// # Errors
    /// Where it does not end in time or not with 0.
    pub fn stop(&mut self) -> Result<()> {
        let Some(mut child) = self.child.take() else { return Ok(()) };
        netns::signal(child.id(), libc::SIGTERM)?;
        let mut status = None;
        let waited = exec::wait_for("the daemon to stop", Duration::from_secs(10), || {
            status = child.try_wait()?;
            Ok(status.is_some())
        });
        if waited.is_err() {
            child.kill().context("kill the daemon")?;
            child.wait().context("wait for the daemon")?;
        }
        waited?;
        let good = status.is_some_and(|status| status.success());
        ensure!(good, "the daemon ended with {status:?}:\n{}", tail(&self.log));
        Ok(())
    }

    /// Everything it has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for EdgeDaemon {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            eprintln!("{error:#}");
        }
    }
}

/// `status` prints an array of one object, as every view prints an array.
pub fn one(value: Value) -> Result<Value> {
    match value {
        Value::Array(mut rows) if rows.len() == 1 => Ok(rows.remove(0)),
        Value::Object(_) => Ok(value),
        other => bail!("expected one row: {other}"),
    }
}

fn tail(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(30)..].join("\n")
}
