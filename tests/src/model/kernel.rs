//! The loaded program and its maps by bare system calls: what a million packets leave time for.
#![allow(unsafe_code, reason = "bpf(2) has no safe wrapper that is fast enough: aya allocates for every call")]

use std::{
    io,
    os::fd::{AsFd, AsRawFd, RawFd},
};

use anyhow::{Context, Result, bail};
use aya::{
    Pod,
    maps::MapData,
    programs::{SchedClassifier, Xdp},
    util::nr_cpus,
};
use edge_common::{
    address::Wide,
    flow::FlowKey,
    maps::{self, Slot, name},
};

use edge_ctl::datapath::cache::Part;

use super::{
    compare::hex,
    flow::{Flow, Key},
    state::Load,
};
use crate::datapath::rig::{Action, Hook, Rig, skb_context, v6_table, xdp_context};

const LOOKUP: libc::c_long = 1;
const UPDATE: libc::c_long = 2;
const DELETE: libc::c_long = 3;
const NEXT_KEY: libc::c_long = 4;
const TEST_RUN: libc::c_long = 10;
/// `BPF_F_TEST_SKB_CHECKSUM_COMPLETE`.
const SUMMED: u32 = 1 << 2;
/// Longest frame that is run.
pub const LONGEST: usize = 2048;

/// `union bpf_attr` for elements.
#[repr(C)]
struct Element {
    map: u32,
    _pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// `union bpf_attr` for BPF_PROG_TEST_RUN.
#[repr(C)]
#[derive(Default)]
struct TestRun {
    program: u32,
    result: u32,
    size_in: u32,
    size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    context_size_in: u32,
    context_size_out: u32,
    context_in: u64,
    context_out: u64,
    flags: u32,
    cpu: u32,
    batch: u32,
    _pad: u32,
}

fn bpf<T>(command: libc::c_long, attribute: &mut T) -> io::Result<()> {
    // SAFETY: both attributes are laid out as the kernel's union for their commands, zero-filled past what they set, and
    // the addresses in them outlive the call (each caller holds the buffers).
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attribute), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A map of the loaded object.
#[derive(Clone, Copy, Debug)]
pub struct Map(RawFd);

impl Map {
    /// The map of a loaded object, which has to outlive the value.
    pub fn of(data: &MapData) -> Self {
        Self(data.fd().as_fd().as_raw_fd())
    }

    fn element<K, V>(self, command: libc::c_long, key: &K, value: *mut V) -> io::Result<()> {
        let key = std::ptr::from_ref(key) as u64;
        bpf(command, &mut Element { map: self.0 as u32, _pad: 0, key, value: value as u64, flags: 0 })
    }

    /// A value; the caller names the types that the map has.
    pub fn get<K: Pod, V: Pod + Default>(self, key: &K) -> Option<V> {
        let mut value = V::default();
        self.element(LOOKUP, key, &raw mut value).ok().map(|()| value)
    }

    /// Writes a value.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn set<K: Pod, V: Pod>(self, key: &K, value: &V) -> Result<()> {
        Ok(self.element(UPDATE, key, std::ptr::from_ref(value).cast_mut())?)
    }

    /// Takes a key out, if it is there.
    pub fn delete<K: Pod>(self, key: &K) {
        self.delete_at(std::ptr::from_ref(key).cast());
    }

    fn delete_at(self, key: *const u8) {
        // An absent key is what the caller wants.
        let _ = bpf(DELETE, &mut Element { map: self.0 as u32, _pad: 0, key: key as u64, value: 0, flags: 0 });
    }

    /// Takes a key out, if it is there, whatever its type: it must have the size of the map's keys.
    pub fn delete_bytes(self, key: &[u8]) {
        self.delete_at(key.as_ptr());
    }

    /// Every key of a hash map.
    pub fn keys<K: Pod + Default>(self) -> Vec<K> {
        let mut keys: Vec<K> = Vec::new();
        let mut next = K::default();
        loop {
            let key = keys.last().map_or(0, |key| std::ptr::from_ref(key) as u64);
            let mut attribute = Element { map: self.0 as u32, _pad: 0, key, value: &raw mut next as u64, flags: 0 };
            if bpf(NEXT_KEY, &mut attribute).is_err() {
                return keys;
            }
            keys.push(next);
        }
    }

    /// A per-CPU value as words, summed over the CPUs; empty where there is none.
    pub fn sums(self, key: u32, words: usize) -> Vec<u64> {
        let cpus = nr_cpus().unwrap_or(1);
        let mut values = vec![0u64; words * cpus];
        if self.element(LOOKUP, &key, values.as_mut_ptr()).is_err() {
            return Vec::new();
        }
        (0..words).map(|word| values.iter().skip(word).step_by(words).sum()).collect()
    }
}

