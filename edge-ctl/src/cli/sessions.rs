//! Orders for BGP sessions, and their last messages as a table or as a pcap file that other tools can read.

use std::{
    borrow::Cow,
    fs::File,
    io::Write,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use clap::Args;
use pcap_file::{
    DataLink,
    pcap::{PcapHeader, PcapPacket, PcapWriter},
};

use super::{
    Exit,
    args::BgpVerb,
    commands::{Failure, Outcome, Source, print, rows},
    views,
};
use crate::model::{
    bgp_session::{Order, PeerOrder},
    query::Query,
    view::BgpMessageRow,
};

/// A peer, or all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Whom(Option<IpAddr>);

fn whom(text: &str) -> Result<Whom, String> {
    match (text, crate::model::scope::parse(text)) {
        ("all", _) => Ok(Whom(None)),
        (_, Ok(address)) => Ok(Whom(Some(address))),
        _ => Err("expected a peer's address, or `all`".to_owned()),
    }
}

/// For whom an order is.
#[derive(Debug, Args)]
pub(super) struct Target {
    /// The peer's address, or `all`
    #[arg(value_parser = whom)]
    pub peer: Whom,
}

#[derive(Debug, Args)]
pub(super) struct MessagesArgs {
    /// The peer's address
    #[arg(value_parser = crate::model::scope::parse)]
    pub peer: IpAddr,
    /// Write them to this file, pcap
    #[arg(value_name = "FILE")]
    pub write: Option<PathBuf>,
}

/// RFC 9003 2: a shutdown message has at most 128 octets where it should be read everywhere.
pub(super) fn message(text: &str) -> Result<String, String> {
    if text.len() <= 128 { Ok(text.to_owned()) } else { Err("at most 128 octets (RFC 9003)".to_owned()) }
}

/// The order that a command stands for; `None`: it is none.
fn order(verb: &BgpVerb) -> Option<PeerOrder> {
    let (target, what) = match verb {
        BgpVerb::Clear { target, soft: true } => (target, Order::Refresh),
        BgpVerb::Clear { target, soft: false } => (target, Order::Clear),
        BgpVerb::Shutdown { target, message } => (target, Order::Shutdown(message.clone().unwrap_or_default())),
        BgpVerb::Enable { target } => (target, Order::Enable),
        _ => return None,
    };
    Some(PeerOrder { peer: target.peer.0, what })
}

/// Gives an order, or shows messages.
pub(super) fn run(source: &Source<'_>, verb: &BgpVerb) -> Outcome<Exit> {
    if source.global.kernel {
        let message = "BGP sessions are the daemon's; `--kernel` only reads maps".into();
        return Err(Failure { exit: Exit::Usage, message });
    }
    if let BgpVerb::Messages(args) = verb {
        return messages(source, args);
    }
    let Some(order) = order(verb) else { return Ok(Exit::Usage) };
    let (text, exit) = rows(source, &views::BGP_SUMMARY, source.rows(&Query::BgpOrder(order))?)?;
    print(&text);
    Ok(exit)
}

fn messages(source: &Source<'_>, args: &MessagesArgs) -> Outcome<Exit> {
    let found = source.rows(&Query::BgpMessages(args.peer))?;
    let Some(file) = &args.write else {
        let (text, exit) = rows(source, &views::BGP_MESSAGES, found)?;
        print(&text);
        return Ok(exit);
    };
    let read = |row| serde_json::from_value(row).map_err(Failure::error);
    let messages: Vec<BgpMessageRow> = found.into_iter().map(read).collect::<Outcome<_>>()?;
    let failed = |error: String| Failure::error(format!("writing {}: {error}", file.display()));
    write(file, &messages).map_err(failed)?;
    eprintln!("{} messages written", messages.len());
    Ok(Exit::Ok)
}

fn write(file: &Path, messages: &[BgpMessageRow]) -> Result<(), String> {
    let file = File::create(file).map_err(|error| error.to_string())?;
    pcap(file, messages).map_err(|error| error.to_string())
}

/// Raw IP packets: each message in a TCP segment of its own, with the sequence numbers that follow from the messages
/// before it on the same connection, so that tools put streams together. Checksums are zero: nothing was on a wire so.
fn pcap(out: impl Write, messages: &[BgpMessageRow]) -> Result<(), pcap_file::PcapError> {
    let header = PcapHeader { datalink: DataLink::RAW, snaplen: 65_535 + 60, ..PcapHeader::default() };
    let mut writer = PcapWriter::with_header(out, header)?;
    let mut sequences: std::collections::HashMap<(SocketAddr, SocketAddr), u32> = Default::default();
    for message in messages {
        let bytes = unhex(&message.bytes);
        let (from, to) = if message.sent { (message.local, message.remote) } else { (message.remote, message.local) };
        let acknowledged = sequences.get(&(to, from)).copied().unwrap_or(1);
        let sequence = sequences.entry((from, to)).or_insert(1);
        // What IP can carry; a message of RFC 8654 may be a little longer.
        let most = 65_535 - 60;
        let packet = packet(from, to, *sequence, acknowledged, &bytes[..bytes.len().min(most)]);
        *sequence = sequence.wrapping_add(u32::try_from(bytes.len()).unwrap_or_default());
        writer.write_packet(&PcapPacket {
            timestamp: Duration::from_micros(message.time),
            orig_len: u32::try_from(packet.len()).unwrap_or(u32::MAX),
            data: Cow::Owned(packet),
        })?;
    }
    Ok(())
}

fn unhex(text: &str) -> Vec<u8> {
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok()).unwrap_or(0);
    text.as_bytes().chunks_exact(2).map(|pair| digit(pair[0]) << 4 | digit(pair[1])).collect()
}

