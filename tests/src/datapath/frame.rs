//! Frames built and checked byte by byte, without any product code: checksums are summed up from scratch.

use std::net::{Ipv4Addr, SocketAddrV4};

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
    pub src: SocketAddrV4,
    /// Receiver.
    pub dst: SocketAddrV4,
    /// IP protocol number, 6 or 17.
    pub protocol: u8,
    /// Time to live.
    pub ttl: u8,
    /// Flags and fragment offset.
    pub fragment: u16,
    /// IPv4 options, a multiple of 4 bytes.
    pub options: Vec<u8>,
    /// TCP flags.
    pub flags: u8,
    /// TCP sequence number.
    pub seq: u32,
    /// TCP acknowledgement number.
    pub ack: u32,
    /// UDP: send without a checksum.
    pub no_checksum: bool,
    /// What follows the layer-4 header.
    pub payload: Vec<u8>,
}

impl Frame {
    /// A TCP segment with these flags and a few bytes of payload.
    pub fn tcp(src: SocketAddrV4, dst: SocketAddrV4, flags: u8) -> Self {
        Self {
            dst_mac: [2, 0, 0, 0, 0, 1],
            src_mac: [2, 0, 0, 0, 0, 2],
            src,
            dst,
            protocol: 6,
            ttl: 64,
            fragment: 0x4000,
            options: Vec::new(),
            flags,
            seq: 0x1234_5678,
            ack: 0x9abc_def0,
            no_checksum: false,
            payload: b"odd sized".to_vec(),
        }
    }

    /// A UDP datagram.
    pub fn udp(src: SocketAddrV4, dst: SocketAddrV4) -> Self {
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
        20 + self.options.len() + self.l4_len() + self.payload.len()
    }

    fn l4_len(&self) -> usize {
        if self.protocol == 6 { 20 } else { 8 }
    }

    /// The frame's bytes, all checksums right.
    pub fn bytes(&self) -> Vec<u8> {
        let mut frame = Vec::new();
        frame.extend(self.dst_mac);
        frame.extend(self.src_mac);
        frame.extend([0x08, 0x00]);
        let mut ip = vec![0x40 | (5 + self.options.len() / 4) as u8, 0];
        ip.extend((self.ip_len() as u16).to_be_bytes());
        ip.extend([0xbe, 0xef]);
        ip.extend(self.fragment.to_be_bytes());
        ip.extend([self.ttl, self.protocol, 0, 0]);
        ip.extend(self.src.ip().octets());
        ip.extend(self.dst.ip().octets());
        ip.extend(&self.options);
        let check = checksum(&[&ip]);
        ip[10..12].copy_from_slice(&check.to_be_bytes());
        frame.extend(&ip);
        frame.extend(self.layer_4());
        frame
    }

    fn layer_4(&self) -> Vec<u8> {
        let mut l4 = Vec::new();
        l4.extend(self.src.port().to_be_bytes());
        l4.extend(self.dst.port().to_be_bytes());
        let at = if self.protocol == 6 {
            l4.extend(self.seq.to_be_bytes());
            l4.extend(self.ack.to_be_bytes());
            l4.extend([0x50, self.flags, 0x20, 0x00, 0, 0, 0, 0]);
            16
        } else {
            l4.extend(((8 + self.payload.len()) as u16).to_be_bytes());
            l4.extend([0, 0]);
            6
        };
        l4.extend(&self.payload);
        if !self.no_checksum {
            let mut check = checksum(&[&pseudo(*self.src.ip(), *self.dst.ip(), self.protocol, l4.len()), &l4]);
            if check == 0 && self.protocol == 17 {
                check = 0xffff;
            }
            l4[at..at + 2].copy_from_slice(&check.to_be_bytes());
        }
        l4
    }

    /// What this frame must look like once translated to `src` -> `dst` and sent on by a router.
    pub fn translated(&self, src: SocketAddrV4, dst: SocketAddrV4, macs: Option<([u8; 6], [u8; 6])>) -> Vec<u8> {
        let (dst_mac, src_mac) = macs.unwrap_or((self.dst_mac, self.src_mac));
        Self { src, dst, dst_mac, src_mac, ttl: self.ttl - 1, ..self.clone() }.bytes()
    }
}

/// The addresses of a TCP or UDP frame without options, if its lengths and checksums are right.
pub fn endpoints_if_valid(frame: &[u8]) -> Option<(SocketAddrV4, SocketAddrV4)> {
    let ip = frame.get(14..34)?;
    let total = usize::from(u16::from_be_bytes([ip[2], ip[3]]));
    let l4 = frame.get(34..14 + total)?;
    let (src, dst) = (Ipv4Addr::new(ip[12], ip[13], ip[14], ip[15]), Ipv4Addr::new(ip[16], ip[17], ip[18], ip[19]));
    // Summed up with its own checksum, a correct packet gives zero.
    if ip[0] != 0x45 || checksum(&[ip]) != 0 || checksum(&[&pseudo(src, dst, ip[9], l4.len()), l4]) != 0 {
        return None;
    }
    let port = |at: usize| u16::from_be_bytes([l4[at], l4[at + 1]]);
    Some((SocketAddrV4::new(src, port(0)), SocketAddrV4::new(dst, port(2))))
}

fn pseudo(src: Ipv4Addr, dst: Ipv4Addr, protocol: u8, length: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(src.octets());
    bytes.extend(dst.octets());
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
