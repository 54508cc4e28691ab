//! The BGP speakers of the nodes: BIRD configured as Calico configures it, or FRR in its place.

use std::{fmt::Write as _, fs, path::PathBuf, process::Command, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::{
    Lab,
    exec::{self, run, wait_for},
    netns,
    topology::{ASN, EDGE, NODES, Node, ROUTER, TOR_ASN},
};

/// Which program the nodes run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Speaker {
    /// BIRD 2, as Calico.
    #[default]
    Bird,
    /// FRR's bgpd and zebra.
    Frr,
}

/// BIRD's configuration as confd writes it in a calico/node container, in BIRD 2 syntax; only the retry and error
/// delays are shorter.
fn bird_configuration(node: Node) -> String {
    let block = node.block();
    let mut text = format!(
        r#"router id {address};
log stderr all;

protocol device {{ scan time 2; }}
protocol direct {{ ipv4; interface -"cali*", -"kube-ipvs*", "*"; }}

# The block of this node. Aggregated: /32 routes of its pods are not exported.
protocol static calico_block {{
  ipv4;
  route {block} blackhole;
}}
filter calico_export_to_bgp_peers {{
  if ( net = {block} ) then accept;
  if ( net ~ {block} ) then reject;
  reject;
}}
filter calico_kernel_programming {{
  if ( net = {block} ) then accept;
  if ( net ~ 10.1.0.0/16 ) then accept;
  reject;
}}
protocol kernel {{
  learn;
  persist;
  scan time 2;
  merge paths on;
  graceful restart;
  ipv4 {{ import all; export filter calico_kernel_programming; }};
}}

template bgp bgp_template {{
  description "Connection to BGP peer";
  local {address} as {ASN};
  multihop;
  graceful restart;
  connect delay time 1;
  connect retry time 2;
  error wait time 1, 5;
  ipv4 {{
    import all;
    export filter calico_export_to_bgp_peers;
    gateway recursive;
    add paths on;
  }};
}}
"#,
        address = node.address(),
    );
    for peer in NODES.iter().filter(|peer| **peer != node) {
        // Calico lets the lower address connect.
        let passive = if peer.address() > node.address() { "" } else { " passive on;" };
        let _ = writeln!(
            text,
            "protocol bgp Mesh_{} from bgp_template {{ neighbor {} as {ASN};{passive} }}",
            peer.address().to_string().replace('.', "_"),
            peer.address(),
        );
    }
    let _ = writeln!(
        text,
        "protocol bgp Node_{} from bgp_template {{ neighbor {EDGE} as {ASN}; }}",
        EDGE.to_string().replace('.', "_"),
    );
    text
}

fn frr_configuration(node: Node) -> String {
    let mut text = format!(
        "hostname {name}\nlog stdout\nrouter bgp {ASN}\n bgp router-id {address}\n no bgp network import-check\n \
         timers bgp connect 2\n",
        name = node.name,
        address = node.address(),
    );
    let peers = NODES.iter().filter(|peer| **peer != node).map(|peer| peer.address()).chain([EDGE]);
    for peer in peers {
        let _ = writeln!(text, " neighbor {peer} remote-as {ASN}\n neighbor {peer} timers connect 2");
    }
    let _ = writeln!(text, " address-family ipv4 unicast\n  network {}\n exit-address-family", node.block());
    text
}

/// A top-of-rack router: another AS, everything accepted, what it learns goes into its kernel.
fn tor_configuration() -> String {
    format!(
        "hostname tor\nlog stdout\nrouter bgp {TOR_ASN}\n bgp router-id {ROUTER}\n no bgp ebgp-requires-policy\n \
         neighbor {EDGE} remote-as {ASN}\n neighbor {EDGE} timers connect 1\n"
    )
}

impl Lab {
    fn speaker_file(&self, node: Node, suffix: &str) -> PathBuf {
        self.folder().join(format!("{}.{suffix}", node.name))
    }

    /// Starts the node's BGP speaker and waits until it answers its own client.
    pub(super) fn start_speaker(&self, node: Node) -> Result<()> {
        match self.state.speaker {
            Speaker::Bird => self.start_bird(node),
            Speaker::Frr => self.start_frr(node.name, &frr_configuration(node)),
        }
    }