/// IP, TCP (PSH and ACK), payload.
fn packet(from: SocketAddr, to: SocketAddr, sequence: u32, acknowledged: u32, payload: &[u8]) -> Vec<u8> {
    const TCP: u8 = 6;
    let mut tcp = Vec::with_capacity(20 + payload.len());
    tcp.extend_from_slice(&from.port().to_be_bytes());
    tcp.extend_from_slice(&to.port().to_be_bytes());
    tcp.extend_from_slice(&sequence.to_be_bytes());
    tcp.extend_from_slice(&acknowledged.to_be_bytes());
    tcp.extend_from_slice(&[5 << 4, 0x18, 0xff, 0xff, 0, 0, 0, 0]);
    tcp.extend_from_slice(payload);
    let length = |extra: usize| u16::try_from(tcp.len() + extra).unwrap_or(u16::MAX).to_be_bytes();
    let mut packet = Vec::new();
    match (from.ip(), to.ip()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let length = length(20);
            packet.extend_from_slice(&[0x45, 0xc0, length[0], length[1], 0, 0, 0x40, 0, 64, TCP, 0, 0]);
            packet.extend_from_slice(&source.octets());
            packet.extend_from_slice(&destination.octets());
        }
        (source, destination) => {
            let octets = |address: IpAddr| match address {
                IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
                IpAddr::V6(address) => address.octets(),
            };
            let length = length(0);
            packet.extend_from_slice(&[0x6c, 0, 0, 0, length[0], length[1], TCP, 64]);
            packet.extend_from_slice(&octets(source));
            packet.extend_from_slice(&octets(destination));
        }
    }
    packet.append(&mut tcp);
    packet
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_for_one_peer_or_for_all() {
        assert_eq!(whom("all"), Ok(Whom(None)));
        assert_eq!(whom("fd00::2"), Ok(Whom(Some("fd00::2".parse().unwrap()))));
        assert!(whom("kcontrol").is_err());
        assert!(message(&"x".repeat(128)).is_ok() && message(&"x".repeat(129)).is_err());
    }

    #[test]
    fn messages_become_segments_whose_sequence_numbers_follow_each_other() {
        let row = |sent, bytes: &str| BgpMessageRow {
            time: 1_000_000,
            sent,
            local: "10.0.0.1:179".parse().unwrap(),
            remote: "10.0.0.2:40000".parse().unwrap(),
            kind: "KEEPALIVE".to_owned(),
            length: bytes.len() / 2,
            bytes: bytes.to_owned(),
        };
        let mut file = Vec::new();
        pcap(&mut file, &[row(true, &"ff".repeat(19)), row(false, "0102"), row(true, "03")]).unwrap();
        let mut reader = pcap_file::pcap::PcapReader::new(file.as_slice()).unwrap();
        assert_eq!(reader.header().datalink, DataLink::RAW);
        let mut packets = Vec::new();
        while let Some(packet) = reader.next_packet() {
            packets.push(packet.unwrap().data.into_owned());
        }
        assert_eq!(packets.len(), 3);
        let word = |packet: &[u8], at: usize| u32::from_be_bytes(packet[at..at + 4].try_into().unwrap());
        assert_eq!((word(&packets[0], 24), word(&packets[0], 28)), (1, 1));
        assert_eq!((word(&packets[1], 24), word(&packets[1], 28)), (1, 20));
        assert_eq!((word(&packets[2], 24), word(&packets[2], 28)), (20, 3));
        assert_eq!(packets[1][40..], [1, 2]);
        assert_eq!(packets[0][12..20], [10, 0, 0, 1, 10, 0, 0, 2]);
    }
}
