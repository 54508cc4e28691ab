//! A network namespace, and a bpffs, that live as long as one thread: nothing to clean up, and the default one is never touched.
#![allow(unsafe_code, reason = "unshare(2) and mount(2) have no safe wrapper among our dependencies")]

use std::{
    ffi::CString,
    fs,
    path::PathBuf,
    process::Command,
    sync::atomic::{AtomicU64, Ordering},
    thread,
};

use anyhow::{Context, Result, bail, ensure};

/// Runs `work` on a thread of its own inside a new network namespace, which disappears with it.
///
/// # Panics
/// Where `work` panics: the panic goes on in the caller.
///
/// # Errors
/// What `work` returns, and where the namespace cannot be made (needs CAP_SYS_ADMIN).
pub fn in_namespace<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: takes flags only, and changes nothing but the network namespace of this new thread.
            ensure!(unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0, "unshare: {}", std::io::Error::last_os_error());
            ip("link set lo up")?;
            work()
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// A folder with a bpffs of its own, in a mount namespace of this thread.
#[derive(Debug)]
pub struct Folder(pub PathBuf);

impl Folder {
    /// Mounts it; gone when dropped.
    ///
    /// # Errors
    /// Where the mount is refused (needs CAP_SYS_ADMIN).
    pub fn new() -> Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("edge-bpffs-{}-{number}", std::process::id()));
        fs::create_dir_all(path.join("bpf"))?;
        let target = CString::new(path.join("bpf").to_string_lossy().into_owned())?;
        let none = std::ptr::null();
        // SAFETY: affects the mounts of this thread alone once it has unshared them; the strings outlive the calls.
        let mounted = unsafe {
            libc::unshare(libc::CLONE_NEWNS) == 0
                && libc::mount(none, c"/".as_ptr(), none, libc::MS_REC | libc::MS_PRIVATE, none.cast()) == 0
                && libc::mount(c"bpf".as_ptr(), target.as_ptr(), c"bpf".as_ptr(), 0, none.cast()) == 0
        };
        ensure!(mounted, "mount a bpffs: {}", std::io::Error::last_os_error());
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Ok(target) = CString::new(self.0.join("bpf").to_string_lossy().into_owned()) {
            // SAFETY: the string outlives the call; the mount is this thread's own.
            unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
        }
        // A folder that stays behind is empty and in the temporary folder.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Runs `ip ARGUMENTS` (split at spaces) in this thread's namespace.
///
/// # Errors
/// Where `ip` cannot be run or fails; with what it said.
pub fn ip(arguments: &str) -> Result<()> {
    run("ip", arguments)
}

/// Runs a command with arguments split at spaces.
///
/// # Errors
/// As [`ip`].
pub fn run(program: &str, arguments: &str) -> Result<()> {
    let output = Command::new(program)
        .args(arguments.split_whitespace())
        .output()
        .with_context(|| format!("cannot run {program}"))?;
    if !output.status.success() {
        bail!("{program} {arguments}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// Sets `net.NAME` (slashes for dots) in this thread's namespace.
///
/// # Errors
/// Where the file cannot be written.
pub fn sysctl(name: &str, value: &str) -> Result<()> {
    let path = format!("/proc/sys/net/{name}");
    fs::write(&path, value).with_context(|| format!("cannot write {path}"))
}

/// The number of an interface of this thread's namespace.
///
/// # Errors
/// Where there is none of that name.
pub fn ifindex(name: &str) -> Result<u32> {
    let name = std::ffi::CString::new(name)?;
    // SAFETY: a valid C string that outlives the call.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    ensure!(index != 0, "no interface {name:?}: {}", std::io::Error::last_os_error());
    Ok(index)
}
