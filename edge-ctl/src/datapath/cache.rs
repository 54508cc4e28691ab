//! The flow cache from the daemon's side: how it is split over CPUs, what its slots have counted and their entries do not know
//! yet, and telling the program that an established entry has changed.

use std::{
    mem::{offset_of, size_of},
    os::fd::{AsFd as _, BorrowedFd},
    sync::atomic::Ordering,
};

use aya::{
    Pod,
    maps::{MapData, MapError},
};
use edge_common::{
    address::{Address, Wide, unmapped},
    flow::FlowKey,
    maps::{
        CACHE_CPUS, CacheSet, CacheWindow, Flow, FlowEnd, Generations, Slot, WAYS, bucket, name, place_of, set_of,
        window,
    },
};

use super::{
    pins::{Pins, chain},
    sys::{
        monotonic_ns, open_pin,
        shared::{SharedArray, wait_for_programs},
        tick_ns,
    },
};
use crate::reconcile::ports::PortError;

/// An address family's cache, and its part of a window.
pub trait Part: Address + Sized {
    /// Of a window.
    fn part(window: &CacheWindow) -> u64;
    /// The slots.
    fn array(cache: &FlowCache) -> &SharedArray;
}

impl Part for u32 {
    fn part(window: &CacheWindow) -> u64 {
        window.v4
    }

    fn array(cache: &FlowCache) -> &SharedArray {
        &cache.v4
    }
}

impl Part for Wide {
    fn part(window: &CacheWindow) -> u64 {
        window.v6
    }

    fn array(cache: &FlowCache) -> &SharedArray {
        &cache.v6
    }
}

/// Counters of one CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuCache {
    /// CPU number.
    pub cpu: u32,
    /// Bytes of its part, of both families.
    pub bytes: u64,
    /// Packets served from a slot.
    pub hits: u64,
    /// Packets of established flows that asked the table.
    pub misses: u64,
    /// Slots given to another flow.
    pub displaced: u64,
    /// Lookups for telling entries what displaced slots had counted.
    pub told: u64,
}

/// The mapped maps.
#[derive(Debug)]
pub struct FlowCache {
    v4: SharedArray,
    v6: SharedArray,
    windows: SharedArray,
    generations: SharedArray,
    sets: [u32; 2],
    /// CPUs that this machine may have.
    cpus: u32,
}

impl FlowCache {
    /// Opens the pins.
    ///
    /// # Errors
    /// Where one is missing, or cannot be mapped.
    pub fn open(pins: &Pins) -> Result<Self, PortError> {
        Self::from_pins(pins, true)
    }

    /// As [`FlowCache::open`], for reading only.
    ///
    /// # Errors
    /// As [`FlowCache::open`].
    pub fn read(pins: &Pins) -> Result<Self, PortError> {
        Self::from_pins(pins, false)
    }

    fn from_pins(pins: &Pins, write: bool) -> Result<Self, PortError> {
        let open = |map: &str| {
            let failed = |error: MapError| PortError::new(format!("opening the map {map}"), chain(&error));
            // A mapping of what was opened for reading only is not a shared one to the kernel, which refuses it for maps.
            let fd = open_pin(&pins.map(map), false)
                .map_err(|error| PortError::new(format!("opening the map {map}"), error))?;
            let data = MapData::from_fd(fd).map_err(failed)?;
            let entries = data.info().map_err(failed)?.max_entries();
            Ok((data, entries))
        };
        let [v4, v6] = [open(name::FLOW_CACHE)?, open(name::FLOW_CACHE_V6)?];
        let [windows, generations] = [open(name::CACHE_WINDOWS)?, open(name::FLOW_GENERATIONS)?];
        let fds = [&v4, &v6, &windows, &generations].map(|(data, _)| data.fd().as_fd());
        Self::map(fds, [v4.1, v6.1], write)
    }