    fn start_bird(&self, node: Node) -> Result<()> {
        let configuration = self.speaker_file(node, "bird.conf");
        fs::write(&configuration, bird_configuration(node)).context("write BIRD's configuration")?;
        let mut command = Command::new(exec::program("bird", "bird2")?);
        command.arg("-f").arg("-c").arg(&configuration);
        command.arg("-s").arg(self.speaker_file(node, "bird.ctl"));
        command.arg("-P").arg(self.speaker_file(node, "bird.pid"));
        self.serve(node.name, "bird", &mut command)?;
        wait_for(&format!("BIRD on {}", node.name), Duration::from_secs(5), || {
            self.birdc(node.name, &["show", "status"]).map(|_| true)
        })?;
        Ok(())
    }

    /// Starts FRR on the router as a top-of-rack router, whatever the nodes run. [`Lab::vtysh`] asks it as `router`.
    ///
    /// # Errors
    /// Where FRR does not start.
    pub fn start_tor(&self) -> Result<()> {
        self.start_frr("router", &tor_configuration())
    }

    fn start_frr(&self, host: &str, text: &str) -> Result<()> {
        let folder = self.folder().join(format!("{host}.frr"));
        fs::create_dir_all(&folder).context("make FRR's folder")?;
        let configuration = folder.join("bgpd.conf");
        fs::write(&configuration, text).context("write FRR's configuration")?;
        let empty = folder.join("zebra.conf");
        fs::write(&empty, format!("hostname {host}\n")).context("write zebra's configuration")?;
        let zserv = folder.join("zserv.api");
        // FRR insists on a user of its own, who must be able to make sockets in the folder.
        run(Command::new("chown").args(["-R", "frr:frr"]).arg(&folder))?;
        for (daemon, file) in [("zebra", &empty), ("bgpd", &configuration)] {
            let mut command = Command::new(exec::program(daemon, "frr")?);
            command.args(["-u", "frr", "-g", "frr", "--log", "stdout", "-P", "0"]);
            command.arg("-f").arg(file).arg("-z").arg(&zserv);
            command.arg("-i").arg(folder.join(format!("{daemon}.pid"))).arg("--vty_socket").arg(&folder);
            self.serve(host, daemon, &mut command)?;
            wait_for(&format!("{daemon} on {host}"), Duration::from_secs(10), || {
                Ok(folder.join(format!("{daemon}.vty")).exists())
            })?;
        }
        Ok(())
    }

    /// Ends the node's BGP speaker without a NOTIFICATION, as a power cut of the container would; the kernel still
    /// closes its connections.
    pub(super) fn kill_speaker(&self, node: Node) -> Result<()> {
        let files = match self.state.speaker {
            Speaker::Bird => vec![self.speaker_file(node, "bird.pid")],
            Speaker::Frr => {
                let folder = self.folder().join(format!("{}.frr", node.name));
                vec![folder.join("bgpd.pid"), folder.join("zebra.pid")]
            }
        };
        for file in files {
            let Ok(text) = fs::read_to_string(&file) else { continue };
            let pid: u32 = text.trim().parse().with_context(|| format!("{}: not a process id", file.display()))?;
            netns::signal(pid, libc::SIGKILL)?;
            fs::remove_file(&file).with_context(|| format!("remove {}", file.display()))?;
            wait_for(&format!("process {pid} to end"), Duration::from_secs(5), || Ok(!netns::running(pid)))?;
        }
        Ok(())
    }

    /// Has a node's BIRD watch the edge by BFD, 3 x 50 ms; its session begins anew.
    ///
    /// # Errors
    /// Where it does not take the configuration.
    pub fn watch_by_bfd(&self, name: &str) -> Result<()> {
        let node = super::topology::node(name).with_context(|| format!("{name} is not a node"))?;
        let file = self.speaker_file(node, "bird.conf");
        let text = fs::read_to_string(&file).context("read BIRD's configuration")?;
        let neighbor = format!("neighbor {EDGE} as {ASN};");
        ensure!(text.contains(&neighbor), "BIRD's configuration does not name the edge: {text}");
        let watched = text.replace(&neighbor, &format!("{neighbor} bfd yes;"));
        fs::write(&file, watched + "protocol bfd { multihop { interval 50 ms; multiplier 3; }; }\n")?;
        let said = self.birdc(name, &["configure"])?;
        ensure!(
            said.contains("Reconfigured") || said.contains("Reconfiguration in progress"),
            "birdc configure: {said}"
        );
        Ok(())
    }

    /// Stops a node's BIRD, which then neither speaks nor closes its connections, or lets it go on.
    ///
    /// # Errors
    /// Where it does not run.
    pub fn hang(&self, name: &str, hang: bool) -> Result<()> {
        let node = super::topology::node(name).with_context(|| format!("{name} is not a node"))?;
        let pid = fs::read_to_string(self.speaker_file(node, "bird.pid")).context("read BIRD's process id")?;
        netns::signal(pid.trim().parse()?, if hang { libc::SIGSTOP } else { libc::SIGCONT })
    }

