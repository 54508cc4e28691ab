//! Frames built and checked byte by byte, without any product code: checksums are summed up from scratch.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// TCP flag bits (RFC 9293).
pub mod flag {
    /// FIN.
    pub const FIN: u8 = 1;
    /// SYN.
    pub const SYN: u8 = 2;
    /// RST.
    pub const RST: u8 = 4;
    /// ACK.
    pub const ACK: u8 = 16;
}

/// A TCP or UDP packet in an Ethernet frame, before it becomes bytes.
#[derive(Clone, Debug)]
pub struct Frame {
    /// Destination MAC.
    pub dst_mac: [u8; 6],
    /// Source MAC.
    pub src_mac: [u8; 6],
    /// Sender.
    pub src: SocketAddr,
    /// Receiver, of the same family.
    pub dst: SocketAddr,
    /// IP protocol number, 6 or 17.
    pub protocol: u8,
    /// Time to live, or hop limit.
    pub ttl: u8,
    /// Flags and fragment offset; nothing of IPv6.
    pub fragment: u16,
    /// IPv4 options, a multiple of 4 bytes.
    pub options: Vec<u8>,
    /// IPv6 extension headers: each its number and its bytes, the first of which is written here.
    pub extensions: Vec<(u8, Vec<u8>)>,
    /// TCP flags.
    pub flags: u8,
    /// TCP sequence number.
    pub seq: u32,
    /// TCP acknowledgement number.
    pub ack: u32,
    /// TCP options, a multiple of 4 bytes.
    pub tcp_options: Vec<u8>,
    /// UDP: send without a checksum.
    pub no_checksum: bool,
    /// What follows the layer-4 header.
    pub payload: Vec<u8>,
}

impl Frame {
    /// A TCP segment with these flags and a few bytes of payload.
    pub fn tcp(src: impl Into<SocketAddr>, dst: impl Into<SocketAddr>, flags: u8) -> Self {
        Self {
            dst_mac: [2, 0, 0, 0, 0, 1],
            src_mac: [2, 0, 0, 0, 0, 2],
            src: src.into(),
            dst: dst.into(),
            protocol: 6,
            ttl: 64,
            fragment: 0x4000,
            options: Vec::new(),
            extensions: Vec::new(),
            flags,
            seq: 0x1234_5678,
            ack: 0x9abc_def0,
            tcp_options: Vec::new(),
            no_checksum: false,
            payload: b"odd sized".to_vec(),
        }
    }

    /// A UDP datagram.
    pub fn udp(src: impl Into<SocketAddr>, dst: impl Into<SocketAddr>) -> Self {
        Self { protocol: 17, fragment: 0, ..Self::tcp(src, dst, 0) }
    }

    /// With a sequence number.
    pub fn seq(self, seq: u32) -> Self {
        Self { seq, ..self }
    }

    /// With an acknowledgement number.
    pub fn ack(self, ack: u32) -> Self {
        Self { ack, ..self }
    }

    /// With a payload.
    pub fn payload(self, payload: Vec<u8>) -> Self {
        Self { payload, ..self }
    }

    /// Length from the IP header on.
    pub fn ip_len(&self) -> usize {
        self.header_len() + self.l4_len() + self.payload.len()
    }

    /// Length of the IP header, with options or extension headers.
    pub fn header_len(&self) -> usize {
        if self.src.is_ipv4() {
            20 + self.options.len()
        } else {
            40 + self.extensions.iter().map(|(_, bytes)| bytes.len()).sum::<usize>()
        }
    }

    fn l4_len(&self) -> usize {
        if self.protocol == 6 { 20 + self.tcp_options.len() } else { 8 }
    }

