//! BIRD and FRR in the lab's node.

use std::{fs, process::Command};

use super::{
    bgp::{Lab, NODE, PATIENCE},
    eventually, which,
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

pub trait Bird {
    fn bird(&mut self, protocols: &str);
    fn bird_with(&mut self, protocols: &str, arguments: &[&str]);
    fn birdc(&self, command: &str) -> String;
}

impl Bird for Lab {
    /// Starts BIRD with static pod routes and the given protocols.
    fn bird(&mut self, protocols: &str) {
        self.bird_with(protocols, &[]);
    }

    fn bird_with(&mut self, protocols: &str, arguments: &[&str]) {
        let config = format!(
            "router id {NODE};\nprotocol device {{}}\n\
             protocol static pods4 {{ ipv4; route 10.1.2.0/26 blackhole; route 10.1.3.0/26 blackhole; }}\n\
             protocol static pods6 {{ ipv6; route fd01:2::/64 blackhole; }}\n{protocols}\n"
        );
        let (file, socket, pid) = (self.path("bird.conf"), self.path("bird.ctl"), self.path("bird.pid"));
        fs::write(&file, config).unwrap();
        let texts = [file, socket, pid].map(|path| path.display().to_string());
        let mut all = vec!["-f", "-c", &texts[0], "-s", &texts[1], "-P", &texts[2]];
        all.extend(arguments);
        self.start("bird", &all);
        eventually("BIRD answers", PATIENCE, || {
            let answer = self.birdc("show status");
            if answer.contains("Daemon is up") { Ok(()) } else { Err(answer) }
        });
    }

    fn birdc(&self, command: &str) -> String {
        let mut birdc = Command::new("birdc");
        let output = birdc.arg("-s").arg(self.path("bird.ctl")).args(command.split(' ')).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
    }
}

pub trait Frr {
    fn bgpd(&mut self, body: &str);
    fn vtysh(&self, command: &str) -> String;
}

impl Frr for Lab {
    /// Starts bgpd without zebra.
    fn bgpd(&mut self, body: &str) {
        let file = self.path("bgpd.conf");
        fs::write(&file, format!("hostname frr-node\nlog stdout\n{body}\n")).unwrap();
        let folder = self.folder.path().display().to_string();
        let (conf, pid) = (file.display().to_string(), self.path("bgpd.pid").display().to_string());
        self.start(
            "/usr/lib/frr/bgpd",
            &["-Z", "-S", "-f", &conf, "-i", &pid, "--vty_socket", &folder, "-A", "127.0.0.1", "-P", "0"],
        );
        eventually("bgpd answers", PATIENCE, || {
            let answer = self.vtysh("show version");
            if answer.contains("FRRouting") { Ok(()) } else { Err(answer) }
        });
    }

    fn vtysh(&self, command: &str) -> String {
        let folder = self.folder.path().display().to_string();
        let arguments = ["--vty_socket", &folder, "-d", "bgpd", "-c", command];
        let output = self.node.command("vtysh").args(arguments).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
    }
}
