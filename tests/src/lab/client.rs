//! What clients do: many requests, and connections that live long.

use std::{
    collections::BTreeMap,
    io::{ErrorKind, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use socket2::{Domain, Protocol, Socket, Type};

use super::{Lab, exec, pods};

/// Longest time a single request may take.
const REQUEST: Duration = Duration::from_secs(5);

/// How many answers came from each pod.
pub type Spread = BTreeMap<String, usize>;

/// The largest deviation of a pod's share from an equal share among `pods`, as a fraction of the equal share.
pub fn deviation(spread: &Spread, pods: usize) -> f64 {
    let total: usize = spread.values().sum();
    let equal = total as f64 / pods as f64;
    let share = |count: usize| (count as f64 - equal).abs() / equal;
    let seen = spread.values().map(|count| share(*count)).fold(0.0, f64::max);
    if spread.len() < pods { 1.0 } else { seen }
}

impl Lab {
    /// `requests` HTTP requests from a host, each on a connection of its own.
    ///
    /// # Errors
    /// At the first that fails.
    pub fn http(&self, host: &str, server: SocketAddr, requests: usize) -> Result<Spread> {
        self.within(host, || {
            let mut spread = Spread::new();
            for number in 0..requests {
                let name = pods::http_get(server, REQUEST);
                let name = name.with_context(|| format!("request {number} of {requests} from {host}"))?;
                *spread.entry(name).or_default() += 1;
            }
            Ok(spread)
        })
    }

    /// A host's address as the pod behind `server` sees it.
    ///
    /// # Errors
    /// Where the request fails.
    pub fn seen_address(&self, host: &str, server: SocketAddr) -> Result<String> {
        self.within(host, || pods::http_get_path(server, "/client", REQUEST))
    }

    /// `requests` HTTPS requests from a host with curl, each on a connection of its own.
    ///
    /// # Errors
    /// Where one fails.
    pub fn https(&self, host: &str, server: SocketAddr, requests: usize) -> Result<Spread> {
        let mut command = self.command(host, exec::program("curl", "curl")?)?;
        command.args(["--silent", "--show-error", "--insecure", "--fail", "--fail-early", "--max-time"]);
        command.arg(REQUEST.as_secs().to_string()).args(["--header", "Connection: close"]);
        command.arg(format!("https://{server}/?[1-{requests}]"));
        let text = exec::run(&mut command)?;
        let mut spread = Spread::new();
        for line in text.lines().filter(|line| !line.is_empty()) {
            *spread.entry(line.to_owned()).or_default() += 1;
        }
        let answers: usize = spread.values().sum();
        ensure!(answers == requests, "{answers} answers to {requests} requests");
        Ok(spread)
    }

    /// One ICMP echo request from a host; how long the reply took.
    ///
    /// # Errors
    /// Where there is no reply within two seconds.
    pub fn ping(&self, host: &str, address: Ipv4Addr) -> Result<Duration> {
        self.within(host, || ping(address))
    }

    /// `requests` datagrams from a host, each from a socket of its own.
    ///
    /// # Errors
    /// At the first without an answer.
    pub fn udp(&self, host: &str, server: SocketAddr, requests: usize) -> Result<Spread> {
        self.within(host, || {
            let mut spread = Spread::new();
            for number in 0..requests {
                let text = format!("datagram-{number}");
                let answer = pods::udp_ask(server, &text, Duration::from_secs(2))?;
                let (name, echo) = answer.split_once(' ').unwrap_or((&answer, ""));
                ensure!(echo == text, "asked {text}, got {answer}");
                *spread.entry(name.to_owned()).or_default() += 1;
            }
            Ok(spread)
        })
    }

    /// Opens a connection to a pod's line echo, or to the VIP in front of it, from a host.
    ///
    /// # Errors
    /// Where it cannot be opened or the pod does not greet.
    pub fn open(&self, host: &str, server: SocketAddr) -> Result<Echo> {
        self.within(host, || Echo::open(server))
    }

    /// Opens many of them.
    ///
    /// # Errors
    /// At the first that fails.
    pub fn open_many(&self, host: &str, server: SocketAddr, count: usize) -> Result<Vec<Echo>> {
        self.within(host, || {
            let open = |number| Echo::open(server).with_context(|| format!("connection {number} of {count}"));
            (0..count).map(open).collect()
        })
    }
}

fn ping(address: Ipv4Addr) -> Result<Duration> {
    const LIMIT: Duration = Duration::from_secs(2);
    // Type 8, code 0, checksum, identifier 0x6564, sequence 1 (RFC 792); no data.
    const REQUEST: [u8; 8] = [8, 0, 0x92, 0x9a, 0x65, 0x64, 0, 1];
    let mut socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4)).context("make an ICMP socket")?;
    socket.connect(&SocketAddr::from((address, 0)).into())?;
    socket.set_read_timeout(Some(LIMIT))?;
    let start = Instant::now();
    socket.send(&REQUEST).with_context(|| format!("ping {address}"))?;
    let mut packet = [0; 128];
    while start.elapsed() < LIMIT {
        let length = socket.read(&mut packet).with_context(|| format!("no reply from {address}"))?;
        // After the IPv4 header: an echo reply with our identifier and sequence.
        let icmp = &packet[(usize::from(packet[0] & 0xf) * 4).min(length)..length];
        if icmp.first() == Some(&0) && icmp.get(4..8) == Some(&REQUEST[4..]) {
            return Ok(start.elapsed());
        }
    }
    bail!("no echo reply from {address}")
}

