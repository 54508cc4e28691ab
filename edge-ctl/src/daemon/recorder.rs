//! Takes records out of the program's ring buffer, on a thread of its own: writing a file may take long, and neither
//! forwarding nor the daemon's loop waits for it.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{Receiver, SyncSender, TryRecvError, sync_channel},
    },
    thread::JoinHandle,
    time::Duration,
};

use edge_common::maps::FlowEnd;
use tracing::warn;

use super::access_log::{Counts, Writer};
use crate::{
    datapath::events::{Clock, Event, EventsReader, Names, drop_row, flow_record},
    model::{
        access::{AccessLog, FlowRecord},
        view::EventRow,
    },
};

/// Longest time until an order is carried out, or a flow that the sweep ended is written.
const WAIT: Duration = Duration::from_millis(100);
/// Records taken between two looks at orders.
const BATCH: usize = 1024;
/// Events that are remembered for `edge-ctl events`.
const REMEMBERED: usize = 1000;
/// Orders that may wait.
const ORDERS: usize = 256;

enum Order {
    Configure(Option<AccessLog>),
    Reopen,
    /// Flows that the sweep ended.
    Ended(Vec<FlowEnd>),
    Stop,
}

/// What the views show of it.
#[derive(Clone, Debug, Default)]
pub struct Told {
    /// Access log lines.
    pub access: Counts,
    /// Records that the ring buffer had no room for, since the maps exist.
    pub lost: u64,
    /// Records of idle flows that found no room in the queue, since the daemon started.
    pub unqueued: u64,
    /// What is wrong.
    pub problem: Option<String>,
    /// The newest events, oldest first.
    pub events: VecDeque<EventRow>,
}

/// A handle on the thread.
pub struct Recorder {
    orders: SyncSender<Order>,
    told: Arc<Mutex<Told>>,
    thread: Option<JoinHandle<()>>,
}

impl Recorder {
    /// Starts the thread.
    ///
    /// # Errors
    /// Where no thread can be made.
    pub fn start(reader: EventsReader, log: Option<AccessLog>) -> std::io::Result<Self> {
        let (orders, inbox) = sync_channel(ORDERS);
        let told = Arc::new(Mutex::new(Told::default()));
        let mut worker = Worker { reader, writer: None, told: Arc::clone(&told), counts: Counts::default() };
        worker.configure(log);
        let thread = std::thread::Builder::new().name("events".into()).spawn(move || worker.run(&inbox))?;
        Ok(Self { orders, told, thread: Some(thread) })
    }

    /// Takes a changed configuration over, and opens the file anew in any case: a reload is what logrotate asks for.
    pub fn reload(&self, log: &Option<AccessLog>) {
        for order in [Order::Configure(log.clone()), Order::Reopen] {
            // Full only while the thread hangs in a write; the file's identity is looked at again by then.
            if self.orders.try_send(order).is_err() {
                warn!("the access log is busy: the reload reaches it late or not at all");
            }
        }
    }

    /// For whoever ends flows.
    pub fn inlet(&self) -> Ended {
        Ended { orders: self.orders.clone(), told: self.told() }
    }

    /// What the views show.
    pub fn told(&self) -> Arc<Mutex<Told>> {
        Arc::clone(&self.told)
    }

    /// What is wrong with it.
    pub fn problem(&self) -> Option<String> {
        lock(&self.told).problem.clone()
    }
}

/// Takes records of flows that the daemon ended.
pub struct Ended {
    orders: SyncSender<Order>,
    told: Arc<Mutex<Told>>,
}

impl Ended {
    /// Has them written.
    pub fn write(&self, ended: Vec<FlowEnd>) {
        let count = ended.len() as u64;
        if count > 0 && self.orders.try_send(Order::Ended(ended)).is_err() {
            lock(&self.told).unqueued += count;
        }
    }
}

impl Drop for Recorder {
    /// What is buffered is written; a write that hangs is not waited for.
    fn drop(&mut self) {
        if self.orders.try_send(Order::Stop).is_ok()
            && let Some(thread) = self.thread.take()
        {
            let _ = thread.join();
        }
    }
}

