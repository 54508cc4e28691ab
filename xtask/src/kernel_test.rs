//! `cargo xtask kernel-test`: loads the eBPF object and runs the dataplane tests on another kernel, in QEMU.
//!
//! The guest is an initramfs of BusyBox, the test programs and what they call; the kernel and its modules come from a
//! Debian package. Results come back over the serial console, a line each. Needs no root, no network inside the guest and
//! no KVM.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs,
    io::{BufRead as _, BufReader},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
};

use anyhow::{Context, Result, bail};

use crate::sh::{self, cargo, output, root, show, step};

/// What `--kernel` may be, and how the guest is run.
#[derive(clap::Args)]
pub struct Options {
    /// A Debian kernel package: a .deb file, or a name that apt knows.
    #[arg(long, default_value = "linux-image-cloud-amd64")]
    kernel: String,
    /// QEMU's accelerator; kvm is faster where it works.
    #[arg(long, default_value = "tcg")]
    accel: String,
    /// Memory of the guest, MiB.
    #[arg(long, default_value_t = 3072)]
    memory: u32,
    /// Test programs to run, by name; without any, all that concern the kernel.
    programs: Vec<String>,
    /// Only tests whose name contains this.
    #[arg(long)]
    filter: Option<String>,
}

/// Test programs that exercise the kernel, by package and its folder.
const PROGRAMS: [(&str, &str, &[&str]); 2] =
    [("edge-tests", "tests", &["datapath_"]), ("edge-ctl", "edge-ctl", &["datapath_", "fib_netlink"])];

/// Modules that tests need, where the kernel does not have them built in. Their dependencies come with them.
const MODULES: [&str; 7] = ["veth", "sch_ingress", "cls_bpf", "act_bpf", "8021q", "dummy", "bonding"];

/// Programs that tests start.
const TOOLS: [&str; 3] = ["ip", "ethtool", "tc"];

/// Starts the lines that the guest reports in.
const MARK: &str = "EDGE-GUEST";

/// Debian packages, each with a program that shows it is there.
const PACKAGES: [(&str, &str); 5] = [
    ("qemu-system-x86", "qemu-system-x86_64"),
    ("busybox-static", "busybox"),
    ("cpio", "cpio"),
    ("kmod", "depmod"),
    ("xz-utils", "xz"),
];

/// Everything.
pub fn run(options: &Options) -> Result<ExitCode> {
    let missing: Vec<&str> =
        PACKAGES.iter().filter(|(_, proof)| find(proof).is_none()).map(|(name, _)| *name).collect();
    if !missing.is_empty() {
        bail!("this needs {0}: `apt-get install --no-install-recommends {0}`", missing.join(" "));
    }
    let folder = root().join("target/kernel-test");
    fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    let kernel = Kernel::unpack(&package(&options.kernel, &folder)?, &folder)?;
    let programs = test_programs(&options.programs)?;
    step(&format!("build the guest's file system for {}", kernel.release));
    let initramfs = initramfs(&kernel, &programs, options.filter.as_deref(), &folder)?;
    step(&format!("run {} in QEMU ({})", kernel.release, options.accel));
    let results = boot(&kernel, &initramfs, options)?;
    Ok(report(&kernel, &programs, &results))
}

/// The package's file: given, or downloaded by apt.
fn package(kernel: &str, folder: &Path) -> Result<PathBuf> {
    if kernel.ends_with(".deb") {
        return Ok(PathBuf::from(kernel));
    }
    // A meta package stands for the newest package it depends on.
    let depends = output(Command::new("apt-cache").args(["depends", "--important", kernel]))?;
    let depends = String::from_utf8_lossy(&depends.stdout).into_owned();
    let real = depends.lines().filter_map(|line| line.trim().strip_prefix("Depends: ")).find(|name| {
        name.strip_prefix("linux-image-")
            .is_some_and(|version| version.starts_with(|first: char| first.is_ascii_digit()))
    });
    let name = real.unwrap_or(kernel).trim_end_matches("-unsigned");
    let downloaded = |name: &str| -> Result<Option<PathBuf>> {
        let mut found = fs::read_dir(folder)?.filter_map(|entry| Some(entry.ok()?.path()));
        let is_it = |path: &PathBuf| {
            let file = path.file_name().map(|file| file.to_string_lossy().into_owned()).unwrap_or_default();
            file.strip_prefix(name).is_some_and(|rest| rest.starts_with('_') && rest.ends_with(".deb"))
        };
        Ok(found.find(is_it))
    };
    if let Some(path) = downloaded(name)? {
        return Ok(path);
    }
    step(&format!("download {name}"));
    sh::run(Command::new("apt-get").args(["-qq", "download", name]).current_dir(folder))
        .with_context(|| format!("{name} could not be had; `apt-cache search linux-image` lists what there is"))?;
    downloaded(name)?
        .with_context(|| format!("apt-get said it downloaded {name}, but it is not in {}", folder.display()))
}

