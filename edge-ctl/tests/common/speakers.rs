//! BIRD, FRR, GoBGP, OpenBGPD and ExaBGP in the lab's node.

use std::{fs, process::Command};

use super::{
    bgp::{Lab, NODE, PATIENCE},
    eventually, run, which,
};

/// True where a program is not installed, which is printed.
pub fn missing(test: &str, programs: &[&str]) -> bool {
    let missing = programs.iter().find(|program| which(program).is_none());
    if let Some(program) = missing {
        println!("SKIPPED {test}: {program} is not installed");
    }
    missing.is_some()
}

/// BIRD's side of an internal session in AS 64512, with two families and these options.
pub fn ibgp(node: &str, edge: &str, options: &str) -> String {
    format!(
        "protocol bgp edge {{ local {node} as 64512; neighbor {edge} as 64512; strict bind yes; {options} \
         ipv4 {{ import all; export where source = RTS_STATIC; next hop self; }}; \
         ipv6 {{ import all; export where source = RTS_STATIC; next hop self; }}; }}"
    )
}

/// Full counts were asked for (`cargo xtask test --full`).
pub fn full() -> bool {
    std::env::var_os("EDGE_TEST_FULL").is_some_and(|value| value == "1")
}

/// What a program said, on both channels.
fn said(command: &mut Command) -> String {
    let output = command.output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

pub trait Bird {
    fn bird(&mut self, protocols: &str);
    fn bird_with(&mut self, protocols: &str, arguments: &[&str]);
    fn birdc(&self, command: &str) -> String;
    fn bird_named(&mut self, name: &str, configuration: &str, arguments: &[&str]);
    fn birdc_named(&self, name: &str, command: &str) -> String;
}

impl Bird for Lab {
    /// Starts BIRD with static pod routes and the given protocols.
    fn bird(&mut self, protocols: &str) {
        self.bird_with(protocols, &[]);
    }

    fn bird_with(&mut self, protocols: &str, arguments: &[&str]) {
        let configuration = format!(
            "router id {NODE};\nprotocol device {{}}\n\
             protocol static pods4 {{ ipv4; route 10.1.2.0/26 blackhole; route 10.1.3.0/26 blackhole; }}\n\
             protocol static pods6 {{ ipv6; route fd01:2::/64 blackhole; }}\n{protocols}\n"
        );
        self.bird_named("bird", &configuration, arguments);
    }

    fn birdc(&self, command: &str) -> String {
        self.birdc_named("bird", command)
    }

    /// One of several BIRDs, with a configuration of its own.
    fn bird_named(&mut self, name: &str, configuration: &str, arguments: &[&str]) {
        let [file, socket, pid] = ["conf", "ctl", "pid"].map(|suffix| self.path(&format!("{name}.{suffix}")));
        fs::write(&file, configuration).unwrap();
        let texts = [file, socket, pid].map(|path| path.display().to_string());
        let mut all = vec!["-f", "-c", &texts[0], "-s", &texts[1], "-P", &texts[2]];
        all.extend(arguments);
        self.start("bird", &all);
        eventually("BIRD answers", PATIENCE, || {
            let answer = self.birdc_named(name, "show status");
            if answer.contains("Daemon is up") { Ok(()) } else { Err(answer) }
        });
    }

    fn birdc_named(&self, name: &str, command: &str) -> String {
        said(Command::new("birdc").arg("-s").arg(self.path(&format!("{name}.ctl"))).args(command.split(' ')))
    }
}

pub trait Frr {
    fn bgpd(&mut self, body: &str);
    fn bgpd_with_zebra(&mut self, body: &str);
    fn bgpd_with(&mut self, body: &str, arguments: &[&str]);
    fn vtysh(&self, command: &str) -> String;
}

impl Frr for Lab {
    /// Starts bgpd without zebra.
    fn bgpd(&mut self, body: &str) {
        self.bgpd_with(body, &["-Z"]);
    }

    /// With zebra bgpd knows interfaces, which link-local peers need.
    fn bgpd_with_zebra(&mut self, body: &str) {
        let [file, socket, pid] = ["zebra.conf", "zserv.api", "zebra.pid"].map(|name| self.path(name));
        fs::write(&file, "hostname frr-node\nlog stdout\n").unwrap();
        let folder = self.folder.path().display().to_string();
        let texts = [&file, &socket, &pid].map(|path| path.display().to_string());
        let [file, zserv, pid] = texts.each_ref().map(String::as_str);
        // zebra insists on a user of its own, who makes sockets in the folder.
        run("chown", &["frr:frr", &folder]);
        self.start(
            "/usr/lib/frr/zebra",
            &["-u", "frr", "-g", "frr", "-f", file, "-z", zserv, "-i", pid, "--vty_socket", &folder, "-P", "0"],
        );
        eventually("zebra answers", PATIENCE, || if socket.exists() { Ok(()) } else { Err("no socket".to_owned()) });
        self.bgpd_with(body, &["-z", zserv]);
    }

    fn bgpd_with(&mut self, body: &str, arguments: &[&str]) {
        let file = self.path("bgpd.conf");
        fs::write(&file, format!("hostname frr-node\nlog stdout\n{body}\n")).unwrap();
        let folder = self.folder.path().display().to_string();
        let (conf, pid) = (file.display().to_string(), self.path("bgpd.pid").display().to_string());
        let mut all = vec!["-S", "-f", &conf, "-i", &pid, "--vty_socket", &folder, "-A", "127.0.0.1", "-P", "0"];
        all.extend(arguments);
        self.start("/usr/lib/frr/bgpd", &all);
        eventually("bgpd answers", PATIENCE, || {
            let answer = self.vtysh("show version");
            if answer.contains("FRRouting") { Ok(()) } else { Err(answer) }
        });
    }

    fn vtysh(&self, command: &str) -> String {
        let folder = self.folder.path().display().to_string();
        let arguments = ["--vty_socket", &folder, "-d", "bgpd", "-c", command];
        said(self.node.command("vtysh").args(arguments))
    }
}

pub trait Gobgp {
    fn gobgpd(&mut self, configuration: &str);
    fn gobgp(&self, command: &str) -> String;
}

impl Gobgp for Lab {
    fn gobgpd(&mut self, configuration: &str) {
        let file = self.path("gobgpd.toml");
        fs::write(&file, configuration).unwrap();
        let file = file.display().to_string();
        self.start("gobgpd", &["-f", &file, "-t", "toml", "--api-hosts", "127.0.0.1:50051", "--pprof-disable"]);
        eventually("gobgpd answers", PATIENCE, || {
            let answer = self.gobgp("global");
            if answer.contains("Router-ID") { Ok(()) } else { Err(answer) }
        });
    }

    fn gobgp(&self, command: &str) -> String {
        said(self.node.command("gobgp").args(command.split(' ')))
    }
}

pub trait OpenBgpd {
    fn openbgpd(&mut self, body: &str);
    fn bgpctl(&self, command: &str) -> String;
}

impl OpenBgpd for Lab {
    /// Starts OpenBGPD, which leaves the kernel's routes alone.
    fn openbgpd(&mut self, body: &str) {
        use std::os::unix::fs::PermissionsExt as _;
        // Its processes lock themselves in there; systemd makes the folder for the machine's own.
        fs::create_dir_all("/run/openbgpd").unwrap();
        let (file, socket) = (self.path("openbgpd.conf"), self.path("openbgpd.sock"));
        let socket = socket.display();
        fs::write(&file, format!("socket \"{socket}\"\nfib-update no\nrouter-id {NODE}\n{body}\n")).unwrap();
        // It refuses a configuration that others may read.
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        let file = file.display().to_string();
        self.start("/usr/sbin/bgpd", &["-d", "-f", &file]);
        eventually("OpenBGPD answers", PATIENCE, || {
            let answer = self.bgpctl("show summary");
            if answer.contains("Neighbor") { Ok(()) } else { Err(answer) }
        });
    }

    fn bgpctl(&self, command: &str) -> String {
        let mut bgpctl = Command::new("bgpctl");
        said(bgpctl.arg("-s").arg(self.path("openbgpd.sock")).args(command.split(' ')))
    }
}

pub trait ExaBgp {
    fn exabgp(&mut self, neighbor: &str);
    fn exabgp_log(&self) -> String;
}

impl ExaBgp for Lab {
    /// Starts ExaBGP with one neighbour, the edge.
    fn exabgp(&mut self, neighbor: &str) {
        let file = self.path("exabgp.conf");
        fs::write(&file, format!("neighbor 10.0.0.1 {{\n{neighbor}\n}}\n")).unwrap();
        let mut command = self.node.command("exabgp");
        command.arg(&file);
        for (key, value) in [
            ("exabgp.daemon.drop", "false"),
            ("exabgp.api.cli", "false"),
            ("exabgp.log.destination", "stdout"),
            ("exabgp.log.all", "true"),
            ("exabgp.log.level", "DEBUG"),
        ] {
            command.env(key, value);
        }
        let log = self.path("exabgp.log");
        self.daemons.push(super::Daemon::start(&mut command, &log));
    }

    fn exabgp_log(&self) -> String {
        fs::read_to_string(self.path("exabgp.log")).unwrap_or_default()
    }
}
