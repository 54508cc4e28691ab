//! Reads the program's events ring buffer, and makes of its records what the rest of the daemon speaks. There is one
//! reader at a time: the daemon.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    os::fd::AsRawFd as _,
    sync::Arc,
    time::{Duration, SystemTime},
};

use aya::maps::{MapData, RingBuf};
use edge_common::{
    maps::{
        DropSample, FlowEnd,
        events::{End, event},
        name,
    },
    verdict::Reason,
};

use super::{
    cache::FlowCache,
    pins::{Pins, open},
    sys::{from_bytes, monotonic_ns},
    tables::{Tables, label_text, per_cpu},
};
use crate::{
    model::{access::FlowRecord, view::EventRow},
    reconcile::ports::PortError,
};

/// A record of the ring buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A flow that ended.
    End(FlowEnd),
    /// One of many dropped packets.
    Drop(DropSample),
}

impl Event {
    /// The record in these bytes; `None` for one of another version.
    fn parse(bytes: &[u8]) -> Option<Self> {
        match *bytes.first()? {
            event::FLOW_END => from_bytes(bytes).map(Self::End),
            event::DROP => from_bytes(bytes).map(Self::Drop),
            _ => None,
        }
    }
}

/// The reader.
pub struct EventsReader {
    ring: RingBuf<MapData>,
    tables: Tables,
    cache: Arc<FlowCache>,
}

impl EventsReader {
    /// Opens the pins.
    ///
    /// # Errors
    /// Where one is missing.
    pub fn open(pins: &Pins, cache: Arc<FlowCache>) -> Result<Self, PortError> {
        Ok(Self { ring: open(pins, name::EVENTS)?, tables: Tables::open(pins)?, cache })
    }

    /// Waits until there is a record, or until `timeout` has passed.
    ///
    /// # Errors
    /// Those of poll(2), but not a signal.
    pub fn wait(&self, timeout: Duration) -> io::Result<()> {
        super::sys::wait_readable(self.ring.as_raw_fd(), timeout)
    }

    /// The next record that is there.
    pub fn take(&mut self) -> Option<Event> {
        loop {
            let item = self.ring.next()?;
            if let Some(mut event) = Event::parse(&item) {
                if let Event::End(record) = &mut event {
                    self.cache.complete(record);
                }
                return Some(event);
            }
        }
    }

    /// Names of services, to be looked up once for a batch of records.
    pub fn names(&self) -> Names<'_> {
        Names { tables: &self.tables, known: BTreeMap::new() }
    }

    /// Records that the full ring buffer refused since it exists.
    ///
    /// # Errors
    /// Where the counter cannot be read.
    pub fn lost(&self) -> Result<u64, PortError> {
        lost(&self.tables)
    }
}

/// Records that the full ring buffer refused since it exists.
///
/// # Errors
/// Where the counter cannot be read.
pub fn lost(tables: &Tables) -> Result<u64, PortError> {
    let reader = tables.reader(name::EVENTS_LOST)?;
    let bytes = reader.get(&0_u32.to_ne_bytes())?.unwrap_or_default();
    Ok(per_cpu::<u64>(&bytes, reader.cpus).fold(0, u64::wrapping_add))
}

/// Service names by number.
pub struct Names<'a> {
    tables: &'a Tables,
    known: BTreeMap<u32, String>,
}

impl Names<'_> {
    /// The name of a service; `-` where it has none.
    pub fn service(&mut self, number: u32) -> String {
        let tables = self.tables;
        let label = || {
            let bytes = tables.lookup::<u32, [u8; 64]>(name::SERVICE_LABELS, &number).ok()??;
            Some(label_text(&bytes)).filter(|label| !label.is_empty())
        };
        self.known.entry(number).or_insert_with(|| label().unwrap_or_else(|| "-".to_owned())).clone()
    }
}

/// The clocks at one moment, to tell the wall clock's time of an event.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    monotonic: u64,
    wall: SystemTime,
}

impl Clock {
    /// Now.
    pub fn now() -> Self {
        Self { monotonic: monotonic_ns(), wall: SystemTime::now() }
    }

