//! The stages of a hook: programs that its entry program hands packets to by tail calls, through the slots of a map.
//!
//! The slots of a `PROG_ARRAY` are emptied when its last descriptor and pin are gone, so it is pinned, under the name of the
//! object that its programs come from: an entry program never meets stages of another version, since it was loaded with its
//! own map. The entry program is pinned last, and so stands for stages that are complete; slots without it are a start that
//! did not get that far, or of programs whose maps are gone. Those are set aside rather than removed, since a link may run
//! the entry program that uses them until it is switched over. What was set aside ends with the pins of earlier versions.

use std::{
    collections::BTreeSet,
    fs, io,
    num::NonZero,
    sync::{Mutex, PoisonError},
    thread,
};

use aya::{
    Ebpf,
    maps::ProgramArray,
    programs::{Program, ProgramError, ProgramFd},
};
use edge_common::maps::stages::{ALL, STAGES_TC, STAGES_XDP};

use super::{
    attach::{TC_PROGRAM, XDP_PROGRAM},
    loader::LoadError,
    pins::{Pins, chain},
};

/// The map with the slots of a hook's stages.
pub const fn map(xdp: bool) -> &'static str {
    if xdp { STAGES_XDP } else { STAGES_TC }
}

/// The name of a hook's entry program.
pub const fn entry(xdp: bool) -> &'static str {
    if xdp { XDP_PROGRAM } else { TC_PROGRAM }
}

/// Loads a hook's stages, and its entry program where `whole`, and puts each stage into its slot. Whoever keeps the object
/// keeps the slots filled; so does a pin.
///
/// # Errors
/// Where the object lacks a stage or the map, or the kernel refuses one.
pub fn fill(ebpf: &mut Ebpf, xdp: bool, whole: bool) -> Result<(), LoadError> {
    let stages: Vec<(u32, String)> =
        ALL.iter().map(|(slot, stage)| (*slot, format!("{}_{stage}", entry(xdp)))).collect();
    let own = whole.then(|| entry(xdp).to_owned());
    load_all(ebpf, &stages.iter().map(|(_, name)| name.clone()).chain(own).collect())?;
    for (slot, name) in stages {
        let program = loaded(ebpf, &name)?;
        let what = format!("putting {name} into {}", map(xdp));
        let refused = |error: &dyn std::error::Error| LoadError::Object { what: what.clone(), reason: chain(error) };
        let slots = ebpf.map_mut(map(xdp)).ok_or_else(|| LoadError::Object {
            what: what.clone(),
            reason: "the eBPF object does not have the map".to_owned(),
        })?;
        let mut slots = ProgramArray::try_from(slots).map_err(|error| refused(&error))?;
        slots.set(slot, &program, 0).map_err(|error| refused(&error))?;
    }
    Ok(())
}

/// Programs verified at a time, at most: more CPUs are of no use, since the longest takes a good part of the whole.
const VERIFIED_AT_A_TIME: usize = 4;

/// Loads these programs, each CPU one at a time: the kernel verifies those of privileged processes without a lock.
fn load_all(ebpf: &mut Ebpf, names: &BTreeSet<String>) -> Result<(), LoadError> {
    if let Some(name) = names.iter().find(|name| ebpf.program(name).is_none()) {
        return Err(refusal(name, "the eBPF object does not have it".to_owned()));
    }
    let cpus = thread::available_parallelism().map_or(1, NonZero::get);
    let waiting = Mutex::new(ebpf.programs_mut().filter(|(name, _)| names.contains(*name)));
    let next = || waiting.lock().unwrap_or_else(PoisonError::into_inner).next();
    let work = || {
        while let Some((name, program)) = next() {
            verify(name, program)?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let others: Vec<_> = (1..cpus.min(VERIFIED_AT_A_TIME)).map(|_| scope.spawn(work)).collect();
        let mut result = work();
        for other in others {
            result = result.and(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
        result
    })
}

/// Loads a program by its name in the object.
///
/// # Errors
/// Where the object lacks it, or the kernel refuses it.
pub fn load(ebpf: &mut Ebpf, name: &str) -> Result<ProgramFd, LoadError> {
    let program = ebpf.program_mut(name);
    verify(name, program.ok_or_else(|| refusal(name, "the eBPF object does not have it".to_owned()))?)?;
    loaded(ebpf, name)
}

fn refusal(name: &str, reason: String) -> LoadError {
    LoadError::Object { what: format!("loading the program {name}"), reason }
}

fn verify(name: &str, program: &mut Program) -> Result<(), LoadError> {
    match program {
        Program::Xdp(program) => retry_interrupted(|| program.load(), load_interrupted),
        Program::SchedClassifier(program) => retry_interrupted(|| program.load(), load_interrupted),
        _ => return Err(refusal(name, "it has another program type".to_owned())),
    }
    .map_err(|error| refusal(name, chain(&error)))
}

/// The descriptor of a loaded program.
fn loaded(ebpf: &Ebpf, name: &str) -> Result<ProgramFd, LoadError> {
    let program = ebpf.program(name).ok_or_else(|| refusal(name, "the eBPF object does not have it".to_owned()))?;
    let fd = program.fd().map_err(|error| refusal(name, chain(&error)))?;
    fd.try_clone().map_err(|error| refusal(name, error.to_string()))
}

/// Sets the slots and the entry program of this object aside, whichever of them are pinned.
///
/// # Errors
/// Where bpffs refuses.
pub fn set_aside(pins: &Pins, xdp: bool) -> io::Result<()> {
    let entry = pins.program(entry(xdp));
    if entry.exists() {
        // First, so that it never stands for slots that are not there.
        fs::remove_file(&entry)?;
    }
    let slots = pins.stages(map(xdp));
    if !slots.exists() {
        return Ok(());
    }
    let aside = (0_u32..).map(|number| pins.stages_aside(map(xdp), number)).find(|path| !path.exists());
    aside.map_or(Ok(()), |aside| fs::rename(&slots, aside))
}

/// Times that loading a program is tried.
const LOAD_ATTEMPTS: u32 = 10;

/// Loads again where the kernel gave the verification up because a signal was pending (EAGAIN): a runtime's timer or a
/// child that ends is enough, and aya passes the error on. Bounded, as in libbpf, should it ever mean something else.
fn retry_interrupted<E>(mut load: impl FnMut() -> Result<(), E>, interrupted: impl Fn(&E) -> bool) -> Result<(), E> {
    for _ in 1..LOAD_ATTEMPTS {
        match load() {
            Err(error) if interrupted(&error) => {}
            result => return result,
        }
    }
    load()
}

fn load_interrupted(error: &ProgramError) -> bool {
    matches!(error, ProgramError::LoadError { io_error, .. } if is_interruption(io_error))
}

fn is_interruption(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Calls of a load that fails with these errors, in turn, before it succeeds; and how it ended.
    fn load_failing_with(errors: &[i32]) -> (usize, io::Result<()>) {
        let mut calls = 0;
        let load = || {
            calls += 1;
            errors.get(calls - 1).map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(*errno)))
        };
        let result = retry_interrupted(load, is_interruption);
        (calls, result)
    }

    #[test]
    fn a_load_given_up_for_a_signal_is_tried_again_and_one_refused_is_not() {
        assert!(matches!(load_failing_with(&[libc::EAGAIN, libc::EINTR]), (3, Ok(()))));
        assert!(matches!(load_failing_with(&[libc::EACCES]), (1, Err(_))));
        assert!(matches!(load_failing_with(&[libc::EAGAIN; 100]), (10, Err(_))));
    }
}