    /// Maps the four maps: both caches of so many sets, windows and generations.
    ///
    /// # Errors
    /// Where one cannot be mapped.
    pub fn map(fds: [BorrowedFd<'_>; 4], sets: [u32; 2], write: bool) -> Result<Self, PortError> {
        let [v4, v6, windows, generations] = fds;
        let map = |name: &str, fd: BorrowedFd<'_>, elements: u32, size: usize| {
            let bytes = (elements as usize).saturating_mul(size);
            SharedArray::new(fd, bytes, write).map_err(|error| PortError::new(format!("mapping the map {name}"), error))
        };
        Ok(Self {
            v4: map(name::FLOW_CACHE, v4, sets[0], size_of::<CacheSet<u32>>())?,
            v6: map(name::FLOW_CACHE_V6, v6, sets[1], size_of::<CacheSet<Wide>>())?,
            windows: map(name::CACHE_WINDOWS, windows, CACHE_CPUS, size_of::<CacheWindow>())?,
            generations: map(name::FLOW_GENERATIONS, generations, 1, size_of::<Generations>())?,
            sets,
            cpus: aya::util::nr_cpus()
                .ok()
                .and_then(|cpus| u32::try_from(cpus).ok())
                .unwrap_or(CACHE_CPUS)
                .min(CACHE_CPUS),
        })
    }

