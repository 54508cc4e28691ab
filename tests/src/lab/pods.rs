//! The pods: kube-dns and the ingress controllers, and the DNS zone that follows them.

use std::{
    fs,
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket},
    path::Path,
    process::Command,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use hickory_proto::{
    op::{Message, Query},
    rr::{Name, RecordType},
};

use super::{
    Lab,
    dns::{DnsMode, HeadlessService, Zone},
    exec::{self, ip_batch, run, wait_for},
    netns,
    topology::{self, Pod},
};

/// The service of the first seed, as `SERVICE.NAMESPACE`.
pub const SERVICE: &str = "nginx-ingress-svc.nginx-ingress";
/// The same as a name to ask for.
pub const SERVICE_NAME: &str = "nginx-ingress-svc.nginx-ingress.svc.cluster.local";
/// Port of the pods' UDP echo.
pub const UDP_ECHO: u16 = 5353;
/// Port of the pods' TCP line echo.
pub const TCP_ECHO: u16 = 9000;
/// Where a test puts a file that every pod serves: its name in the lab's folder, and its path.
pub const LARGE: &str = "large";
const ANSWERING: Duration = Duration::from_secs(10);

impl Lab {
    /// Writes the key and the certificate that all ingress pods serve.
    pub(super) fn make_certificate(&self) -> Result<()> {
        let mut command = Command::new(exec::program("openssl", "openssl")?);
        command.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]);
        command.args(["-days", "30", "-subj", "/CN=ingress.demo.local"]);
        command.arg("-keyout").arg(self.folder().join("tls.key")).arg("-out").arg(self.folder().join("tls.crt"));
        run(&mut command).map(|_| ())
    }

    /// Makes a pod's namespace and attaches it to its node.
    pub(super) fn attach_pod(&self, pod: &Pod) -> Result<()> {
        let (namespace, node) = (self.namespace(&pod.name), self.namespace(pod.node.name));
        run(Command::new("ip").args(["netns", "add", &namespace]))?;
        ip_batch(Some(&node), &topology::pod_node_commands(&self.state.prefix, pod))?;
        ip_batch(Some(&namespace), &topology::pod_commands(pod))?;
        super::offload(&namespace, "eth0", &["tx", "off"])
    }

    /// Starts a kube-dns pod's server.
    pub(super) fn start_dns(&self, pod: &Pod) -> Result<()> {
        let mut command = Command::new(exec::product("edge-lab", "EDGE_LAB")?);
        command.args(["dns-server", "--listen", &format!("{}:53", pod.address), "--zone"]).arg(self.zone_file());
        self.serve(&pod.name, "dns", &mut command)?;
        let server = SocketAddr::from((pod.address, 53));
        wait_for(&format!("DNS at {server}"), ANSWERING, || self.resolve_from(pod.node.name, server).map(|_| true))?;
        Ok(())
    }

    /// Starts an ingress pod's servers and waits until they answer its node.
    pub(super) fn start_ingress(&self, pod: &Pod) -> Result<()> {
        let configuration = self.folder().join(format!("{}.nginx.conf", pod.name));
        fs::write(&configuration, self.nginx_configuration(&pod.name)).context("write nginx's configuration")?;
        let mut nginx = Command::new(exec::program("nginx", "nginx")?);
        nginx.arg("-e").arg("stderr").arg("-p").arg(self.folder()).arg("-c").arg(&configuration);
        self.serve(&pod.name, "nginx", &mut nginx)?;
        for (kind, port) in [("udp-echo", UDP_ECHO), ("tcp-echo", TCP_ECHO)] {
            let mut echo = Command::new(exec::product("edge-lab", "EDGE_LAB")?);
            echo.args([kind, "--listen", &format!("{}:{port}", pod.address), "--name", &pod.name]);
            self.serve(&pod.name, kind, &mut echo)?;
        }
        netns::within(&self.namespace(pod.node.name), || {
            wait_for(&format!("the servers of {}", pod.name), ANSWERING, || {
                let http = http_get((pod.address, 80).into(), Duration::from_secs(1))?;
                TcpStream::connect((pod.address, 443))?;
                TcpStream::connect((pod.address, TCP_ECHO))?;
                let udp = udp_ask((pod.address, UDP_ECHO).into(), "ready?", Duration::from_millis(200))?;
                ensure!(http == pod.name && udp.starts_with(&pod.name), "answered as {http} and {udp}");
                Ok(true)
            })
        })?;
        Ok(())
    }

    fn nginx_configuration(&self, name: &str) -> String {
        let folder = self.folder().join(name);
        let folder = folder.display();
        let run = self.folder();
        let run = run.display();
        // A kernel without IPv6 refuses the address.
        let listen_v6 =
            if Path::new("/proc/net/if_inet6").exists() { "listen [::]:80 backlog=4096 ipv6only=on;" } else { "" };
        // Workers stay few: the lab shares its cores with everything else.
        format!(
            r#"daemon off;
master_process off;
pid {folder}.nginx.pid;
worker_rlimit_nofile 65536;
events {{ worker_connections 16384; }}
http {{
  access_log off;
  client_body_temp_path {folder}.body;
  proxy_temp_path {folder}.proxy;
  fastcgi_temp_path {folder}.fastcgi;
  uwsgi_temp_path {folder}.uwsgi;
  scgi_temp_path {folder}.scgi;
  keepalive_requests 1000000000;
  keepalive_timeout 600s;
  default_type text/plain;
  server {{
    listen 80 backlog=4096;
    {listen_v6}
    listen 443 ssl backlog=4096;
    ssl_certificate {run}/tls.crt;
    ssl_certificate_key {run}/tls.key;
    location / {{ return 200 "{name}\n"; }}
    location = /client {{ return 200 "$remote_addr\n"; }}
    location = /{LARGE} {{ root {run}; }}
    location = /upload {{ client_max_body_size 0; return 200; }}
  }}
}}
"#
        )
    }

    /// Scales the ingress deployment as Kubernetes does: new pods enter DNS once they are ready; a pod that leaves
    /// is taken out of DNS at once and goes on serving what it has (see [`Lab::terminate`]); a later scale up finds
    /// it again.
    ///
    /// # Errors
    /// Where a pod cannot be made, does not answer, or the number is out of range.
    pub fn scale(&mut self, replicas: usize) -> Result<()> {
        ensure!(replicas <= topology::MOST_PODS, "at most {} pods", topology::MOST_PODS);
        let missing: Vec<Pod> =
            (1..=replicas).filter(|number| !self.state.pods.contains(number)).map(topology::ingress).collect();
        let lab: &Self = self;
        in_parallel(&missing, |pod| {
            if !netns::path(&lab.namespace(&pod.name)).exists() {
                lab.attach_pod(pod)?;
            }
            lab.start_ingress(pod)
        })?;
        self.state.pods.extend(1..=replicas);
        self.state.replicas = replicas;
        self.save()?;
        self.change_zone(|zone| {
            let addresses = (1..=replicas).map(|number| topology::ingress(number).address).collect();
            zone.services.entry(SERVICE.to_owned()).or_default().addresses = addresses;
        })
    }

    /// Ends a pod that has left DNS: its processes, and so its connections.
    ///
    /// # Errors
    /// Where the pod still is in the service, or does not end.
    pub fn terminate(&mut self, number: usize) -> Result<()> {
        ensure!(number > self.state.replicas, "ingress-{number} is in the service: scale down first");
        self.kill_in(&[&format!("ingress-{number}")])?;
        self.state.pods.remove(&number);
        self.save()
    }

    /// Makes both DNS servers behave so.
    ///
    /// # Errors
    /// Where the zone file cannot be written.
    pub fn dns_mode(&self, mode: DnsMode) -> Result<()> {
        self.change_zone(|zone| zone.mode = mode)
    }

    /// Changes what the DNS servers know. They see it with their next query.
    ///
    /// # Errors
    /// Where the zone file cannot be read or written.
    pub fn change_zone(&self, change: impl FnOnce(&mut Zone)) -> Result<()> {
        let path = self.zone_file();
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        let mut zone = serde_json::from_str(&text).with_context(|| format!("read {}", path.display()))?;
        change(&mut zone);
        self.write_zone(&zone)
    }

    /// Writes the first zone: the service without pods.
    pub(super) fn make_zone(&self) -> Result<()> {
        let ports = [("_http._tcp".to_owned(), 80), ("_https._tcp".to_owned(), 443)].into();
        let service = HeadlessService { ports, addresses: Vec::new() };
        self.write_zone(&Zone {
            mode: DnsMode::Normal,
            services: [(SERVICE.to_owned(), service)].into(),
            ..Zone::default()
        })
    }

    fn write_zone(&self, zone: &Zone) -> Result<()> {
        // Put in place whole: servers never read half of it.
        let new = self.folder().join("zone.new");
        fs::write(&new, serde_json::to_string_pretty(zone)?).with_context(|| format!("write {}", new.display()))?;
        fs::rename(&new, self.zone_file()).context("put the zone file in place")
    }

    fn zone_file(&self) -> std::path::PathBuf {
        self.folder().join("zone.json")
    }

    /// Asks a DNS server for the ingress service, from a host.
    ///
    /// # Errors
    /// Where there is no answer within a second.
    pub fn resolve_from(&self, host: &str, server: SocketAddr) -> Result<Vec<IpAddr>> {
        let mut message = Message::query();
        message.metadata.id = 7;
        message.add_query(Query::query(Name::from_ascii(format!("{SERVICE_NAME}."))?, RecordType::A));
        let query = message.to_vec()?;
        let answer = netns::within(&self.namespace(host), || {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.set_read_timeout(Some(Duration::from_secs(1)))?;
            socket.send_to(&query, server)?;
            let mut buffer = vec![0; 4096];
            let length = socket.recv(&mut buffer).with_context(|| format!("no answer from {server}"))?;
            buffer.truncate(length);
            Ok(buffer)
        })?;
        let answer = Message::from_vec(&answer).context("read the DNS answer")?;
        Ok(answer.answers.iter().filter_map(|record| record.data.ip_addr()).collect())
    }
}