struct Kernel {
    /// As `uname -r` says.
    release: String,
    /// The image to boot.
    image: PathBuf,
    /// Module files in the order in which they are to be loaded.
    modules: Vec<PathBuf>,
}

impl Kernel {
    fn unpack(package: &Path, folder: &Path) -> Result<Self> {
        let name = package.file_stem().with_context(|| format!("{} is no file", package.display()))?;
        let tree = folder.join(name);
        if !tree.exists() {
            let partial = folder.join("unpacking");
            if partial.exists() {
                fs::remove_dir_all(&partial)?;
            }
            sh::run(Command::new("dpkg-deb").arg("-x").arg(package).arg(&partial))?;
            fs::rename(&partial, &tree)?;
        }
        let boot = tree.join("boot");
        let image = fs::read_dir(&boot)
            .with_context(|| format!("{} holds no kernel", package.display()))?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.file_name().is_some_and(|file| file.to_string_lossy().starts_with("vmlinuz-")))
            .with_context(|| format!("{} holds no /boot/vmlinuz", package.display()))?;
        let file = image.file_name().map(|file| file.to_string_lossy().into_owned()).unwrap_or_default();
        let release = file.trim_start_matches("vmlinuz-").to_owned();
        let base = if tree.join("lib/modules").exists() { tree.clone() } else { tree.join("usr") };
        sh::run(Command::new("/sbin/depmod").arg("-b").arg(&base).arg(&release))?;
        let modules = modules(&base.join("lib/modules").join(&release))?;
        Ok(Self { release, image, modules })
    }
}

/// The files of [`MODULES`] and of what they depend on, dependencies first; what is not there is built in or absent, which
/// the tests will say.
fn modules(tree: &Path) -> Result<Vec<PathBuf>> {
    let path = tree.join("modules.dep");
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let mut ordered: Vec<PathBuf> = Vec::new();
    for module in MODULES {
        let line = text.lines().find(|line| {
            let file = line.split(':').next().and_then(|path| path.rsplit('/').next());
            file.and_then(|file| file.split('.').next()) == Some(module)
        });
        let Some((own, dependencies)) = line.and_then(|line| line.split_once(':')) else { continue };
        // modules.dep lists the dependencies of dependencies after them.
        let files = dependencies.split_whitespace().rev().chain([own]).map(|file| tree.join(file));
        for file in files {
            if !ordered.contains(&file) {
                ordered.push(file);
            }
        }
    }
    Ok(ordered)
}

/// The test programs, built, by name.
fn test_programs(wanted: &[String]) -> Result<BTreeMap<String, PathBuf>> {
    step("build the test programs");
    let mut programs = BTreeMap::new();
    for (package, folder, prefixes) in PROGRAMS {
        // Those that are asked for, or all: building them takes longer than running a few.
        let own = |name: &&String| root().join(folder).join("tests").join(format!("{name}.rs")).exists();
        let named: Vec<&String> = wanted.iter().filter(own).collect();
        let mut command = cargo();
        command.args([
            "test",
            "--locked",
            "--no-run",
            "--message-format=json-render-diagnostics",
            "--package",
            package,
        ]);
        command.arg("--bins").stderr(Stdio::inherit());
        match wanted {
            [] => command.arg("--tests"),
            _ => command.args(named.iter().flat_map(|name| ["--test", name])),
        };
        let built = output(&mut command)?;
        if !built.status.success() {
            bail!("`{}` failed", show(&command));
        }
        for line in String::from_utf8_lossy(&built.stdout).lines() {
            let message: serde_json::Value = serde_json::from_str(line).context("read what cargo says")?;
            let (Some(path), Some(name)) = (message["executable"].as_str(), message["target"]["name"].as_str()) else {
                continue;
            };
            let is_test = message["target"]["kind"][0] == "test";
            let chosen = if wanted.is_empty() {
                prefixes.iter().any(|prefix| name.starts_with(prefix))
            } else {
                wanted.iter().any(|wanted| wanted == name)
            };
            let is_lab = name == "edge-lab" && message["profile"]["test"] == false;
            if (is_test && chosen) || is_lab {
                programs.insert(name.to_owned(), PathBuf::from(path));
            }
        }
    }
    if programs.keys().all(|name| name == "edge-lab") {
        bail!("no test program is called {}", wanted.join(" or "));
    }
    Ok(programs)
}

