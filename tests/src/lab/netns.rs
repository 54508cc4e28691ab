//! Network namespaces: entering them from threads and child processes, and finding who lives in them. All system
//! calls of the lab that need `unsafe` are here.
//!
//! Only the network namespace is entered (setns), not a mount namespace as `ip netns exec` does: that would remount
//! /sys and hide the bpffs.
#![allow(unsafe_code, reason = "setns, setsid and kill have no safe wrapper in the dependencies of this crate")]

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    os::{fd::AsRawFd, unix::fs::MetadataExt, unix::process::CommandExt},
    path::PathBuf,
    process::Command,
    thread,
};

use anyhow::{Context, Result, anyhow};

/// The file that names a namespace made by `ip netns add`.
pub fn path(name: &str) -> PathBuf {
    PathBuf::from("/run/netns").join(name)
}

fn open(name: &str) -> Result<File> {
    let path = path(name);
    File::open(&path).with_context(|| format!("open the network namespace {}", path.display()))
}

fn enter(file: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: setns reads no memory of ours; the descriptor is open for the length of the call.
    match unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Runs `work` on a fresh thread inside the namespace and returns its result. Sockets it makes stay in the namespace
/// when they are handed out.
///
/// # Errors
/// Where the namespace is missing, may not be entered, or `work` fails or panics.
pub fn within<T: Send>(name: &str, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let file = open(name)?;
    thread::scope(|scope| {
        scope
            .spawn(|| {
                enter(&file).with_context(|| format!("enter the network namespace {name}"))?;
                work()
            })
            .join()
            .map_err(|_| anyhow!("the work inside namespace {name} panicked"))?
    })
}

/// Makes `command` start inside the namespace, in a session of its own so that Ctrl-C at the terminal reaches only
/// the program that cleans up.
///
/// # Errors
/// Where the namespace is missing.
pub fn start_inside(command: &mut Command, name: &str, own_session: bool) -> Result<()> {
    let file = open(name)?;
    // SAFETY: between fork and exec only setns and setsid are called, both async-signal-safe.
    unsafe {
        command.pre_exec(move || {
            enter(&file)?;
            if own_session && libc::setsid() < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
    Ok(())
}

/// Sends a signal to one process; a process that is gone already is no error.
///
/// # Errors
/// Where the kernel refuses.
pub fn signal(pid: u32, signal: i32) -> Result<()> {
    let pid = i32::try_from(pid).context("process id")?;
    // SAFETY: kill takes plain numbers.
    if unsafe { libc::kill(pid, signal) } == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::ESRCH) { Ok(()) } else { Err(error).context(format!("signal process {pid}")) }
}

/// True where the process runs: it exists and is not a zombie that nobody has waited for yet.
pub fn running(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z')))
}

/// True where this process may make namespaces.
pub fn effective_user_is_root() -> bool {
    // SAFETY: geteuid takes nothing and cannot fail.
    unsafe { libc::geteuid() == 0 }
}

/// Lets this process, and what it starts, hold as many open files as the administrator allows: a thousand connections
/// do not fit into the usual soft limit of 1,024. Where that fails the old limit stays.
pub fn raise_file_limit() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: getrlimit writes to the one struct it is given.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } == 0 {
        limit.rlim_cur = limit.rlim_max;
        // SAFETY: setrlimit only reads the struct.
        unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) };
    }
}

/// The processes whose network namespace is one of these, this process excepted.
pub fn processes<'a>(names: impl Iterator<Item = &'a str>) -> BTreeSet<u32> {
    let inodes: BTreeSet<u64> = names.filter_map(|name| Some(fs::metadata(path(name)).ok()?.ino())).collect();
    let Ok(entries) = fs::read_dir("/proc") else { return BTreeSet::new() };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| *pid != std::process::id())
        .filter(|pid| fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|found| inodes.contains(&found.ino())))
        .collect()
}