/// Runs `work` for every item on a thread of its own; the first error wins.
pub(super) fn in_parallel<T: Sync>(items: &[T], work: impl Fn(&T) -> Result<()> + Sync) -> Result<()> {
    thread::scope(|scope| {
        let threads: Vec<_> = items.iter().map(|item| scope.spawn(|| work(item))).collect();
        threads.into_iter().try_for_each(|thread| match thread.join() {
            Ok(result) => result,
            Err(_) => bail!("a thread of the lab panicked"),
        })
    })
}

/// One HTTP request on a connection of its own, from the current namespace; the body without its newline.
///
/// # Errors
/// Where the connection or the request fails within `limit`, or the answer is not 200.
pub fn http_get(server: SocketAddr, limit: Duration) -> Result<String> {
    http_get_path(server, "/", limit)
}

/// As [`http_get`], with a path. `/client` is answered with the client's address as the pod sees it.
///
/// # Errors
/// As [`http_get`].
pub fn http_get_path(server: SocketAddr, path: &str, limit: Duration) -> Result<String> {
    let mut stream = TcpStream::connect_timeout(&server, limit).with_context(|| format!("connect to {server}"))?;
    stream.set_read_timeout(Some(limit))?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: ingress\r\nConnection: close\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).with_context(|| format!("read the answer of {server}"))?;
    let (head, body) = answer.split_once("\r\n\r\n").context("an answer without an empty line")?;
    ensure!(head.starts_with("HTTP/1.1 200"), "{server} answered {}", head.lines().next().unwrap_or_default());
    Ok(body.trim_end().to_owned())
}

/// One datagram from a socket of its own, in the current namespace, and the answer.
///
/// # Errors
/// Where there is no answer within `limit`.
pub fn udp_ask(server: SocketAddr, text: &str, limit: Duration) -> Result<String> {
    let any = if server.is_ipv4() { IpAddr::V4(Ipv4Addr::UNSPECIFIED) } else { IpAddr::V6(Ipv6Addr::UNSPECIFIED) };
    let socket = UdpSocket::bind((any, 0)).context("make a UDP socket")?;
    socket.connect(server)?;
    socket.set_read_timeout(Some(limit))?;
    socket.send(text.as_bytes()).with_context(|| format!("send to {server}"))?;
    let mut buffer = [0; 2048];
    let length = socket.recv(&mut buffer).with_context(|| format!("no answer from {server}/udp"))?;
    Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
}