/// Packs the guest's file system.
fn initramfs(
    kernel: &Kernel,
    programs: &BTreeMap<String, PathBuf>,
    filter: Option<&str>,
    folder: &Path,
) -> Result<PathBuf> {
    let tree = folder.join("guest");
    if tree.exists() {
        fs::remove_dir_all(&tree)?;
    }
    for made in ["bin", "dev", "proc", "sys", "tmp", "run", "etc", "tests", "modules"] {
        fs::create_dir_all(tree.join(made))?;
    }
    let mut libraries = BTreeSet::new();
    for (name, path) in programs {
        let target = tree.join("tests").join(name);
        // Debug sections are most of a test program's size, and would have to fit into the guest's memory.
        sh::run(Command::new("strip").arg("-o").arg(&target).arg(path))?;
        libraries.extend(needed(path)?);
    }
    for tool in TOOLS.into_iter().chain(["busybox"]) {
        let path = find(tool).with_context(|| format!("there is no `{tool}`: `cargo xtask setup` installs it"))?;
        fs::copy(&path, tree.join("bin").join(tool))?;
        libraries.extend(needed(&path)?);
    }
    for library in &libraries {
        let target = tree.join(library.strip_prefix("/").unwrap_or(library));
        fs::create_dir_all(target.parent().unwrap_or(&tree))?;
        fs::copy(library, &target).with_context(|| format!("copy {}", library.display()))?;
    }
    let mut order = String::new();
    for module in &kernel.modules {
        let file = module.file_name().map(|file| file.to_string_lossy().into_owned()).unwrap_or_default();
        let target = tree.join("modules").join(file.trim_end_matches(".xz"));
        if file.ends_with(".xz") {
            let plain = output(Command::new("xz").arg("-dc").arg(module))?;
            fs::write(&target, plain.stdout)?;
        } else {
            fs::copy(module, &target)?;
        }
        writeln!(order, "insmod /modules/{}", file.trim_end_matches(".xz"))?;
    }
    let init = tree.join("init");
    fs::write(&init, init_script(&order, programs, filter))?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;
    let archive = folder.join("guest.cpio");
    let pack = "find . | cpio --quiet -o -H newc -R 0:0 > ../guest.cpio";
    sh::run(Command::new("sh").args(["-c", pack]).current_dir(&tree))?;
    Ok(archive)
}

/// The guest's first process. BusyBox's own `ip` and `tc` lack what the tests use, so the real ones come first.
fn init_script(modules: &str, programs: &BTreeMap<String, PathBuf>, filter: Option<&str>) -> String {
    let filter = filter.unwrap_or_default();
    let mut script = format!(
        "#!/bin/busybox sh\nexport PATH=/bin:/usr/bin:/busybox RUST_BACKTRACE=0 HOME=/tmp\n\
         /bin/busybox mkdir /busybox\n/bin/busybox --install -s /busybox\n\
         mount -t proc proc /proc\nmount -t sysfs sys /sys\nmount -t devtmpfs dev /dev\n\
         mount -t bpf bpf /sys/fs/bpf\nmount -t tmpfs tmp /tmp\nmount -t tmpfs run /run\n\
         ln -s /proc/self/fd /dev/fd\nip link set lo up\n{modules}\
         echo \"{MARK} kernel $(uname -r)\"\n"
    );
    for name in programs.keys() {
        let run = if name == "edge-lab" {
            "/tests/edge-lab kernel-facts".to_owned()
        } else {
            let threads = "--test-threads=2";
            format!("timeout 900 /tests/{name} {threads} {filter}")
        };
        // Writing to a variable first keeps lines of the kernel from landing inside ours.
        let _ = writeln!(script, "echo \"{MARK} start {name}\"\n{run} </dev/null 2>&1\necho \"{MARK} end {name} $?\"");
    }
    script.push_str(&format!("echo \"{MARK} done\"\npoweroff -f\n"));
    script
}

/// Shared libraries of a program, its loader included.
fn needed(program: &Path) -> Result<Vec<PathBuf>> {
    let listed = output(Command::new("ldd").arg(program))?;
    let text = String::from_utf8_lossy(&listed.stdout).into_owned();
    Ok(text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect())
}

