//! Which CPU a test run happens on: the calling thread's, since most program types let nobody choose.
#![allow(unsafe_code, reason = "sched_setaffinity(2) has no safe wrapper here")]

use std::{io, mem::MaybeUninit};

use anyhow::{Context, Result};

/// The CPUs that this process may run on.
///
/// # Errors
/// Those of sched_getaffinity(2).
pub fn allowed() -> Result<Vec<u32>> {
    let mask = read()?;
    // SAFETY: the set was filled by the kernel, and the numbers are below its size.
    Ok((0..libc::CPU_SETSIZE as u32).filter(|cpu| unsafe { libc::CPU_ISSET(*cpu as usize, &mask) }).collect())
}

/// Does something on one CPU, and lets the thread go back to where it may run otherwise.
///
/// # Errors
/// Where the thread may not run there, and what `act` returns.
pub fn on<T>(cpu: u32, act: impl FnOnce() -> Result<T>) -> Result<T> {
    let before = read()?;
    // SAFETY: all zeroes is an empty set, and CPU_SET checks the number.
    let one = unsafe {
        let mut one: libc::cpu_set_t = MaybeUninit::zeroed().assume_init();
        libc::CPU_SET(cpu as usize, &mut one);
        one
    };
    write(&one).with_context(|| format!("run on CPU {cpu}"))?;
    let result = act();
    write(&before)?;
    result
}

fn read() -> Result<libc::cpu_set_t> {
    // SAFETY: all zeroes is an empty set; the kernel writes at most the size given.
    let (result, mask) = unsafe {
        let mut mask: libc::cpu_set_t = MaybeUninit::zeroed().assume_init();
        (libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut mask), mask)
    };
    if result != 0 { Err(io::Error::last_os_error()).context("sched_getaffinity") } else { Ok(mask) }
}

fn write(mask: &libc::cpu_set_t) -> Result<()> {
    // SAFETY: reads a set of the size given.
    let result = unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), mask) };
    if result != 0 { Err(io::Error::last_os_error()).context("sched_setaffinity") } else { Ok(()) }
}