    /// Makes every copy of an established entry stale. To be called after each change and removal: the program looks at the
    /// generation first and at the entry afterwards.
    pub fn changed<A: Address>(&self, key: &FlowKey<A>) {
        if let Some(generation) = self.generations.word(bucket(place_of(key)) * size_of::<u32>()) {
            generation.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Adds to an established entry what its slots have counted, on every CPU.
    pub fn tell<A: Part>(&self, flow: &mut Flow<A>)
    where
        Slot<A>: Pod,
    {
        let now = monotonic_ns();
        let words = A::words(&flow.key);
        let place = place_of(&flow.key);
        for cpu in 0..self.cpus {
            let Some(window) = self.window(cpu) else { continue };
            for slot in self.set::<A>(&window, place).into_iter().flatten() {
                if slot.is_of(&words) {
                    slot.tell(flow, now);
                }
            }
        }
    }

    /// Adds to the record of a flow that a packet ended what slots of other CPUs than that packet's had counted.
    pub fn complete(&self, record: &mut FlowEnd) {
        let ends = [record.client, record.vip, record.source, record.target];
        match ends.map(|address| unmapped(&address)) {
            [Some(client), Some(vip), Some(source), Some(target)] => {
                self.complete_for(record, [client, vip, source, target]);
            }
            _ => self.complete_for(record, ends),
        }
    }

    fn complete_for<A: Part>(&self, record: &mut FlowEnd, [client, vip, source, target]: [A; 4])
    where
        Slot<A>: Pod,
    {
        let (protocol, created) = (record.protocol, record.created);
        let half = |key| {
            let mut half = Flow { key, created, ..Flow::<A>::default() };
            self.tell(&mut half);
            half
        };
        let forward = half(FlowKey::new(client, vip, record.client_port, record.vip_port, protocol));
        let reply = half(FlowKey::new(target, source, record.target_port, record.source_port, protocol));
        record.packets_in += forward.packets;
        record.bytes_in += forward.bytes;
        record.packets_out += reply.packets;
        record.bytes_out += reply.bytes;
        record.last_reply = record.last_reply.max(reply.last_seen);
    }

    fn set<A: Part>(&self, window: &CacheWindow, place: u64) -> Option<[Slot<A>; WAYS]>
    where
        Slot<A>: Pod,
    {
        let part = A::part(window);
        if part == 0 {
            return None;
        }
        let offset = set_of(part, place) as usize * size_of::<CacheSet<A>>();
        let read = |way: usize| A::array(self).read::<Slot<A>>(offset + way * size_of::<Slot<A>>());
        let mut ways = [Slot::default(); WAYS];
        for (way, slot) in ways.iter_mut().enumerate() {
            *slot = read(way)?;
        }
        Some(ways)
    }

    /// A CPU's window, if it has a part or has counted anything.
    fn window(&self, cpu: u32) -> Option<CacheWindow> {
        let window: CacheWindow = self.windows.read(cpu as usize * size_of::<CacheWindow>())?;
        (CacheWindow { tick: 0, clock: 0, ..window } != CacheWindow::default()).then_some(window)
    }

    /// The CPUs that have a part or have seen packets of established flows.
    pub fn cpus(&self) -> Vec<CpuCache> {
        let bytes = |part: u64, set: usize| (part >> 32) * set as u64;
        let row = |cpu: u32| {
            let window = self.window(cpu)?;
            Some(CpuCache {
                cpu,
                bytes: bytes(window.v4, size_of::<CacheSet<u32>>()) + bytes(window.v6, size_of::<CacheSet<Wide>>()),
                hits: window.hits,
                misses: window.misses,
                displaced: window.displaced,
                told: window.told,
            })
        };
        (0..self.cpus).filter_map(row).collect()
    }

    /// The CPUs that have a part.
    pub fn split_over(&self) -> Vec<u32> {
        self.cpus().into_iter().filter(|cpu| cpu.bytes != 0).map(|cpu| cpu.cpu).collect()
    }

    /// Splits the cache over all CPUs that are running, where nobody has a part yet; true where that changed something.
    ///
    /// # Errors
    /// As [`FlowCache::split`], and where the CPUs are not known.
    pub fn split_first(&self, on: bool) -> Result<bool, PortError> {
        let before = self.split_over();
        match (on, before.is_empty()) {
            (true, true) => {
                let cpus = aya::util::online_cpus();
                let cpus = cpus.map_err(|(_, error)| PortError::new("listing the CPUs", error))?;
                self.split(&cpus)?;
                Ok(true)
            }
            (false, false) => self.split(&[]).map(|()| true),
            _ => Ok(false),
        }
    }

    /// Gives each of `cpus` an equal part of all sets, and nobody else one. Slots that come to another CPU stay what they are:
    /// copies with a generation. Between its two halves every packet asks the tables.
    ///
    /// # Errors
    /// Where the kernel cannot say that no program uses the old parts any more; there is no cache then.
    pub fn split(&self, cpus: &[u32]) -> Result<(), PortError> {
        for cpu in 0..self.cpus {
            self.set_window(cpu, 0, 0);
        }
        wait_for_programs().map_err(|error| PortError::new("waiting for running programs", error))?;
        let each = |sets: u32| sets / u32::try_from(cpus.len()).unwrap_or(u32::MAX).max(1);
        let [v4, v6] = self.sets.map(each);
        let tick = tick_ns();
        for (index, cpu) in (0u32..).zip(cpus) {
            self.set_long(*cpu, offset_of!(CacheWindow, tick), tick);
            let part = |sets: u32| if sets == 0 { 0 } else { window(index * sets, sets) };
            self.set_window(*cpu, part(v4), part(v6));
        }
        Ok(())
    }

    fn set_window(&self, cpu: u32, v4: u64, v6: u64) {
        self.set_long(cpu, offset_of!(CacheWindow, v4), v4);
        self.set_long(cpu, offset_of!(CacheWindow, v6), v6);
    }

    /// Writes a field of a CPU's window where it is another.
    fn set_long(&self, cpu: u32, field: usize, value: u64) {
        if let Some(field) = self.windows.long(cpu as usize * size_of::<CacheWindow>() + field)
            && field.load(Ordering::Relaxed) != value
        {
            field.store(value, Ordering::Release);
        }
    }

    /// Takes the slots of a key out, on every CPU. For tests, while no program runs.
    pub fn forget<A: Part>(&self, key: &FlowKey<A>)
    where
        Slot<A>: Pod,
    {
        self.rewrite(key, |_| Slot::default());
    }

    /// Takes what the slots of a key have counted out of them, on every CPU, and leaves the slots. For tests, while no
    /// program runs.
    pub fn uncount<A: Part>(&self, key: &FlowKey<A>)
    where
        Slot<A>: Pod,
    {
        self.rewrite(key, |slot| Slot { packets: 0, bytes: 0, ..slot });
    }

    fn rewrite<A: Part>(&self, key: &FlowKey<A>, change: impl Fn(Slot<A>) -> Slot<A>)
    where
        Slot<A>: Pod,
    {
        let (place, words) = (place_of(key), A::words(key));
        for window in (0..self.cpus).filter_map(|cpu| self.window(cpu)) {
            let offset = set_of(A::part(&window), place) as usize * size_of::<CacheSet<A>>();
            for (way, slot) in self.set::<A>(&window, place).into_iter().flatten().enumerate() {
                if slot.is_of(&words) {
                    A::array(self).write(offset + way * size_of::<Slot<A>>(), change(slot));
                }
            }
        }
    }

    /// Takes every slot out, after telling `visit` its contents. For tests, while no program runs.
    pub fn drain<A: Part>(&self, mut visit: impl FnMut(&Slot<A>))
    where
        Slot<A>: Pod,
    {
        let sets = if A::V6 { self.sets[1] } else { self.sets[0] };
        for slot in 0..sets as usize * WAYS {
            let offset = slot * size_of::<Slot<A>>();
            let Some(found) = A::array(self).read::<Slot<A>>(offset) else { continue };
            if !found.is_empty() {
                visit(&found);
                A::array(self).write(offset, Slot::<A>::default());
            }
        }
    }
}