/// A long-lived connection to a line echo.
#[derive(Debug)]
pub struct Echo {
    stream: TcpStream,
    /// The pod at its other end.
    pub pod: String,
    sent: u64,
}

impl Echo {
    /// Connects from the current namespace and reads the greeting.
    ///
    /// # Errors
    /// Where it cannot be opened or the pod does not greet.
    pub fn open(server: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&server, REQUEST).with_context(|| format!("connect to {server}"))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(REQUEST))?;
        let mut echo = Self { stream, pod: String::new(), sent: 0 };
        echo.pod = echo.line().with_context(|| format!("wait for the greeting of {server}"))?;
        Ok(echo)
    }

    /// Waits so long for each line from now on, instead of for 5 s.
    ///
    /// # Errors
    /// Where the kernel refuses.
    pub fn wait_for_lines(&self, limit: Duration) -> Result<()> {
        Ok(self.stream.set_read_timeout(Some(limit))?)
    }

    fn line(&mut self) -> Result<String> {
        let mut line = Vec::new();
        let mut byte = [0];
        loop {
            match self.stream.read(&mut byte) {
                Ok(0) => bail!("the connection was closed"),
                Ok(_) if byte[0] == b'\n' => return Ok(String::from_utf8_lossy(&line).into_owned()),
                Ok(_) => line.push(byte[0]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Sends a line and waits for it to come back; how long that took.
    ///
    /// # Errors
    /// Where the connection was reset or closed, or nothing comes within 5 s.
    pub fn exchange(&mut self) -> Result<Duration> {
        let start = Instant::now();
        self.sent += 1;
        let text = format!("{} {}", self.pod, self.sent);
        let pod = self.pod.clone();
        let answer = self
            .stream
            .write_all(format!("{text}\n").as_bytes())
            .map_err(anyhow::Error::from)
            .and_then(|()| self.line())
            .with_context(|| format!("line {} on a connection to {pod}", self.sent))?;
        ensure!(answer == text, "sent `{text}`, got `{answer}`");
        Ok(start.elapsed())
    }
}

/// One exchange on each connection; the longest it took.
///
/// # Errors
/// Where one was reset, closed, or stalled for 5 s.
pub fn exchange_all(connections: &mut [Echo]) -> Result<Duration> {
    let count = connections.len();
    let mut longest = Duration::ZERO;
    for (number, connection) in connections.iter_mut().enumerate() {
        let took = connection.exchange().with_context(|| format!("connection {number} of {count}"))?;
        longest = longest.max(took);
    }
    Ok(longest)
}

/// wrk's requests per second from a host.
///
/// # Errors
/// Where wrk fails, or the server does not answer every request.
pub fn wrk(lab: &Lab, host: &str, server: SocketAddr, seconds: u32, close: bool) -> Result<f64> {
    let mut command: Command = lab.command(host, exec::program("wrk", "wrk")?)?;
    command.args(["-t", "1", "-c", "64", "-d", &format!("{seconds}s"), "--timeout", "5s"]);
    if close {
        command.args(["-H", "Connection: close"]);
    }
    command.arg(format!("http://{server}/"));
    let text = exec::run(&mut command)?;
    requests_per_second(&text)
}

fn requests_per_second(text: &str) -> Result<f64> {
    if let Some(line) = text.lines().find(|line| line.contains("Socket errors") || line.contains("Non-2xx")) {
        let failed = line.split(|c: char| !c.is_ascii_digit()).filter(|part| !part.is_empty());
        // With `Connection: close` wrk counts the server's close as a read error; connects and timeouts are real.
        let numbers: Vec<u64> = failed.filter_map(|part| part.parse().ok()).collect();
        let real = match numbers[..] {
            [connect, _read, write, timeout] => connect + write + timeout,
            _ => 1,
        };
        ensure!(real == 0, "wrk: {}", line.trim());
    }
    let rate = text.lines().find_map(|line| line.trim().strip_prefix("Requests/sec:"));
    rate.context("wrk printed no rate")?.trim().parse().context("read wrk's rate")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_that_was_never_reached_counts_as_full_deviation() {
        let spread = Spread::from([("a".to_owned(), 50), ("b".to_owned(), 50)]);
        assert_eq!(deviation(&spread, 3), 1.0);
        assert_eq!(deviation(&spread, 2), 0.0);
    }

    #[test]
    fn deviation_is_relative_to_an_equal_share() {
        let spread = Spread::from([("a".to_owned(), 110), ("b".to_owned(), 90), ("c".to_owned(), 100)]);
        assert!((deviation(&spread, 3) - 0.1).abs() < 1e-9);
    }

    #[test]
    fn wrk_rates_are_read_and_real_errors_refused() {
        assert_eq!(
            requests_per_second("  1 requests\nRequests/sec:  12345.67\nTransfer/sec: 1MB\n").unwrap(),
            12345.67
        );
        let closes = "  Socket errors: connect 0, read 12, write 0, timeout 0\nRequests/sec:  10.00\n";
        assert_eq!(requests_per_second(closes).unwrap(), 10.0);
        for line in ["  Socket errors: connect 3, read 0, write 0, timeout 0\n", "  Non-2xx or 3xx responses: 9\n"] {
            assert!(requests_per_second(&format!("{line}Requests/sec:  10.00\n")).is_err());
        }
    }
}
