//! A network namespace that lives as long as one thread: nothing to clean up, and the default one is never touched.
#![allow(unsafe_code, reason = "unshare(2) has no safe wrapper among our dependencies")]

use std::{fs, process::Command, thread};

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
