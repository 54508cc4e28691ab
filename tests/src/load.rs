//! Constant load: connections that arrive steadily, live for a while, and end by themselves; what became of each.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow};

use crate::lab::{Lab, client::Echo, netns};

/// Between two lines on a connection.
const LINE: Duration = Duration::from_millis(50);

/// One connection that was opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// When its SYN was sent.
    pub at: Instant,
    /// The pod that answered.
    pub pod: String,
}

/// What became of all connections.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Connections that were opened, in no order.
    pub arrivals: Vec<Arrival>,
    /// Connections that could not be opened.
    pub failed: Vec<String>,
    /// Connections that were reset, closed or stalled for seconds.
    pub broken: Vec<String>,
    /// Lines that came back.
    pub lines: u64,
    /// The longest that one took.
    pub longest: Duration,
}

/// Load that runs until it is stopped.
#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    reached: Arc<Mutex<BTreeSet<String>>>,
    workers: Vec<JoinHandle<Result<Outcome>>>,
}

impl Load {
    /// Starts `workers` clients in a host, each of which opens connection after connection to `server` and exchanges
    /// `lines` lines on each.
    pub fn start(lab: &Lab, host: &str, server: SocketAddr, workers: usize, lines: u32) -> Self {
        let (stop, reached) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(BTreeSet::new())));
        let namespace = lab.namespace(host);
        let worker = |_| {
            let (stop, reached, namespace) = (Arc::clone(&stop), Arc::clone(&reached), namespace.clone());
            thread::spawn(move || netns::within(&namespace, || Ok(work(server, lines, &stop, &reached))))
        };
        let workers = (0..workers).map(worker).collect();
        Self { stop, reached, workers }
    }

    /// Whether a connection has come to this pod since the start.
    pub fn has_reached(&self, pod: &str) -> bool {
        self.reached.lock().unwrap_or_else(PoisonError::into_inner).contains(pod)
    }

    /// Ends it, and tells what became of all connections since the start.
    ///
    /// # Errors
    /// Where a client could not run at all.
    pub fn stop(self) -> Result<Outcome> {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Outcome::default();
        for worker in self.workers {
            let mut one = worker.join().map_err(|_| anyhow!("a client of the load panicked"))?.context("a client")?;
            all.arrivals.append(&mut one.arrivals);
            all.failed.append(&mut one.failed);
            all.broken.append(&mut one.broken);
            all.lines += one.lines;
            all.longest = all.longest.max(one.longest);
        }
        Ok(all)
    }
}

fn work(server: SocketAddr, lines: u32, stop: &AtomicBool, reached: &Mutex<BTreeSet<String>>) -> Outcome {
    let mut outcome = Outcome::default();
    while !stop.load(Ordering::Relaxed) {
        let at = Instant::now();
        match Echo::open(server) {
            Ok(mut echo) => {
                reached.lock().unwrap_or_else(PoisonError::into_inner).insert(echo.pod.clone());
                outcome.arrivals.push(Arrival { at, pod: echo.pod.clone() });
                if let Err(error) = talk(&mut echo, lines, &mut outcome) {
                    outcome.broken.push(format!("{error:#}"));
                }
            }
            Err(error) => outcome.failed.push(format!("{error:#}")),
        }
    }
    outcome
}

fn talk(echo: &mut Echo, lines: u32, outcome: &mut Outcome) -> Result<()> {
    for _ in 0..lines {
        outcome.longest = outcome.longest.max(echo.exchange()?);
        outcome.lines += 1;
        thread::sleep(LINE);
    }
    Ok(())
}