/// A panic elsewhere must not take the views down.
pub fn lock(told: &Mutex<Told>) -> MutexGuard<'_, Told> {
    told.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Worker {
    reader: EventsReader,
    writer: Option<Writer>,
    told: Arc<Mutex<Told>>,
    counts: Counts,
}

impl Worker {
    fn run(mut self, inbox: &Receiver<Order>) {
        loop {
            if let Err(error) = self.reader.wait(WAIT) {
                warn!(%error, "the events ring buffer cannot be waited for");
                std::thread::sleep(WAIT);
            }
            self.drain();
            let go_on = self.obey(inbox);
            if let Some(writer) = &mut self.writer {
                writer.flush();
            }
            self.tell();
            if !go_on {
                return;
            }
        }
    }

    /// False once it is to stop.
    fn obey(&mut self, inbox: &Receiver<Order>) -> bool {
        loop {
            match inbox.try_recv() {
                Ok(Order::Configure(log)) => self.configure(log),
                Ok(Order::Reopen) => {
                    if let Some(writer) = &mut self.writer {
                        writer.reopen();
                    }
                }
                Ok(Order::Ended(ended)) => self.write_all(ended.into_iter().map(Event::End).collect()),
                Err(TryRecvError::Empty) => return true,
                Ok(Order::Stop) | Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn configure(&mut self, log: Option<AccessLog>) {
        if self.writer.as_ref().map(Writer::configuration) == log.as_ref() {
            return;
        }
        if let Some(mut old) = self.writer.take() {
            old.flush();
            self.counts = old.counts;
        }
        self.writer = log.map(|log| Writer::new(log, self.counts));
    }

    fn drain(&mut self) {
        let mut batch = Vec::new();
        while batch.len() < BATCH
            && let Some(event) = self.reader.take()
        {
            batch.push(event);
        }
        self.write_all(batch);
    }

    fn write_all(&mut self, batch: Vec<Event>) {
        if batch.is_empty() {
            return;
        }
        let (clock, mut names) = (Clock::now(), self.reader.names());
        let mut rows = Vec::new();
        for event in batch {
            match event {
                Event::End(end) => {
                    let record = flow_record(&end, names.service(end.service), &clock);
                    if let Some(writer) = &mut self.writer {
                        writer.write(&record);
                    }
                    rows.push(end_row(&record));
                }
                Event::Drop(drop) => rows.push(dropped(&drop, &mut names, &clock)),
            }
        }
        remember(&mut lock(&self.told).events, rows);
    }

    fn tell(&mut self) {
        let lost = self.reader.lost();
        let mut told = lock(&self.told);
        told.access = self.writer.as_ref().map_or(self.counts, |writer| writer.counts);
        told.problem = self.writer.as_ref().and_then(|writer| writer.error.clone());
        match lost {
            Ok(lost) => told.lost = lost,
            Err(error) => told.problem = Some(error.to_string()),
        }
    }
}

fn dropped(drop: &edge_common::maps::DropSample, names: &mut Names<'_>, clock: &Clock) -> EventRow {
    let service = if drop.service == 0 { "-".to_owned() } else { names.service(drop.service) };
    drop_row(drop, service, humantime::format_rfc3339_millis(clock.wall(drop.time)).to_string())
}

fn end_row(record: &FlowRecord) -> EventRow {
    EventRow {
        time: humantime::format_rfc3339_millis(record.ended).to_string(),
        kind: "end".to_owned(),
        service: record.service.clone(),
        source: record.client.to_string(),
        destination: record.backend.to_string(),
        reason: record.end.to_owned(),
        bytes: record.bytes_in.saturating_add(record.bytes_out),
    }
}

/// Adds rows, and forgets the oldest beyond what is remembered.
fn remember(events: &mut VecDeque<EventRow>, rows: Vec<EventRow>) {
    events.extend(rows);
    let surplus = events.len().saturating_sub(REMEMBERED);
    events.drain(..surplus);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_newest_events_are_remembered() {
        let row = |n: usize| EventRow { bytes: n as u64, ..EventRow::default() };
        let mut events = VecDeque::new();
        remember(&mut events, (0..900).map(row).collect());
        remember(&mut events, (900..2500).map(row).collect());
        assert_eq!((events.len(), events[0].bytes, events[999].bytes), (1000, 1500, 2499));
    }
}