/// The loaded program.
pub struct Kernel {
    /// What loaded it; keeps the descriptors open.
    pub rig: Rig,
    /// Where it runs.
    pub hook: Hook,
    program: RawFd,
    out: Vec<u8>,
}

impl Kernel {
    /// The program of a rig.
    ///
    /// # Errors
    /// Where it is not loaded.
    pub fn new(mut rig: Rig, hook: Hook) -> Result<Self> {
        let program = match hook {
            Hook::Xdp => {
                let program: &Xdp = rig.ebpf.program("edge_xdp").context("no edge_xdp")?.try_into()?;
                program.fd()?.as_fd().as_raw_fd()
            }
            Hook::Tc => {
                let program: &SchedClassifier = rig.ebpf.program("edge_tc").context("no edge_tc")?.try_into()?;
                program.fd()?.as_fd().as_raw_fd()
            }
        };
        rig.ebpf.map_mut(name::CONTROL).context("no CONTROL")?;
        Ok(Self { rig, hook, program, out: vec![0; LONGEST + 256] })
    }

    /// A map by name.
    ///
    /// # Errors
    /// Where the object has no such map.
    pub fn map(&self, name: &str) -> Result<Map> {
        use aya::maps::Map as Loaded;
        let map = match self.rig.ebpf.map(name).with_context(|| format!("no map {name}"))? {
            Loaded::Array(map)
            | Loaded::HashMap(map)
            | Loaded::LruHashMap(map)
            | Loaded::PerCpuArray(map)
            | Loaded::LpmTrie(map) => map,
            other => bail!("{name} is {other:?}"),
        };
        Ok(Map::of(map))
    }

    /// The entry of a flow, with what the cache knows of it; `table` is the IPv4 table's name.
    pub fn flow(&self, table: &str, key: &Key) -> Option<Flow> {
        if key.v6 { self.flow_of::<Wide>(table, key) } else { self.flow_of::<u32>(table, key) }
    }

    fn flow_of<A: Part>(&self, table: &str, key: &Key) -> Option<Flow>
    where
        FlowKey<A>: Pod,
        maps::Flow<A>: Pod,
        Slot<A>: Pod,
    {
        let mut flow: maps::Flow<A> = self.table(table, A::V6).ok()?.get(&key.to_map::<A>())?;
        if table == name::ESTABLISHED {
            self.rig.cache.tell(&mut flow);
        }
        Some(Flow::of_map(&flow))
    }

    /// Every key of a flow table, of both families.
    ///
    /// # Errors
    /// Where there is no such table.
    pub fn keys(&self, table: &str) -> Result<Vec<Key>> {
        let mut keys: Vec<Key> = self.table(table, false)?.keys::<FlowKey<u32>>().iter().map(Key::of_map).collect();
        keys.extend(self.table(table, true)?.keys::<FlowKey<Wide>>().iter().map(Key::of_map));
        Ok(keys)
    }

    /// A flow table of one family.
    ///
    /// # Errors
    /// Where there is no such table.
    pub fn table(&self, table: &str, v6: bool) -> Result<Map> {
        if v6 { self.map(&v6_table(table)) } else { self.map(table) }
    }

    /// Writes an entry that knows everything, as nobody but a test does.
    ///
    /// # Errors
    /// Where the kernel refuses.
    pub fn set_flow(&self, table: &str, flow: &Flow) -> Result<()> {
        if flow.key.v6 { self.set_flow_of::<Wide>(table, flow) } else { self.set_flow_of::<u32>(table, flow) }
    }

    fn set_flow_of<A: Part>(&self, table: &str, flow: &Flow) -> Result<()>
    where
        FlowKey<A>: Pod,
        maps::Flow<A>: Pod,
        Slot<A>: Pod,
    {
        let flow: maps::Flow<A> = flow.to_map();
        self.table(table, A::V6)?.set(&flow.key, &flow)?;
        if table == name::ESTABLISHED {
            self.rig.cache.forget(&flow.key);
            self.rig.cache.changed(&flow.key);
        }
        Ok(())
    }

    /// Takes an entry out as the daemon does, if it is there.
    ///
    /// # Errors
    /// Where there is no such table.
    pub fn end_flow(&self, table: &str, key: &Key) -> Result<()> {
        if key.v6 { self.end_flow_of::<Wide>(table, key) } else { self.end_flow_of::<u32>(table, key) }
    }

