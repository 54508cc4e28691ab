//! Reads captured packets out of the program's perf buffers. Whoever opens them takes them from whoever had them before;
//! the kernel takes them away when the reader goes.

use std::{os::fd::AsRawFd as _, time::Duration};

use aya::maps::{MapData, PerfEventArray, perf::PerfEvent, perf::PerfEventArrayBuffer};
use edge_common::maps::{
    capture::{CaptureHeader, side},
    name,
};

use super::{
    events::Clock,
    pins::{Pins, chain, open},
    sys::{from_bytes, wait_readable},
};
use crate::{
    model::capture::{Frame, Tap},
    reconcile::ports::PortError,
};

/// Pages of each CPU's buffer: 256 KiB.
const PAGES: usize = 64;

/// The reader.
pub struct PerfTap {
    buffers: Vec<PerfEventArrayBuffer<MapData>>,
    // Entries of the map live as long as it is open here.
    _map: PerfEventArray<MapData>,
}

impl PerfTap {
    /// Opens a buffer for each CPU.
    ///
    /// # Errors
    /// Where the map is not pinned, or the buffers may not be opened (CAP_PERFMON, CAP_BPF).
    pub fn open(pins: &Pins) -> Result<Self, PortError> {
        let what = "opening the capture's buffers";
        let mut map: PerfEventArray<MapData> = open(pins, name::CAPTURE)?;
        let cpus = aya::util::online_cpus().map_err(|(_, error)| PortError::new(what, error))?;
        let buffers = cpus.into_iter().map(|cpu| map.open(cpu, Some(PAGES))).collect::<Result<_, _>>();
        Ok(Self { buffers: buffers.map_err(|error| PortError::new(what, chain(&error)))?, _map: map })
    }
}

impl Tap for PerfTap {
    fn take(&mut self, wait: Duration, visit: &mut dyn FnMut(Frame)) -> Result<u64, String> {
        // A buffer that fills wakes nobody else: each is looked at after a share of the time.
        let share = wait / u32::try_from(self.buffers.len()).unwrap_or(1).max(1);
        let (clock, mut lost) = (Clock::now(), 0);
        for buffer in &mut self.buffers {
            if !buffer.readable() {
                wait_readable(buffer.as_raw_fd(), share).map_err(|error| error.to_string())?;
            }
            buffer.for_each(|event| match event {
                PerfEvent::Sample { head, tail } => {
                    if let Some(frame) = frame([head, tail].concat(), &clock) {
                        visit(frame);
                    }
                }
                PerfEvent::Lost { count } => lost += count,
            });
        }
        Ok(lost)
    }
}

fn frame(mut sample: Vec<u8>, clock: &Clock) -> Option<Frame> {
    let header: CaptureHeader = from_bytes(&sample)?;
    let start = size_of::<CaptureHeader>();
    let end = start.checked_add(usize::try_from(header.captured).ok()?)?;
    // The kernel pads samples.
    sample.truncate(end);
    let bytes = sample.split_off(start.min(sample.len()));
    Some(Frame { after: header.side == side::AFTER, time: clock.wall(header.time), length: header.length, bytes })
}
