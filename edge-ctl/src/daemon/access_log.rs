//! Writes access log lines to a file or to systemd's journal. A line that cannot be written is counted and forgotten:
//! nothing waits for a full disk.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::{
        fs::{MetadataExt as _, OpenOptionsExt as _},
        net::UnixDatagram,
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use crate::model::access::{AccessLog, FlowRecord, Target};

/// Where journald listens for its native protocol (systemd.journal-fields(7), "JOURNAL_NATIVE_PROTOCOL").
const JOURNAL: &str = "/run/systemd/journal/socket";
/// Lines of a file are written together when they take so many bytes.
const BUFFER: usize = 64 << 10;
/// Between two looks at whether the file is still the one of its path, and between two attempts to open it.
const LOOK: Duration = Duration::from_secs(1);

/// An open access log.
#[derive(Debug)]
pub struct Writer {
    log: AccessLog,
    sink: Sink,
    /// What became of lines so far.
    pub counts: Counts,
    /// Why the latest line was lost; `None` while lines are written.
    pub error: Option<String>,
}

/// Lines since the daemon started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Written.
    pub written: u64,
    /// Lost because they could not be written.
    pub lost: u64,
}

#[derive(Debug)]
enum Sink {
    File(LogFile),
    Journal { socket: Option<UnixDatagram>, path: PathBuf },
}

impl Writer {
    /// Opens nothing yet: the first line does.
    pub fn new(log: AccessLog, counts: Counts) -> Self {
        let sink = match &log.target {
            Target::File(path) => Sink::File(LogFile::new(path)),
            Target::Journal => Sink::Journal { socket: None, path: JOURNAL.into() },
        };
        Self { log, sink, counts, error: None }
    }

    /// What it was made for.
    pub fn configuration(&self) -> &AccessLog {
        &self.log
    }

    /// Writes a line, at the next [`Writer::flush`] at the latest.
    pub fn write(&mut self, record: &FlowRecord) {
        let time = humantime::format_rfc3339_millis(record.ended).to_string();
        let mut line = String::with_capacity(128);
        self.log.format.render(record, &time, &mut line);
        match &mut self.sink {
            Sink::File(file) => {
                line.push('\n');
                file.push(&line);
                if file.buffer.len() >= BUFFER {
                    self.flush();
                }
            }
            Sink::Journal { socket, path } => {
                let sent = send(socket, path, record, &line);
                self.count(1, sent);
            }
        }
    }

    /// Writes what is buffered.
    pub fn flush(&mut self) {
        if let Sink::File(file) = &mut self.sink {
            let lines = file.lines;
            if lines > 0 {
                let written = file.flush();
                self.count(lines, written);
            }
        }
    }

    /// Opens the file anew at the next line, after what is buffered: logrotate has moved it.
    pub fn reopen(&mut self) {
        self.flush();
        match &mut self.sink {
            Sink::File(file) => file.close(),
            Sink::Journal { socket, .. } => *socket = None,
        }
    }

    fn count(&mut self, lines: u64, result: io::Result<()>) {
        match result {
            Ok(()) => {
                self.counts.written += lines;
                self.error = None;
            }
            Err(error) => {
                self.counts.lost += lines;
                let target = match &self.sink {
                    Sink::File(file) => file.path.display().to_string(),
                    Sink::Journal { path, .. } => format!("the journal ({})", path.display()),
                };
                self.error = Some(format!("access log {target}: {error}; {} lines lost so far", self.counts.lost));
            }
        }
    }
}

#[derive(Debug)]
struct LogFile {
    path: PathBuf,
    open: Option<File>,
    looked: Option<Instant>,
    buffer: Vec<u8>,
    lines: u64,
    /// The file ends in half a line.
    torn: bool,
}

impl LogFile {
    fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), open: None, looked: None, buffer: Vec::new(), lines: 0, torn: false }
    }

    fn push(&mut self, line: &str) {
        self.buffer.extend_from_slice(line.as_bytes());
        self.lines += 1;
    }

    fn close(&mut self) {
        self.open = None;
        self.looked = None;
        self.torn = false;
    }

    fn flush(&mut self) -> io::Result<()> {
        self.lines = 0;
        let lines = std::mem::take(&mut self.buffer);
        self.look()?;
        let torn = self.torn;
        let Some(file) = &mut self.open else {
            return Err(io::Error::other("it could not be opened a moment ago"));
        };
        if torn {
            file.write_all(b"\n")?;
            self.torn = false;
        }
        let before = file.metadata().map(|metadata| metadata.len()).ok();
        file.write_all(&lines).inspect_err(|_| {
            self.torn = file.metadata().map(|metadata| metadata.len()).ok() != before;
        })
    }

    /// Opens the file where it is not open, or where its path names another one by now.
    fn look(&mut self) -> io::Result<()> {
        if self.looked.is_some_and(|looked| looked.elapsed() < LOOK) {
            return Ok(());
        }
        self.looked = Some(Instant::now());
        if let Some(open) = &self.open {
            let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
            if fs::metadata(&self.path).map(identity).ok() == open.metadata().map(identity).ok() {
                return Ok(());
            }
        }
        self.torn = false;
        self.open = None;
        // Client addresses are nobody else's business; the group may read them.
        self.open = Some(OpenOptions::new().create(true).append(true).mode(0o640).open(&self.path)?);
        Ok(())
    }
}

