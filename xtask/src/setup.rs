//! `cargo xtask setup`: everything a fresh Debian 12 with build-essential and rustup lacks. Each step is skipped where
//! it is done already.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use crate::sh::{self, as_root, cargo, is_root, output, root, step};

/// bpf-linker must match rustc's LLVM; this one uses the LLVM of the pinned compiler.
const BPF_LINKER: &str = "0.10.3";

/// Debian packages, each with a program that shows it is there.
const PACKAGES: [(&str, &str); 20] = [
    ("iproute2", "ip"),
    ("ethtool", "ethtool"),
    ("nftables", "nft"),
    ("procps", "sysctl"),
    ("curl", "curl"),
    ("openssl", "openssl"),
    ("bird2", "bird"),
    ("frr", "vtysh"),
    ("gobgpd", "gobgpd"),
    // Both FRR and OpenBGPD call theirs bgpd; only one has a bgpctl.
    ("openbgpd", "bgpctl"),
    ("exabgp", "exabgp"),
    ("nginx", "nginx"),
    ("libnginx-mod-stream", "/usr/lib/nginx/modules/ngx_stream_module.so"),
    ("haproxy", "haproxy"),
    ("hping3", "hping3"),
    ("wrk", "wrk"),
    ("iperf3", "iperf3"),
    ("knot", "knotd"),
    ("dnsmasq-base", "dnsmasq"),
    ("systemd", "systemd-analyze"),
];

/// Everything.
pub fn run() -> Result<()> {
    packages()?;
    for_building()?;
    bpffs()
}

/// What the eBPF object needs.
pub fn for_building() -> Result<()> {
    rust_src()?;
    bpf_linker()
}

fn packages() -> Result<()> {
    let missing: Vec<&str> =
        PACKAGES.iter().filter(|(_, proof)| !present(proof)).map(|(package, _)| *package).collect();
    if missing.is_empty() {
        step("packages: all there");
        return Ok(());
    }
    step(&format!("packages: install {}", missing.join(" ")));
    if !Path::new("/usr/bin/apt-get").exists() {
        bail!("no apt-get here: install these Debian packages' counterparts by hand: {}", missing.join(" "));
    }
    let guard = ServiceGuard::put()?;
    let apt = |arguments: &[&str]| {
        let mut command = as_root(Path::new("/usr/bin/env"));
        command.args(["DEBIAN_FRONTEND=noninteractive", "RUNLEVEL=1", "apt-get", "-qq", "-y"]).args(arguments);
        sh::run(&mut command)
    };
    apt(&["update"]).context("the package lists could not be had: check the network and /etc/apt/sources.list")?;
    let mut arguments = vec!["install", "--no-install-recommends"];
    arguments.extend(&missing);
    apt(&arguments).with_context(|| format!("could not install {}", missing.join(" ")))?;
    drop(guard);
    let still: Vec<&str> = PACKAGES.iter().filter(|(_, proof)| !present(proof)).map(|(package, _)| *package).collect();
    if !still.is_empty() {
        bail!("installed, but their programs are not there: {}", still.join(" "));
    }
    Ok(())
}

fn present(proof: &str) -> bool {
    if proof.starts_with('/') {
        return Path::new(proof).exists();
    }
    ["/usr/sbin", "/usr/bin", "/sbin", "/bin"].iter().any(|folder| Path::new(folder).join(proof).exists())
}

/// Debian starts a server when its package is installed, unless policy-rc.d forbids it (exit code 101). Tests run
/// their own instances; the machine's must not start listening. Puts the former file back when dropped.
struct ServiceGuard {
    former: Option<PathBuf>,
}

const POLICY: &str = "/usr/sbin/policy-rc.d";

impl ServiceGuard {
    fn put() -> Result<Self> {
        let mut former = None;
        if Path::new(POLICY).exists() {
            let aside = PathBuf::from(format!("{POLICY}.before-edge-setup"));
            sh::run(as_root(Path::new("/bin/mv")).arg(POLICY).arg(&aside))?;
            former = Some(aside);
        }
        let guard = Self { former };
        let script = std::env::temp_dir().join(format!("edge-policy-rc.d.{}", std::process::id()));
        fs::write(&script, "#!/bin/sh\nexit 101\n").context("write a policy-rc.d")?;
        let installed = sh::run(as_root(Path::new("/usr/bin/install")).args(["-m", "755"]).arg(&script).arg(POLICY));
        fs::remove_file(&script).context("remove the temporary policy-rc.d")?;
        installed.map(|()| guard)
    }
}

impl Drop for ServiceGuard {
    fn drop(&mut self) {
        let restored = match &self.former {
            Some(aside) => sh::run(as_root(Path::new("/bin/mv")).arg(aside).arg(POLICY)),
            None => sh::run(as_root(Path::new("/bin/rm")).args(["-f", POLICY])),
        };
        if let Err(error) = restored {
            eprintln!("{POLICY} could not be put back, services will not start on installation: {error:#}");
        }
    }
}

fn rust_src() -> Result<()> {
    let sysroot = output(Command::new("rustc").args(["--print", "sysroot"]).current_dir(root()))?;
    let sysroot = PathBuf::from(String::from_utf8_lossy(&sysroot.stdout).trim());
    if sysroot.join("lib/rustlib/src/rust/library/core/Cargo.toml").exists() {
        step("rust-src: there");
        return Ok(());
    }
    step("rust-src: add the component");
    sh::run(Command::new("rustup").args(["component", "add", "rust-src"]).current_dir(root()))
        .context("the rust-src component could not be had: it needs rustup and the network")
}

fn bpf_linker() -> Result<()> {
    let found = output(Command::new("bpf-linker").arg("--version"));
    let version = found.ok().map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    if version.as_deref().is_some_and(|version| version.split_whitespace().any(|word| word == BPF_LINKER)) {
        step(&format!("bpf-linker {BPF_LINKER}: there"));
        return Ok(());
    }
    step(&format!("bpf-linker {BPF_LINKER}: install (found: {})", version.as_deref().unwrap_or("none")));
    sh::run(cargo().args(["install", "bpf-linker", "--version", BPF_LINKER, "--locked", "--force"]))
        .context("bpf-linker could not be built: it needs the network and the pinned toolchain")?;
    if output(Command::new("bpf-linker").arg("--version")).is_err() {
        bail!("bpf-linker was installed, but not into a folder of PATH: add ~/.cargo/bin to it");
    }
    Ok(())
}

fn bpffs() -> Result<()> {
    let mounts = fs::read_to_string("/proc/mounts").context("read /proc/mounts")?;
    let mounted = |line: &str| {
        let mut fields = line.split(' ').skip(1);
        fields.next() == Some("/sys/fs/bpf") && fields.next() == Some("bpf")
    };
    if mounts.lines().any(mounted) {
        step("bpffs: mounted");
        return Ok(());
    }
    step("bpffs: mount it at /sys/fs/bpf");
    sh::run(as_root(Path::new("/bin/mount")).args(["-t", "bpf", "bpf", "/sys/fs/bpf"])).with_context(|| {
        let who = if is_root() { "root" } else { "sudo" };
        format!(
            "bpffs could not be mounted as {who}: the kernel needs CONFIG_BPF_SYSCALL, and a container CAP_SYS_ADMIN"
        )
    })
}
