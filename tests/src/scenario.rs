//! What the scenario tests share: judging traffic that runs while something changes.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context, Result, anyhow, ensure};

use crate::lab::client::{Echo, exchange_all};

/// A stall shorter than this is the machine's own: half of TCP's shortest retransmission timeout.
const NOISE: Duration = Duration::from_millis(100);

/// Connections that exchange lines without pause on a thread of their own: those under test, and as a control others
/// that are only routed.
#[derive(Debug)]
pub struct Traffic {
    connections: Arc<Mutex<Connections>>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Stalls>>,
}

#[derive(Debug, Default)]
struct Connections {
    tested: Vec<Echo>,
    control: Vec<Echo>,
}

/// The longest exchange of each kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stalls {
    /// Of the connections under test.
    pub tested: Duration,
    /// Of the routed ones.
    pub control: Duration,
    /// Rounds over all connections.
    pub rounds: u64,
}

impl Traffic {
    /// Starts exchanging.
    pub fn start(tested: Vec<Echo>, control: Vec<Echo>) -> Self {
        let connections = Arc::new(Mutex::new(Connections { tested, control }));
        let stop = Arc::new(AtomicBool::new(false));
        let (shared, stopped) = (Arc::clone(&connections), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            let mut stalls = Stalls::default();
            while !stopped.load(Ordering::Relaxed) {
                let mut connections = shared.lock().unwrap_or_else(PoisonError::into_inner);
                let tested = exchange_all(&mut connections.tested).context("under test")?;
                let control = exchange_all(&mut connections.control).context("routed control")?;
                drop(connections);
                stalls.tested = stalls.tested.max(tested);
                stalls.control = stalls.control.max(control);
                stalls.rounds += 1;
                // Lets others have the lock.
                thread::yield_now();
            }
            Ok(stalls)
        });
        Self { connections, stop, thread }
    }

    /// Adds connections under test.
    pub fn add(&self, more: Vec<Echo>) {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner).tested.extend(more);
    }

    /// Stops, and tells the longest stalls.
    ///
    /// # Errors
    /// Where a connection was reset, closed, or stalled for seconds.
    pub fn stop(self) -> Result<Stalls> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("the traffic's thread panicked"))?
    }
}

impl Stalls {
    /// Requires that connections under test never waited longer than twice what the control shows, noise aside.
    ///
    /// # Errors
    /// Where they did.
    pub fn compare(self) -> Result<()> {
        let allowed = self.control.max(NOISE) * 2;
        ensure!(self.rounds > 0, "no round of exchanges was completed");
        ensure!(self.tested <= allowed, "stalled for {:?}, plain routing for {:?}", self.tested, self.control);
        Ok(())
    }
}

/// Returns from a test, saying so, where namespaces cannot be made.
#[macro_export]
macro_rules! needs_namespaces {
    ($name:literal) => {
        if let Some(reason) = $crate::skip::namespaces_missing() {
            $crate::skip::skipped($name, reason);
            return Ok(());
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stall_beyond_twice_the_controls_fails_and_one_within_noise_passes() {
        let stalls = |tested, control| Stalls {
            tested: Duration::from_millis(tested),
            control: Duration::from_millis(control),
            rounds: 1,
        };
        assert!(stalls(150, 3).compare().is_ok());
        assert!(stalls(250, 3).compare().is_err());
        assert!(stalls(250, 130).compare().is_ok());
        assert!(Stalls { rounds: 0, ..stalls(1, 1) }.compare().is_err());
    }
}
