//! Other flows that come and go while some are measured.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use anyhow::Result;
use aya::maps::{HashMap, Map, MapData};
use edge_common::{
    flow::{FlowKey, FlowKeyV4, TCP},
    maps::{FlowV4, name},
};
use edge_ctl::datapath::cache::FlowCache;

use crate::datapath::rig::{Rig, map_cache};

/// Flows that are opened and closed on another thread, as the daemon would see them: both halves into the established table,
/// both out of it, and both buckets' generations.
pub struct Beside {
    stop: std::sync::Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Beside {
    /// So many flows per second.
    pub fn start(rig: &Rig, rate: u32) -> Result<Self> {
        let cache = map_cache(&rig.ebpf)?;
        let Some(Map::HashMap(established)) = rig.ebpf.map(name::ESTABLISHED) else {
            anyhow::bail!("no established table");
        };
        let fd = std::os::fd::AsFd::as_fd(established.fd()).try_clone_to_owned()?;
        let mut table: HashMap<MapData, FlowKeyV4, FlowV4> = Map::HashMap(MapData::from_fd(fd)?).try_into()?;
        let stop = std::sync::Arc::new(AtomicBool::new(false));
        let stopped = std::sync::Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let start = Instant::now();
            for n in 0.. {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                churn(&mut table, &cache, n);
                let due = Duration::from_secs(1) * n / rate;
                // Behind where the machine is busy; then it catches up.
                let early = due.saturating_sub(start.elapsed());
                // A sleep takes longer than a flow does.
                if early > Duration::from_millis(1) {
                    std::thread::sleep(early);
                }
            }
        });
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic there is seen by the figures' own checks.
            let _ = thread.join();
        }
    }
}

fn churn(table: &mut HashMap<MapData, FlowKeyV4, FlowV4>, cache: &FlowCache, n: u32) {
    let key: FlowKeyV4 = FlowKey::new(n.wrapping_mul(0x9e37_79b1), 0x0a0a_0a0a, n as u16, 443_u16.to_be(), TCP);
    for key in [key, key.reversed()] {
        let _ = table.insert(key, FlowV4 { key, ..FlowV4::default() }, 0);
    }
    for key in [key, key.reversed()] {
        let _ = table.remove(&key);
        cache.changed(&key);
    }
}
