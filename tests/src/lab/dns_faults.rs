//! What the lab's DNS server does wrong on purpose. Pure: the honest answer comes in, what is sent and when goes out.

use std::{net::Ipv4Addr, time::Duration};

use hickory_proto::{
    op::{Message, ResponseCode},
    rr::{Name, RData, Record, RecordType, rdata::A},
};
use serde::{Deserialize, Serialize};

use super::dns::Transport;

/// One way to be wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fault {
    /// The right answer, so many milliseconds late.
    Delay(u64),
    /// No answer.
    Drop,
    /// SERVFAIL.
    Servfail,
    /// REFUSED.
    Refused,
    /// NOTIMP, with EDNS and without.
    Notimp,
    /// FORMERR to queries with EDNS, as by a server that knows none; right without.
    NoEdns,
    /// NXDOMAIN.
    Nxdomain,
    /// NOERROR without records.
    Empty,
    /// Cut off within the header's counts: more records promised than there are.
    Malformed,
    /// TC over UDP with half the records; right over TCP.
    Truncated,
    /// TC over UDP, and TCP closes at once.
    TruncatedForEver,
    /// The right answer under another id.
    WrongId,
    /// A wrong id with the liar's addresses first, then the right answer.
    WrongIdFirst(Vec<Ipv4Addr>),
    /// The right answer to another question.
    WrongQuestion,
    /// These addresses instead of the right ones.
    Lie(Vec<Ipv4Addr>),
    /// These addresses beside the right ones.
    Add(Vec<Ipv4Addr>),
    /// Only the first so many of the right ones.
    Only(usize),
    /// The right ones and these, under another name than was asked for.
    Stranger(Vec<Ipv4Addr>),
    /// TTL 0.
    ZeroTtl,
    /// Name and question in the other case.
    OtherCase,
    /// So many addresses within 10.1.128.0/17 over TCP, or as many as a message holds.
    Many(usize),
    /// A chain of so many aliases before the right addresses.
    Aliases(usize),
    /// An alias of itself.
    Loop,
}

/// What to send, in order: how long to wait before, and the bytes.
pub type Sends = Vec<(Duration, Vec<u8>)>;

/// What a server with this fault sends instead of the honest `answer`; empty: nothing (over TCP, it closes).
pub fn spoil(fault: &Fault, query: &[u8], answer: Vec<u8>, transport: Transport) -> Sends {
    let at_once = |bytes: Vec<u8>| vec![(Duration::ZERO, bytes)];
    match fault {
        Fault::Delay(late) => vec![(Duration::from_millis(*late), answer)],
        Fault::Drop => Vec::new(),
        Fault::TruncatedForEver if transport == Transport::Tcp => Vec::new(),
        Fault::Truncated if transport == Transport::Tcp => at_once(answer),
        Fault::Malformed => at_once(answer.into_iter().take(14).collect()),
        Fault::WrongId => at_once(with_other_id(answer)),
        Fault::WrongIdFirst(lies) => {
            let lie = changed(&answer, |message| replace(message, lies));
            [lie.map(with_other_id), Some(answer)].into_iter().flatten().map(|bytes| (Duration::ZERO, bytes)).collect()
        }
        Fault::Many(count) => many(&answer, *count, transport).map(at_once).unwrap_or_default(),
        Fault::NoEdns => match Message::from_vec(query) {
            Ok(asked) if asked.edns.is_some() => {
                changed(&answer, |message| code(message, ResponseCode::FormErr)).map(at_once).unwrap_or_default()
            }
            _ => at_once(answer),
        },
        _ => changed(&answer, |message| change(fault, message)).map(at_once).unwrap_or_default(),
    }
}

fn with_other_id(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(first) = bytes.first_mut() {
        *first ^= 0x55;
    }
    bytes
}

/// The message after `change`; `None` where it cannot be read or written.
fn changed(bytes: &[u8], change: impl FnOnce(&mut Message)) -> Option<Vec<u8>> {
    let mut message = Message::from_vec(bytes).ok()?;
    change(&mut message);
    message.to_vec().ok()
}

fn code(message: &mut Message, code: ResponseCode) {
    message.answers.clear();
    message.additionals.clear();
    message.metadata.response_code = code;
}