/// One message of the native protocol: `FIELD=value` lines. Values hold no line breaks: formats have none, and names are
/// the configuration's.
fn send(socket: &mut Option<UnixDatagram>, path: &Path, record: &FlowRecord, line: &str) -> io::Result<()> {
    let open = match socket {
        Some(open) => open,
        None => {
            let new = UnixDatagram::unbound()?;
            // A journal that does not keep up must not hold up the reader of events.
            new.set_nonblocking(true)?;
            socket.insert(new)
        }
    };
    let message = format!(
        "MESSAGE={line}\nPRIORITY=6\nSYSLOG_IDENTIFIER=edge-access\nEDGE_SERVICE={}\nEDGE_CLIENT={}\nEDGE_VIP={}\n\
         EDGE_BACKEND={}\nEDGE_END={}\n",
        record.service, record.client, record.vip, record.backend, record.end
    );
    open.send_to(message.as_bytes(), path).map(drop)
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::model::access::Format;

    fn record(service: &str) -> FlowRecord {
        let address = "192.0.2.1:1".parse().unwrap();
        FlowRecord {
            service: service.into(),
            protocol: 6,
            client: address,
            vip: address,
            source: address,
            backend: address,
            packets_in: 0,
            bytes_in: 0,
            packets_out: 0,
            bytes_out: 0,
            ended: SystemTime::UNIX_EPOCH,
            duration: Duration::ZERO,
            connect: None,
            first_byte: None,
            last_byte: None,
            end: "fin",
        }
    }

    fn writer(target: Target) -> Writer {
        Writer::new(AccessLog { target, format: Format::parse("$service $end").unwrap() }, Counts::default())
    }

    #[test]
    fn a_file_that_logrotate_moved_is_opened_anew_on_order_and_nothing_is_lost() {
        let folder = tempfile::tempdir().unwrap();
        let (path, old) = (folder.path().join("access.log"), folder.path().join("access.log.1"));
        let mut log = writer(Target::File(path.clone()));
        log.write(&record("one"));
        log.flush();
        fs::rename(&path, &old).unwrap();
        log.write(&record("two"));
        log.reopen();
        log.write(&record("three"));
        log.flush();
        let read = |path: &Path| fs::read_to_string(path).unwrap();
        assert_eq!(read(&old) + &read(&path), "one fin\ntwo fin\nthree fin\n");
        assert_eq!(read(&path), "three fin\n");
        assert_eq!(log.counts, Counts { written: 3, lost: 0 });
    }

    #[test]
    fn a_file_that_somebody_replaced_is_noticed_without_an_order() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("access.log");
        let mut log = writer(Target::File(path.clone()));
        log.write(&record("one"));
        log.flush();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "").unwrap();
        if let Sink::File(file) = &mut log.sink {
            file.looked = None;
        }
        log.write(&record("two"));
        log.flush();
        assert_eq!(fs::read_to_string(&path).unwrap(), "two fin\n");
    }

    #[test]
    fn lines_for_a_full_disk_are_counted_and_the_next_ones_are_written_again() {
        let mut log = writer(Target::File("/dev/full".into()));
        log.write(&record("one"));
        log.write(&record("two"));
        log.flush();
        assert_eq!(log.counts, Counts { written: 0, lost: 2 });
        assert!(log.error.as_deref().is_some_and(|error| error.contains("/dev/full") && error.contains("2 lines")));

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("missing/access.log");
        let mut log = writer(Target::File(path.clone()));
        log.write(&record("one"));
        log.flush();
        fs::create_dir(path.parent().unwrap()).unwrap();
        log.reopen();
        log.write(&record("two"));
        log.flush();
        assert_eq!((log.counts, log.error), (Counts { written: 1, lost: 1 }, None));
        assert_eq!(fs::read_to_string(&path).unwrap(), "two fin\n");
    }

    #[test]
    fn the_journal_gets_the_line_and_its_fields_and_its_absence_is_counted() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let mut log = writer(Target::Journal);
        log.sink = Sink::Journal { socket: None, path: path.clone() };
        log.write(&record("one"));
        assert_eq!(log.counts, Counts { written: 0, lost: 1 });
        let journal = UnixDatagram::bind(&path).unwrap();
        log.write(&record("two"));
        let mut buffer = [0; 1024];
        let length = journal.recv(&mut buffer).unwrap();
        let message = String::from_utf8_lossy(&buffer[..length]);
        assert!(message.starts_with("MESSAGE=two fin\nPRIORITY=6\n"), "{message}");
        assert!(message.contains("\nEDGE_CLIENT=192.0.2.1:1\n") && message.ends_with('\n'), "{message}");
        assert_eq!((log.counts, log.error), (Counts { written: 1, lost: 1 }, None));
    }
}
