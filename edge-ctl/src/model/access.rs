//! The access log: what is known of a finished connection, and the format string that makes a line of it. Pure; the wall
//! clock's time comes in as text of its own.

use std::{
    fmt::Write as _,
    net::SocketAddr,
    path::PathBuf,
    time::{Duration, SystemTime},
};

/// The format where none is configured.
pub const DEFAULT_FORMAT: &str = "$time $client $vip $backend $bytes_in $bytes_out $duration $end";

/// `[log]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccessLog {
    /// Where lines go.
    pub target: Target,
    /// What they say.
    pub format: Format,
}

/// Where the access log is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A file, by absolute path.
    File(PathBuf),
    /// systemd's journal.
    Journal,
}

/// A finished connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlowRecord {
    /// Service name.
    pub service: String,
    /// IP protocol number.
    pub protocol: u8,
    /// The client.
    pub client: SocketAddr,
    /// Where it connected to.
    pub vip: SocketAddr,
    /// What the backend saw as its peer.
    pub source: SocketAddr,
    /// The backend.
    pub backend: SocketAddr,
    /// Packets from the client.
    pub packets_in: u64,
    /// Bytes from the client, from the IP header on.
    pub bytes_in: u64,
    /// Packets to the client.
    pub packets_out: u64,
    /// Bytes to the client, from the IP header on.
    pub bytes_out: u64,
    /// When it ended.
    pub ended: SystemTime,
    /// How long it was.
    pub duration: Duration,
    /// From the client's first packet to the backend's SYN-ACK or first datagram.
    pub connect: Option<Duration>,
    /// From the client's first packet to the backend's first byte.
    pub first_byte: Option<Duration>,
    /// From the client's first packet to the backend's last packet.
    pub last_byte: Option<Duration>,
    /// How it ended.
    pub end: &'static str,
}

macro_rules! variables {
    ($($(#[$doc:meta])* $variant:ident = $name:literal;)*) => {
        /// What a format string may name.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Variable { $($(#[$doc])* $variant,)* }

        impl Variable {
            /// Every variable with its name.
            pub const ALL: &'static [(&'static str, Self)] = &[$(($name, Self::$variant),)*];
        }
    };
}

variables! {
    /// When it ended, RFC 3339, UTC, milliseconds.
    Time = "time";
    /// When it ended, seconds since 1970 with milliseconds.
    Msec = "msec";
    /// Address and port of the client.
    Client = "client";
    /// Address of the client.
    ClientAddress = "client_address";
    /// Port of the client.
    ClientPort = "client_port";
    /// Listen address and port.
    Vip = "vip";
    /// Address and port that the backend saw.
    Source = "source";
    /// Address and port of the backend.
    Backend = "backend";
    /// Service name.
    Service = "service";
    /// `tcp` or `udp`.
    Protocol = "protocol";
    /// Bytes from the client.
    BytesIn = "bytes_in";
    /// Bytes to the client.
    BytesOut = "bytes_out";
    /// Packets from the client.
    PacketsIn = "packets_in";
    /// Packets to the client.
    PacketsOut = "packets_out";
    /// Seconds from its first packet to its last.
    Duration = "duration";
    /// How it ended.
    End = "end";
    /// Seconds to the backend's SYN-ACK.
    ConnectTime = "connect_time";
    /// Seconds to the backend's first byte.
    FirstByteTime = "first_byte_time";
    /// Seconds to the backend's last packet.
    LastByteTime = "last_byte_time";
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Text(String),
    Variable(Variable),
}

/// A parsed format string: text with `$name` or `${name}`; `$$` is a dollar.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Format(Vec<Part>);

impl Default for Format {
    fn default() -> Self {
        // The text is a constant of this file, and a test parses it.
        Self::parse(DEFAULT_FORMAT).unwrap_or(Self(Vec::new()))
    }
}

impl Format {
    /// Parses a format string.
    ///
    /// # Errors
    /// Names the variable that does not exist and those that do.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.trim().is_empty() {
            return Err("it is empty".to_owned());
        }
        if text.chars().any(char::is_control) {
            return Err("a control character would break lines".to_owned());
        }
        let (mut parts, mut rest) = (Vec::new(), text);
        while let Some(dollar) = rest.find('$') {
            let (before, after) = rest.split_at(dollar);
            let after = after.get(1..).unwrap_or_default();
            push_text(&mut parts, before);
            if let Some(tail) = after.strip_prefix('$') {
                push_text(&mut parts, "$");
                rest = tail;
                continue;
            }
            let (name, tail) = match after.strip_prefix('{') {
                Some(braced) => braced.split_once('}').ok_or("a `${` has no `}`")?,
                None => {
                    let end = after.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(after.len());
                    after.split_at(end)
                }
            };
            parts.push(Part::Variable(variable(name)?));
            rest = tail;
        }
        push_text(&mut parts, rest);
        Ok(Self(parts))
    }

    /// Appends the line of a record, without its end. `time` is `record.ended` as RFC 3339.
    pub fn render(&self, record: &FlowRecord, time: &str, line: &mut String) {
        for part in &self.0 {
            match part {
                Part::Text(text) => line.push_str(text),
                Part::Variable(variable) => value(*variable, record, time, line),
            }
        }
    }
}