    fn end_flow_of<A: Part>(&self, table: &str, key: &Key) -> Result<()>
    where
        FlowKey<A>: Pod,
        Slot<A>: Pod,
    {
        let key: FlowKey<A> = key.to_map();
        self.table(table, A::V6)?.delete(&key);
        if table == name::ESTABLISHED {
            // One half that is rebuilt from the other would get back what its slots have counted; the model's gets nothing.
            self.rig.cache.uncount(&key);
            self.rig.cache.changed(&key);
        }
        Ok(())
    }

    /// What a backend has to do.
    ///
    /// # Errors
    /// Where there is no such map.
    pub fn load(&self, backend: u32) -> Result<Load> {
        Ok(Load {
            live: self.map(name::BACKEND_LIVE)?.get(&backend).unwrap_or_default(),
            expired: self.map(name::BACKEND_EXPIRED)?.get(&backend).unwrap_or_default(),
            pending: self.map(name::BACKEND_PENDING)?.get(&backend).unwrap_or_default(),
        })
    }

    /// Writes what a backend has to do.
    ///
    /// # Errors
    /// Where the kernel refuses.
    pub fn set_load(&self, backend: u32, load: &Load) -> Result<()> {
        self.map(name::BACKEND_LIVE)?.set(&backend, &load.live)?;
        self.map(name::BACKEND_EXPIRED)?.set(&backend, &load.expired)?;
        self.map(name::BACKEND_PENDING)?.set(&backend, &load.pending)
    }

    /// Runs a frame; `None` where the kernel does not run frames that short.
    ///
    /// # Errors
    /// Where it refuses for another reason, or the program answers what no entry point may.
    pub fn run(&mut self, frame: &[u8], ingress: u32, gso_size: u32) -> Result<Option<(Action, &[u8])>> {
        self.run_with(frame, ingress, gso_size, 0)
    }

    /// Runs a frame that the NIC has summed up (CHECKSUM_COMPLETE), at TC. The kernel sums it up again when the program is done,
    /// and refuses with EBADMSG where its sum is another one; EINVAL: it cannot do that (before 6.17).
    ///
    /// # Errors
    /// As [`Kernel::run`].
    pub fn run_summed(&mut self, frame: &[u8], ingress: u32) -> Result<(Action, &[u8])> {
        self.run_with(frame, ingress, 0, SUMMED)?.context("the kernel does not run so short a frame")
    }

    fn run_with(&mut self, frame: &[u8], ingress: u32, gso_size: u32, flags: u32) -> Result<Option<(Action, &[u8])>> {
        let context = match self.hook {
            Hook::Xdp => xdp_context(frame.len() as u32, ingress),
            Hook::Tc if gso_size == 0 => skb_context(ingress, 0, 0),
            Hook::Tc => skb_context(ingress, gso_size, (frame.len() as u32).div_ceil(gso_size)),
        };
        let mut attribute = TestRun {
            program: self.program as u32,
            size_in: frame.len() as u32,
            size_out: self.out.len() as u32,
            data_in: frame.as_ptr() as u64,
            data_out: self.out.as_mut_ptr() as u64,
            repeat: 1,
            context_size_in: context.len() as u32,
            context_in: context.as_ptr() as u64,
            flags,
            ..TestRun::default()
        };
        match bpf(TEST_RUN, &mut attribute) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) && too_short(frame) => return Ok(None),
            other => other
                .with_context(|| format!("test run of {} bytes at {:?}: {}", frame.len(), self.hook, hex(frame)))?,
        }
        let action = match (self.hook, attribute.result) {
            (Hook::Xdp, 1) | (Hook::Tc, 2) => Action::Drop,
            (Hook::Xdp, 2) | (Hook::Tc, 0) => Action::Pass,
            (Hook::Xdp, 3) => Action::Transmit,
            (Hook::Xdp, 4) | (Hook::Tc, 7) => Action::Redirect,
            (hook, other) => bail!("{hook:?} answers {other}"),
        };
        Ok(Some((action, &self.out[..attribute.size_out as usize])))
    }
}

/// True for what no test run takes: less than Ethernet and the IP header that its type announces.
fn too_short(frame: &[u8]) -> bool {
    frame.len() < if frame.get(12..14) == Some(&[0x86, 0xdd]) { 14 + 40 } else { 14 + 20 }
}

/// Nanoseconds of the clock that the program reads.
pub fn now() -> u64 {
    read(libc::CLOCK_MONOTONIC_COARSE)
}

/// Nanoseconds of the clock that the program stamps a flow's beginning by.
pub fn precise_now() -> u64 {
    read(libc::CLOCK_MONOTONIC)
}

fn read(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec, which outlives the call.
    unsafe { libc::clock_gettime(clock, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}