    /// The frame's bytes, all checksums right.
    pub fn bytes(&self) -> Vec<u8> {
        let mut frame = Vec::new();
        frame.extend(self.dst_mac);
        frame.extend(self.src_mac);
        match (self.src.ip(), self.dst.ip()) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => self.ipv4(&mut frame, src, dst),
            (src, dst) => self.ipv6(&mut frame, as_ipv6(src), as_ipv6(dst)),
        }
        frame.extend(self.layer_4());
        frame
    }

    fn ipv4(&self, frame: &mut Vec<u8>, src: Ipv4Addr, dst: Ipv4Addr) {
        frame.extend([0x08, 0x00]);
        let mut ip = vec![0x40 | (5 + self.options.len() / 4) as u8, 0];
        ip.extend((self.ip_len() as u16).to_be_bytes());
        ip.extend([0xbe, 0xef]);
        ip.extend(self.fragment.to_be_bytes());
        ip.extend([self.ttl, self.protocol, 0, 0]);
        ip.extend(src.octets());
        ip.extend(dst.octets());
        ip.extend(&self.options);
        let check = checksum(&[&ip]);
        ip[10..12].copy_from_slice(&check.to_be_bytes());
        frame.extend(&ip);
    }

    fn ipv6(&self, frame: &mut Vec<u8>, src: Ipv6Addr, dst: Ipv6Addr) {
        frame.extend([0x86, 0xdd]);
        // Version, a traffic class and a flow label.
        frame.extend([0x6a, 0xb1, 0x23, 0x45]);
        frame.extend(((self.ip_len() - 40) as u16).to_be_bytes());
        let numbers: Vec<u8> = self.extensions.iter().map(|(number, _)| *number).chain([self.protocol]).collect();
        frame.extend([numbers[0], self.ttl]);
        frame.extend(src.octets());
        frame.extend(dst.octets());
        for ((_, bytes), next) in self.extensions.iter().zip(&numbers[1..]) {
            frame.push(*next);
            frame.extend(&bytes[1..]);
        }
    }

    fn layer_4(&self) -> Vec<u8> {
        let mut l4 = Vec::new();
        l4.extend(self.src.port().to_be_bytes());
        l4.extend(self.dst.port().to_be_bytes());
        let at = if self.protocol == 6 {
            l4.extend(self.seq.to_be_bytes());
            l4.extend(self.ack.to_be_bytes());
            let words = 5 + self.tcp_options.len() / 4;
            l4.extend([(words << 4) as u8, self.flags, 0x20, 0x00, 0, 0, 0, 0]);
            l4.extend(&self.tcp_options);
            16
        } else {
            l4.extend(((8 + self.payload.len()) as u16).to_be_bytes());
            l4.extend([0, 0]);
            6
        };
        l4.extend(&self.payload);
        if !self.no_checksum {
            let mut check = checksum(&[&pseudo(self.src.ip(), self.dst.ip(), self.protocol, l4.len()), &l4]);
            if check == 0 && self.protocol == 17 {
                check = 0xffff;
            }
            l4[at..at + 2].copy_from_slice(&check.to_be_bytes());
        }
        l4
    }

    /// What this frame must look like once translated to `src` -> `dst` and sent on by a router.
    pub fn translated(
        &self,
        src: impl Into<SocketAddr>,
        dst: impl Into<SocketAddr>,
        macs: Option<([u8; 6], [u8; 6])>,
    ) -> Vec<u8> {
        let (src, dst) = (src.into(), dst.into());
        let (dst_mac, src_mac) = macs.unwrap_or((self.dst_mac, self.src_mac));
        Self { src, dst, dst_mac, src_mac, ttl: self.ttl - 1, ..self.clone() }.bytes()
    }
}

fn as_ipv6(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    }
}

/// The addresses of a TCP or UDP frame without options or extension headers, if its lengths and checksums are right.
pub fn endpoints_if_valid(frame: &[u8]) -> Option<(SocketAddr, SocketAddr)> {
    let is_ipv4 = frame.get(12..14)? == [0x08, 0x00];
    let (ip, total, protocol) = if is_ipv4 {
        let ip = frame.get(14..34)?;
        (ip, usize::from(u16::from_be_bytes([ip[2], ip[3]])), ip[9])
    } else {
        let ip = frame.get(14..54)?;
        (ip, 40 + usize::from(u16::from_be_bytes([ip[4], ip[5]])), ip[6])
    };
    let l4 = frame.get(14 + ip.len()..14 + total)?;
    let address = |at: usize| match is_ipv4 {
        true => <[u8; 4]>::try_from(&ip[at..at + 4]).ok().map(IpAddr::from),
        false => <[u8; 16]>::try_from(&ip[at..at + 16]).ok().map(IpAddr::from),
    };
    let (src, dst) = if is_ipv4 { (address(12)?, address(16)?) } else { (address(8)?, address(24)?) };
    // Summed up with its own checksum, a correct packet gives zero; IPv6 has no header checksum.
    let header_is_right = if is_ipv4 { ip[0] == 0x45 && checksum(&[ip]) == 0 } else { ip[0] >> 4 == 6 };
    if !header_is_right || checksum(&[&pseudo(src, dst, protocol, l4.len()), l4]) != 0 {
        return None;
    }
    let port = |at: usize| u16::from_be_bytes([l4[at], l4[at + 1]]);
    Some((SocketAddr::new(src, port(0)), SocketAddr::new(dst, port(2))))
}

/// The pseudo-header of RFC 9293 (IPv4) or RFC 8200, section 8.1 (IPv6); both sum up to the same fields.
pub(super) fn pseudo(src: IpAddr, dst: IpAddr, protocol: u8, length: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    for address in [src, dst] {
        match address {
            IpAddr::V4(address) => bytes.extend(address.octets()),
            IpAddr::V6(address) => bytes.extend(address.octets()),
        }
    }
    bytes.extend([0, protocol]);
    bytes.extend((length as u16).to_be_bytes());
    bytes
}

/// The Internet checksum (RFC 1071) of the parts, each but the last of even length.
pub fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0u64;
    for part in parts {
        for pair in part.chunks(2) {
            sum += u64::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
        }
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