fn asked(message: &Message) -> Name {
    message.queries.first().map(|query| query.name().clone()).unwrap_or_default()
}

fn a(name: &Name, address: Ipv4Addr) -> Record {
    Record::from_rdata(name.clone(), 5, RData::A(A(address)))
}

fn alias(name: &Name, target: Name) -> Record {
    Record::from_rdata(name.clone(), 5, RData::CNAME(hickory_proto::rr::rdata::CNAME(target)))
}

fn replace(message: &mut Message, addresses: &[Ipv4Addr]) {
    let name = asked(message);
    message.metadata.response_code = ResponseCode::NoError;
    message.authorities.clear();
    message.answers = addresses.iter().map(|address| a(&name, *address)).collect();
}

fn change(fault: &Fault, message: &mut Message) {
    let name = asked(message);
    match fault {
        Fault::Servfail => code(message, ResponseCode::ServFail),
        Fault::Refused => code(message, ResponseCode::Refused),
        Fault::Notimp => code(message, ResponseCode::NotImp),
        Fault::Nxdomain => code(message, ResponseCode::NXDomain),
        Fault::Empty => code(message, ResponseCode::NoError),
        Fault::Truncated | Fault::TruncatedForEver => {
            let half = message.answers.len() / 2;
            message.answers.truncate(half);
            message.metadata.truncation = true;
        }
        Fault::WrongQuestion => rename(message, &Name::from_ascii("elsewhere.cluster.local.").unwrap_or_default()),
        Fault::OtherCase => {
            let flip = |c: char| if c.is_ascii_lowercase() { c.to_ascii_uppercase() } else { c.to_ascii_lowercase() };
            let flipped: String = name.to_ascii().chars().map(flip).collect();
            rename(message, &Name::from_ascii(flipped).unwrap_or_default());
        }
        Fault::Lie(addresses) => replace(message, addresses),
        Fault::Add(addresses) => message.answers.extend(addresses.iter().map(|address| a(&name, *address))),
        Fault::Only(count) => message.answers.truncate(*count),
        Fault::Stranger(addresses) => {
            let other = Name::from_ascii("elsewhere.cluster.local.").unwrap_or_default();
            message.answers.extend(addresses.iter().map(|address| a(&other, *address)));
        }
        Fault::ZeroTtl => message.answers.iter_mut().for_each(|record| record.ttl = 0),
        Fault::Aliases(count) => {
            let link = |number: usize| Name::from_ascii(format!("a{number}.cluster.local.")).unwrap_or_default();
            let last = link(*count);
            for record in &mut message.answers {
                record.name = last.clone();
            }
            let owner = |number: usize| if number == 0 { name.clone() } else { link(number) };
            let chain = (0..*count).map(|number| alias(&owner(number), link(number + 1)));
            message.answers = chain.chain(std::mem::take(&mut message.answers)).collect();
        }
        Fault::Loop => message.answers = vec![alias(&name, name.clone())],
        // Dealt with before.
        _ => {}
    }
}

fn rename(message: &mut Message, name: &Name) {
    for query in &mut message.queries {
        query.set_name(name.clone());
    }
    for record in message.answers.iter_mut().filter(|record| record.record_type() == RecordType::A) {
        record.name = name.clone();
    }
}

/// A message of 65,535 bytes holds 4,090 addresses or so: the counts tell of no more than there are. Put together by hand,
/// since the encoder of a debug build takes longer over them than a client waits.
fn many(answer: &[u8], count: usize, transport: Transport) -> Option<Vec<u8>> {
    let mut bytes = changed(answer, |message| {
        message.answers.clear();
        message.additionals.clear();
        message.authorities.clear();
        message.edns = None;
        message.metadata.response_code = ResponseCode::NoError;
        message.metadata.truncation = transport == Transport::Udp;
    })?;
    if transport == Transport::Tcp {
        let count = u16::try_from(count.min(4_000)).ok()?;
        // ANCOUNT (RFC 1035 4.1.1).
        bytes.get_mut(6..8)?.copy_from_slice(&count.to_be_bytes());
        for number in 0..count {
            let [third, fourth] = (number | 0x8000).to_be_bytes();
            // A pointer to the question's name, A, IN, TTL 5, four bytes.
            bytes.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 5, 0, 4, 10, 1, third, fourth]);
        }
    }
    Some(bytes)
}
