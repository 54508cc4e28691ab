//! ICMP messages built byte by byte, without any product code.

use std::net::Ipv4Addr;

use super::frame::checksum;

/// An ICMP message about a packet, before it becomes bytes.
#[derive(Clone, Debug)]
pub struct IcmpError {
    /// Destination MAC.
    pub dst_mac: [u8; 6],
    /// Source MAC.
    pub src_mac: [u8; 6],
    /// Who tells.
    pub src: Ipv4Addr,
    /// Who is told.
    pub dst: Ipv4Addr,
    /// Time to live.
    pub ttl: u8,
    /// Type of service.
    pub tos: u8,
    /// IP ID.
    pub id: u16,
    /// Flags and fragment offset.
    pub fragment: u16,
    /// IPv4 options of the message itself, a multiple of 4 bytes.
    pub options: Vec<u8>,
    /// ICMP type.
    pub kind: u8,
    /// ICMP code.
    pub code: u8,
    /// The second word: an MTU, a pointer, or nothing.
    pub rest: [u8; 4],
    /// The packet it is about, from its IP header on, as far as quoted.
    pub quote: Vec<u8>,
}

impl IcmpError {
    /// A message about `quote`.
    pub fn new(src: Ipv4Addr, dst: Ipv4Addr, kind: u8, code: u8, quote: &[u8]) -> Self {
        Self {
            dst_mac: [2, 0, 0, 0, 0, 1],
            src_mac: [2, 0, 0, 0, 0, 2],
            src,
            dst,
            ttl: 64,
            tos: 0xc0,
            id: 0x1234,
            fragment: 0,
            options: Vec::new(),
            kind,
            code,
            rest: [0; 4],
            quote: quote.to_vec(),
        }
    }

    /// As a router sends it on to the next hop with these MACs (destination, source).
    pub fn forwarded(self, macs: ([u8; 6], [u8; 6])) -> Self {
        Self { dst_mac: macs.0, src_mac: macs.1, ttl: self.ttl - 1, ..self }
    }

    /// The frame's bytes, all checksums right.
    pub fn bytes(&self) -> Vec<u8> {
        let mut icmp = vec![self.kind, self.code, 0, 0];
        icmp.extend(self.rest);
        icmp.extend(&self.quote);
        let check = checksum(&[&icmp]);
        icmp[2..4].copy_from_slice(&check.to_be_bytes());
        let mut ip = vec![0x45 + (self.options.len() / 4) as u8, self.tos];
        ip.extend(((20 + self.options.len() + icmp.len()) as u16).to_be_bytes());
        ip.extend(self.id.to_be_bytes());
        ip.extend(self.fragment.to_be_bytes());
        ip.extend([self.ttl, 1, 0, 0]);
        ip.extend(self.src.octets());
        ip.extend(self.dst.octets());
        ip.extend(&self.options);
        let check = checksum(&[&ip]);
        ip[10..12].copy_from_slice(&check.to_be_bytes());
        let mut frame = Vec::new();
        frame.extend(self.dst_mac);
        frame.extend(self.src_mac);
        frame.extend([0x08, 0x00]);
        frame.extend(ip);
        frame.extend(icmp);
        frame
    }
}
