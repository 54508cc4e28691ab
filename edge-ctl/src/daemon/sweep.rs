//! The thread that ends flows: those that were idle for too long, by a sweep that rests between its walks, and those that
//! are to go on order ([`super::flow_ends`]). Both write the counts of expired flows, so that one thread does both. It is not
//! the daemon's loop: a step over 8,192 entries keeps its thread for up to 15 ms, and a withdrawn route or a failed check
//! must not wait behind it.

use std::{
    sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use tokio::sync::oneshot;
use tracing::warn;

use super::{
    SharedState,
    flow_ends::{Down, FlowEnds, Reply},
    lock,
    recorder::Ended,
};
use crate::{
    datapath::{flow_ends::FlowEnder, sweep::Sweeper, tables::Tables},
    model::FlowSelector,
};

/// Entries looked at in one step of the sweep: the default table in 16 s.
const BUDGET: usize = 8192;
/// Between two steps of the sweep over established flows.
const STEP: Duration = Duration::from_millis(250);
/// Between two walks over the table: even an empty table has half a million buckets to look into,
/// and no timeout is shorter than minutes.
const WALK: Duration = Duration::from_secs(4);
/// How long an empty table is left alone after a walk, in times of what the walk took: with many backends their counters are
/// most of it.
const WALK_REST: u32 = 500;
/// Longest that it is.
const LONGEST_REST: Duration = Duration::from_secs(30);
/// Between two steps of ending flows on order: the default tables in less than a second.
const END_STEP: Duration = Duration::from_millis(5);

enum Order {
    Down(Down),
    Kill(FlowSelector, Reply),
}

/// A handle on the thread, which ends with it.
pub struct Sweep {
    orders: Option<Sender<Order>>,
    /// Who was told to be down.
    down: Down,
    thread: Option<JoinHandle<()>>,
}

/// What the thread works with.
pub struct Tools {
    /// Ends idle flows.
    pub sweeper: Sweeper,
    /// Ends flows on order.
    pub ender: FlowEnder,
    /// Gives names to what was found.
    pub tables: Tables,
    /// Has records of ended flows written.
    pub ended: Ended,
    /// Where the views find what a walk found.
    pub shared: SharedState,
}

impl Sweep {
    /// Starts the thread; what comes beside the handle is done when the thread has ended.
    ///
    /// # Errors
    /// Where no thread can be made.
    pub fn start(tools: Tools) -> std::io::Result<(Self, oneshot::Receiver<()>)> {
        let (orders, inbox) = channel();
        let (running, ended) = oneshot::channel();
        let thread = std::thread::Builder::new().name("sweep".to_owned()).spawn(move || {
            Worker::new(tools).run(&inbox);
            drop(running);
        })?;
        Ok((Self { orders: Some(orders), down: Down::new(), thread: Some(thread) }, ended))
    }

    /// These are down, as far as their service ends flows then: those that were not before lose theirs.
    pub fn down(&mut self, down: Down) {
        if down != self.down {
            self.down.clone_from(&down);
            self.tell(Order::Down(down));
        }
    }

    /// Ends the flows that an operator names.
    pub fn kill(&self, selector: FlowSelector, reply: Reply) {
        self.tell(Order::Kill(selector, reply));
    }

    /// Where the thread has ended, so does the daemon.
    fn tell(&self, order: Order) {
        let _ = self.orders.as_ref().map(|orders| orders.send(order));
    }
}

impl Drop for Sweep {
    /// Waits for the step that is being taken.
    fn drop(&mut self) {
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Worker {
    sweeper: Sweeper,
    ends: FlowEnds,
    tables: Tables,
    ended: Ended,
    shared: SharedState,
    /// When the sweep takes its next step.
    next: Instant,
    /// What the walk has taken so far.
    took: Duration,
}

impl Worker {
    fn new(tools: Tools) -> Self {
        let Tools { sweeper, ender, tables, ended, shared } = tools;
        Self { sweeper, ends: FlowEnds::new(ender), tables, ended, shared, next: Instant::now(), took: Duration::ZERO }
    }

    /// Until nobody is left to give orders.
    fn run(mut self, inbox: &Receiver<Order>) {
        loop {
            let until_next = self.next.saturating_duration_since(Instant::now());
            let pause = if self.ends.is_busy() { END_STEP.min(until_next) } else { until_next };
            match inbox.recv_timeout(pause) {
                Ok(Order::Down(down)) => self.ends.look(down),
                Ok(Order::Kill(selector, reply)) => self.ends.kill(selector, reply),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if self.ends.is_busy() {
                self.ends.step(&self.ended);
            }
            if self.next <= Instant::now() {
                self.sweep();
            }
        }
    }

    fn sweep(&mut self) {
        let began = Instant::now();
        let step = self.sweeper.step(BUDGET);
        self.took += began.elapsed();
        self.next = began + STEP;
        match step {
            Ok(report) if report.finished => {
                self.look_at_pass(began);
                self.next = began + self.rest();
            }
            Ok(_) => {}
            Err(error) => warn!(%error, "idle flows could not be swept"),
        }
        self.ended.write(self.sweeper.take_ended());
    }

    /// Until the next walk: longer where there was little to see and it still took its time.
    fn rest(&mut self) -> Duration {
        let took = std::mem::take(&mut self.took);
        let flows: u64 = self.sweeper.last_pass().map_or(0, |pass| pass.entries.values().sum());
        if flows >= BUDGET as u64 {
            return WALK;
        }
        took.saturating_mul(WALK_REST).clamp(WALK, LONGEST_REST)
    }

    fn look_at_pass(&self, now: Instant) {
        let Some(pass) = self.sweeper.last_pass() else { return };
        if let Err(error) = lock(&self.shared).swept.take(pass, &self.tables, now) {
            warn!(%error, "the use of SNAT ports cannot be told");
        }
    }
}
