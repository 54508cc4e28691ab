//! Network namespaces for tests: made with a prefix of their own, entered by setns, gone on drop.

#![allow(dead_code, reason = "every test binary compiles this module and uses its own part of it")]

pub mod bgp;
pub mod speakers;

use std::{
    fs::File,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

static COUNTER: AtomicU32 = AtomicU32::new(0);

/// A network namespace; deleted on drop of its last clone, with every interface in it.
#[derive(Clone, Debug)]
pub struct Namespace {
    /// Its name under `/run/netns`.
    pub name: String,
    _guard: Arc<Guard>,
}

#[derive(Debug)]
struct Guard(String);

impl Namespace {
    /// A new one, with loopback up.
    pub fn new(role: &str) -> Self {
        let name = format!("e{}-{}-{role}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
        run("ip", &["netns", "add", &name]);
        let namespace = Self { _guard: Arc::new(Guard(name.clone())), name };
        namespace.ip("link set lo up");
        namespace
    }

    /// Runs `ip` inside it.
    pub fn ip(&self, arguments: &str) {
        let mut all = vec!["-n", self.name.as_str()];
        all.extend(arguments.split_whitespace());
        run("ip", &all);
    }

    /// A command that will run inside it.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name, program]);
        command
    }

    /// Runs `work` on a thread inside it, with a tokio runtime whose sockets are in it too.
    pub fn block_on<T, F>(&self, work: impl FnOnce() -> F + Send) -> T
    where
        F: Future<Output = T>,
        T: Send,
    {
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                self.enter();
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(work())
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Moves the calling thread into it.
    pub fn enter(&self) {
        enter(&self.name);
    }
}

/// Moves the calling thread into the namespace of this name.
pub fn enter(name: &str) {
    let file = File::open(Path::new("/run/netns").join(name)).unwrap();
    // SAFETY: setns takes a descriptor, which `file` keeps open, and changes the calling thread alone.
    #[allow(unsafe_code, reason = "std has no setns")]
    let result = unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) };
    assert_eq!(result, 0, "setns {name}: {}", std::io::Error::last_os_error());
}

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

/// Joins two namespaces by a veth pair called `name` in both.
pub fn veth(a: &Namespace, b: &Namespace, name: &str) {
    run("ip", &["-n", &a.name, "link", "add", name, "type", "veth", "peer", "name", name, "netns", &b.name]);
    for namespace in [a, b] {
        namespace.ip(&format!("link set {name} up"));
    }
}

/// Runs a command that must succeed.
pub fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr));
}

/// Where a program is, if it is installed.
pub fn which(program: &str) -> Option<PathBuf> {
    // FRR's folder first: OpenBGPD has a bgpd too.
    ["/usr/lib/frr", "/usr/sbin", "/usr/bin", "/sbin", "/bin"]
        .into_iter()
        .map(|folder| Path::new(folder).join(program))
        .find(|path| path.exists())
}

/// A daemon that is killed on drop.
#[derive(Debug)]
pub struct Daemon(pub Child);

impl Daemon {
    /// Starts it, with its output in `log`.
    pub fn start(command: &mut Command, log: &Path) -> Self {
        let file = File::create(log).unwrap();
        Self(command.stdin(Stdio::null()).stderr(file.try_clone().unwrap()).stdout(file).spawn().unwrap())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Asks until the answer is `Some`, for as long as `patience`; the last complaint is the panic's text.
pub fn eventually<T>(what: &str, patience: Duration, mut ask: impl FnMut() -> Result<T, String>) -> T {
    let end = Instant::now() + patience;
    loop {
        match ask() {
            Ok(answer) => return answer,
            Err(complaint) if Instant::now() > end => panic!("{what}: {complaint}"),
            Err(_) => thread::sleep(Duration::from_millis(50)),
        }
    }
}