    /// The wall clock's time when the monotonic clock said `time`.
    pub fn wall(&self, time: u64) -> SystemTime {
        let ago = Duration::from_nanos(self.monotonic.saturating_sub(time));
        self.wall.checked_sub(ago).unwrap_or(SystemTime::UNIX_EPOCH)
    }
}

/// A record in the daemon's own terms.
pub fn flow_record(end: &FlowEnd, service: String, clock: &Clock) -> FlowRecord {
    let micros = |micros: u32| (micros != 0).then(|| Duration::from_micros(u64::from(micros)));
    let since = |time: u64| Duration::from_nanos(time.saturating_sub(end.created));
    FlowRecord {
        service,
        protocol: end.protocol,
        client: address(end.client, end.client_port),
        vip: address(end.vip, end.vip_port),
        source: address(end.source, end.source_port),
        backend: address(end.target, end.target_port),
        packets_in: end.packets_in,
        bytes_in: end.bytes_in,
        packets_out: end.packets_out,
        bytes_out: end.bytes_out,
        ended: clock.wall(end.ended),
        duration: since(end.ended),
        connect: micros(end.answered_after),
        first_byte: micros(end.first_byte_after),
        last_byte: (end.packets_out != 0).then(|| since(end.last_reply)),
        end: End::from_number(end.end).map_or("unknown", End::name),
    }
}

/// A dropped packet as users see it. `time` is the wall clock's.
pub fn drop_row(drop: &DropSample, service: String, time: String) -> EventRow {
    let reason = Reason::ALL.iter().find(|reason| **reason as u32 == u32::from(drop.reason));
    EventRow {
        time,
        kind: "drop".to_owned(),
        service,
        source: address(drop.source, drop.source_port).to_string(),
        destination: address(drop.destination, drop.destination_port).to_string(),
        reason: reason.map_or("unknown", |reason| reason.name()).to_owned(),
        bytes: u64::from(drop.length),
    }
}

/// A v4-mapped address is shown as IPv4.
fn address(words: [u32; 4], port: u16) -> SocketAddr {
    let mut bytes = [0; 16];
    for (to, from) in bytes.iter_mut().zip(words.iter().flat_map(|word| word.to_ne_bytes())) {
        *to = from;
    }
    SocketAddr::new(IpAddr::V6(Ipv6Addr::from(bytes)).to_canonical(), u16::from_be(port))
}

#[cfg(test)]
mod tests {
    use edge_common::address::mapped;

    use super::*;

    #[test]
    fn a_record_of_the_program_becomes_addresses_times_and_words() {
        let wire = |a: [u8; 4]| mapped(u32::from_ne_bytes(a));
        let end = FlowEnd {
            kind: event::FLOW_END,
            end: End::BackendReset as u8,
            protocol: 6,
            client: wire([192, 0, 2, 7]),
            client_port: 40000_u16.to_be(),
            target: wire([10, 1, 0, 4]),
            target_port: 443_u16.to_be(),
            packets_out: 1,
            created: 1_000_000_000,
            ended: 3_500_000_000,
            last_reply: 3_000_000_000,
            answered_after: 250,
            ..FlowEnd::default()
        };
        let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(100);
        let record = flow_record(&end, "web".into(), &Clock { monotonic: 4_500_000_000, wall });
        assert_eq!(record.client, "192.0.2.7:40000".parse().unwrap());
        assert_eq!(record.backend, "10.1.0.4:443".parse().unwrap());
        assert_eq!((record.duration.as_millis(), record.last_byte.unwrap().as_millis()), (2500, 2000));
        assert_eq!((record.connect, record.first_byte), (Some(Duration::from_micros(250)), None));
        assert_eq!((record.ended, record.end), (SystemTime::UNIX_EPOCH + Duration::from_secs(99), "backend-rst"));
    }

    #[test]
    fn a_record_of_an_unknown_kind_or_length_is_left_out() {
        assert_eq!(Event::parse(&[9; 152]), None);
        assert_eq!(Event::parse(&[event::FLOW_END; 100]), None);
        assert_eq!(Event::parse(&[]), None);
    }
}