    /// Asks a node's BIRD.
    ///
    /// # Errors
    /// Where it does not answer.
    pub fn birdc(&self, node: &str, arguments: &[&str]) -> Result<String> {
        let node = super::topology::node(node).with_context(|| format!("{node} is not a node"))?;
        let mut command = Command::new(exec::program("birdc", "bird2")?);
        command.arg("-s").arg(self.speaker_file(node, "bird.ctl")).args(arguments);
        run(&mut command)
    }

    /// Asks a node's FRR.
    ///
    /// # Errors
    /// Where it does not answer.
    pub fn vtysh(&self, node: &str, commands: &[&str]) -> Result<String> {
        let mut command = Command::new(exec::program("vtysh", "frr")?);
        command.arg("--vty_socket").arg(self.folder().join(format!("{node}.frr")));
        for line in commands {
            command.args(["-c", line]);
        }
        run(&mut command)
    }

    /// Withdraws a node's pod network, its sessions staying up.
    ///
    /// # Errors
    /// Where the speaker does not take the command.
    pub fn withdraw(&self, node: &str) -> Result<()> {
        self.set_announced(node, false)
    }

    /// Announces a node's pod network again.
    ///
    /// # Errors
    /// Where the speaker does not take the command.
    pub fn announce(&self, node: &str) -> Result<()> {
        self.set_announced(node, true)
    }

    fn set_announced(&self, name: &str, announced: bool) -> Result<()> {
        let node = super::topology::node(name).with_context(|| format!("{name} is not a node"))?;
        match self.state.speaker {
            Speaker::Bird => {
                let verb = if announced { "enable" } else { "disable" };
                let said = self.birdc(name, &[verb, "calico_block"])?;
                ensure!(said.contains("calico_block: "), "birdc {verb} calico_block: {said}");
            }
            Speaker::Frr => {
                let no = if announced { "" } else { "no " };
                let network = format!("{no}network {}", node.block());
                let router = format!("router bgp {ASN}");
                self.vtysh(name, &["configure terminal", &router, "address-family ipv4 unicast", &network])?;
            }
        }
        Ok(())
    }

    /// The established sessions of a node's speaker, by peer address.
    ///
    /// # Errors
    /// Where the speaker does not answer.
    pub fn established_peers(&self, node: &str) -> Result<Vec<String>> {
        match self.state.speaker {
            Speaker::Bird => Ok(established_in_bird(&self.birdc(node, &["show", "protocols"])?)),
            Speaker::Frr => {
                let text = self.vtysh(node, &["show bgp ipv4 unicast summary json"])?;
                let summary: serde_json::Value = serde_json::from_str(&text).context("read FRR's summary")?;
                let Some(peers) = summary["peers"].as_object() else { bail!("FRR's summary has no peers: {text}") };
                let up = peers.iter().filter(|(_, peer)| peer["state"] == "Established");
                Ok(up.map(|(address, _)| address.clone()).collect())
            }
        }
    }

    /// Waits until every node has its sessions to the other nodes.
    pub(super) fn wait_for_mesh(&self) -> Result<()> {
        for node in NODES {
            wait_for(&format!("the node-to-node mesh of {}", node.name), Duration::from_secs(20), || {
                let up = self.established_peers(node.name)?;
                Ok(NODES.iter().filter(|peer| **peer != node).all(|peer| up.contains(&peer.address().to_string())))
            })?;
        }
        Ok(())
    }
}

/// `Mesh_172_16_1_81 BGP --- up 21:35:26.321 Established` -> `172.16.1.81`
fn established_in_bird(text: &str) -> Vec<String> {
    text.lines()
        .filter(|line| line.contains("Established"))
        .filter_map(|line| line.split_whitespace().next()?.split_once('_'))
        .map(|(_, address)| address.replace('_', "."))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn birds_table_gives_the_addresses_of_established_peers_only() {
        let text = "BIRD 2.0.12 ready.\nName       Proto      Table      State  Since         Info\n\
                    Mesh_172_16_1_81 BGP        ---        up     21:35:26.321  Established   \n\
                    Mesh_172_16_1_82 BGP        ---        start  21:35:26.321  Passive       \n\
                    Node_172_16_1_88 BGP        ---        start  21:35:26.321  Active        Socket: Connection refused\n";
        assert_eq!(established_in_bird(text), ["172.16.1.81"]);
    }
}