fn push_text(parts: &mut Vec<Part>, text: &str) {
    match parts.last_mut() {
        _ if text.is_empty() => {}
        Some(Part::Text(last)) => last.push_str(text),
        _ => parts.push(Part::Text(text.to_owned())),
    }
}

fn variable(name: &str) -> Result<Variable, String> {
    Variable::ALL.iter().find(|(known, _)| *known == name).map(|(_, variable)| *variable).ok_or_else(|| {
        let known: Vec<_> = Variable::ALL.iter().map(|(known, _)| format!("${known}")).collect();
        format!("there is no variable `${name}`; there are {}", known.join(", "))
    })
}

fn value(variable: Variable, record: &FlowRecord, time: &str, line: &mut String) {
    // Writing to a string does not fail.
    let _ = match variable {
        Variable::Time => write!(line, "{time}"),
        Variable::Msec => {
            let since = record.ended.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            write!(line, "{}.{:03}", since.as_secs(), since.subsec_millis())
        }
        Variable::Client => write!(line, "{}", record.client),
        Variable::ClientAddress => write!(line, "{}", record.client.ip()),
        Variable::ClientPort => write!(line, "{}", record.client.port()),
        Variable::Vip => write!(line, "{}", record.vip),
        Variable::Source => write!(line, "{}", record.source),
        Variable::Backend => write!(line, "{}", record.backend),
        Variable::Service => write!(line, "{}", record.service),
        Variable::Protocol => match record.protocol {
            edge_common::flow::TCP => write!(line, "tcp"),
            edge_common::flow::UDP => write!(line, "udp"),
            other => write!(line, "{other}"),
        },
        Variable::BytesIn => write!(line, "{}", record.bytes_in),
        Variable::BytesOut => write!(line, "{}", record.bytes_out),
        Variable::PacketsIn => write!(line, "{}", record.packets_in),
        Variable::PacketsOut => write!(line, "{}", record.packets_out),
        Variable::Duration => write!(line, "{:.3}", record.duration.as_secs_f64()),
        Variable::End => write!(line, "{}", record.end),
        Variable::ConnectTime => optional(record.connect, line),
        Variable::FirstByteTime => optional(record.first_byte, line),
        Variable::LastByteTime => optional(record.last_byte, line),
    };
}

/// Seconds to the microsecond; `-` for what never came.
fn optional(time: Option<Duration>, line: &mut String) -> std::fmt::Result {
    match time {
        Some(time) => write!(line, "{:.6}", time.as_secs_f64()),
        None => write!(line, "-"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> FlowRecord {
        FlowRecord {
            service: "web".into(),
            protocol: edge_common::flow::TCP,
            client: "192.0.2.7:40000".parse().unwrap(),
            vip: "172.16.1.88:8443".parse().unwrap(),
            source: "172.16.1.88:1024".parse().unwrap(),
            backend: "10.1.0.4:443".parse().unwrap(),
            packets_in: 5,
            bytes_in: 500,
            packets_out: 4,
            bytes_out: 4000,
            ended: SystemTime::UNIX_EPOCH + Duration::from_millis(1_500),
            duration: Duration::from_millis(1250),
            connect: Some(Duration::from_micros(321)),
            first_byte: None,
            last_byte: Some(Duration::from_millis(1200)),
            end: "fin",
        }
    }

    fn line(format: &str) -> String {
        let mut line = String::new();
        Format::parse(format).unwrap().render(&record(), "1970-01-01T00:00:01.500Z", &mut line);
        line
    }

    #[test]
    fn the_default_format_says_who_talked_to_whom_and_how_it_ended() {
        assert_eq!(
            line(DEFAULT_FORMAT),
            "1970-01-01T00:00:01.500Z 192.0.2.7:40000 172.16.1.88:8443 10.1.0.4:443 500 4000 1.250 fin"
        );
        assert_eq!(Format::default(), Format::parse(DEFAULT_FORMAT).unwrap());
    }

    #[test]
    fn braces_and_doubled_dollars_are_understood_and_missing_times_are_a_dash() {
        assert_eq!(line("$$${bytes_in}B c=$connect_time f=$first_byte_time"), "$500B c=0.000321 f=-");
        assert_eq!(line("$msec [$protocol] $client_address,$client_port"), "1.500 [tcp] 192.0.2.7,40000");
    }

    #[test]
    fn an_unknown_variable_is_refused_with_those_there_are() {
        let error = Format::parse("$time $upstream").unwrap_err();
        assert!(error.contains("no variable `$upstream`") && error.contains("$backend"), "{error}");
        assert!(Format::parse("${time").is_err() && Format::parse(" ").is_err() && Format::parse("a\nb").is_err());
    }
}