fn find(program: &str) -> Option<PathBuf> {
    let folders = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"];
    folders.iter().map(|folder| Path::new(folder).join(program)).find(|path| path.exists())
}

/// What the guest said.
#[derive(Debug, Default, PartialEq, Eq)]
struct Results {
    /// Exit code by program.
    codes: BTreeMap<String, i32>,
    /// Tests by outcome: passed, failed, and those that found they cannot run.
    passed: usize,
    failed: Vec<String>,
    skipped: Vec<String>,
    finished: bool,
}

impl Results {
    fn read(&mut self, line: &str) {
        if let Some((_, words)) = line.split_once(MARK) {
            let words: Vec<&str> = words.split_whitespace().collect();
            match words[..] {
                ["end", name, code] => {
                    self.codes.insert(name.to_owned(), code.parse().unwrap_or(-1));
                }
                ["done"] => self.finished = true,
                _ => {}
            }
        }
        if let Some((_, skipped)) = line.split_once("SKIPPED ") {
            self.skipped.push(skipped.to_owned());
        }
        if let Some(name) = line.strip_prefix("test ").and_then(|test| test.strip_suffix(" ... FAILED")) {
            self.failed.push(name.to_owned());
        }
        if let Some(summary) = line.strip_prefix("test result: ") {
            let count = summary.split_once(". ").and_then(|(_, rest)| rest.split_once(" passed"));
            self.passed += count.and_then(|(count, _)| count.parse::<usize>().ok()).unwrap_or(0);
        }
    }
}

fn boot(kernel: &Kernel, initramfs: &Path, options: &Options) -> Result<Results> {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-accel", &options.accel, "-cpu", "max", "-smp", "2", "-m", &options.memory.to_string()]);
    command.args(["-nographic", "-no-reboot", "-nodefaults", "-serial", "stdio", "-kernel"]).arg(&kernel.image);
    command.arg("-initrd").arg(initramfs).args(["-append", "console=ttyS0 panic=-1 quiet loglevel=4"]);
    let mut guest = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("start `{}`", show(&command)))?;
    let mut results = Results::default();
    let console = guest.stdout.take().context("no console")?;
    for line in BufReader::new(console).split(b'\n') {
        let line = line.context("read the guest's console")?;
        let line = String::from_utf8_lossy(&line).trim_end().to_owned();
        println!("{line}");
        results.read(&line);
    }
    guest.wait().context("wait for QEMU")?;
    Ok(results)
}

fn report(kernel: &Kernel, programs: &BTreeMap<String, PathBuf>, results: &Results) -> ExitCode {
    println!(
        "\n{}: {} passed, {} failed, {} skipped",
        kernel.release,
        results.passed,
        results.failed.len(),
        results.skipped.len()
    );
    for name in &results.failed {
        println!("FAILED  {name}");
    }
    for line in &results.skipped {
        println!("SKIPPED {line}");
    }
    let mut whole = results.finished && results.failed.is_empty();
    for name in programs.keys() {
        match results.codes.get(name) {
            Some(0) => {}
            Some(code) => {
                println!("{name}: exit code {code}");
                whole = false;
            }
            None => {
                println!("{name}: did not end");
                whole = false;
            }
        }
    }
    if whole { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_console_is_read_line_by_line() {
        let mut results = Results::default();
        for line in [
            "EDGE-GUEST start datapath_forward",
            "test a_thing ... ok",
            "test b_thing ... FAILED",
            "test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 3.21s",
            "EDGE-GUEST end datapath_forward 101",
            "test c ... SKIPPED c: needs a NIC",
        ] {
            results.read(line);
        }
        assert_eq!((results.passed, results.finished), (1, false));
        assert_eq!(results.failed, ["b_thing"]);
        assert_eq!(results.skipped, ["c: needs a NIC"]);
        assert_eq!(results.codes.get("datapath_forward"), Some(&101));
        results.read("EDGE-GUEST done");
        assert!(results.finished);
    }

    #[test]
    fn a_guest_that_panics_in_between_is_a_failure() {
        let kernel = Kernel { release: "6.1".to_owned(), image: PathBuf::new(), modules: Vec::new() };
        let programs = BTreeMap::from([("datapath_forward".to_owned(), PathBuf::new())]);
        let mut results = Results { codes: BTreeMap::from([("datapath_forward".to_owned(), 0)]), ..Results::default() };
        assert_eq!(report(&kernel, &programs, &results), ExitCode::FAILURE);
        results.finished = true;
        assert_eq!(report(&kernel, &programs, &results), ExitCode::SUCCESS);
    }
}
