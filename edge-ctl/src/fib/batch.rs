//! Route changes, many requests to one system call. The kernel works through a buffer before `send` returns, so that
//! a table of a million costs eight thousand calls, and one withdrawal costs two and no wait.

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use rtnetlink::{
    packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage},
    packet_route::RouteNetlinkMessage,
    sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE},
};
use socket2::SockRef;

use super::{FibError, netlink::route_message, plan::RouteChange};

/// Requests in a buffer: where every one fails, the answers still fit into a receive buffer of default size.
const BATCH: usize = 128;
/// An answer is there when `send` returns; a kernel that has none by then is broken.
const PATIENCE: Duration = Duration::from_secs(5);
/// Octets of a message header, and of the error code behind it (`struct nlmsghdr`, `struct nlmsgerr`).
const HEADER: usize = 16;
const NLMSG_ERROR: u16 = 2;

/// A socket for route changes alone.
pub(super) struct Batches {
    socket: Socket,
    /// Its netlink port, by which our own changes are told from others'.
    pub(super) port: u32,
    sequence: AtomicU32,
}

impl Batches {
    pub(super) fn open() -> std::io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        let port = socket.bind_auto()?.port_number();
        socket.connect(&SocketAddr::new(0, 0))?;
        // Answers without the request that they answer.
        socket.set_cap_ack(true)?;
        SockRef::from(&socket).set_read_timeout(Some(PATIENCE))?;
        Ok(Self { socket, port, sequence: AtomicU32::new(1) })
    }

    /// Carries out changes in order, each with its result.
    pub(super) fn change(&self, changes: &[RouteChange]) -> Vec<Result<(), FibError>> {
        changes.chunks(BATCH).flat_map(|batch| self.batch(batch)).collect()
    }

    fn batch(&self, changes: &[RouteChange]) -> Vec<Result<(), FibError>> {
        let count = u32::try_from(changes.len()).unwrap_or(u32::MAX);
        let first = self.sequence.fetch_add(count, Ordering::Relaxed);
        let mut buffer = Vec::with_capacity(changes.len() * 64);
        let last = changes.len().saturating_sub(1);
        for (number, (sequence, change)) in (first..).zip(changes).enumerate() {
            // What fails is answered in any case; that the last is done says that all are.
            append(&mut buffer, change, sequence, number == last);
        }
        match self.exchange(&buffer, first, changes.len()) {
            Ok(errors) => changes.iter().zip(errors).map(|(change, errno)| result(change, errno)).collect(),
            Err(error) => {
                let refused = |change| Err(refused(change, &error));
                changes.iter().map(refused).collect()
            }
        }
    }

    /// Sends requests; the error number of each, 0 for those that were carried out.
    fn exchange(&self, buffer: &[u8], first: u32, count: usize) -> std::io::Result<Vec<i32>> {
        let mut errors = vec![0; count];
        self.socket.send(buffer, 0)?;
        let mut answer = Vec::with_capacity(32 * 1024);
        loop {
            answer.clear();
            self.socket.recv(&mut answer, 0)?;
            for (sequence, errno) in answers(&answer) {
                let number = sequence.wrapping_sub(first) as usize;
                if let Some(error) = errors.get_mut(number) {
                    *error = errno;
                }
                // Answers to an earlier buffer, given up on, are passed over.
                if number + 1 == count {
                    return Ok(errors);
                }
            }
        }
    }
}

fn append(buffer: &mut Vec<u8>, change: &RouteChange, sequence: u32, acknowledge: bool) {
    let (message, flags) = match change {
        RouteChange::Replace { prefix, metric, next_hops } => {
            let message = route_message(*prefix, *metric, next_hops);
            (RouteNetlinkMessage::NewRoute(message), NLM_F_CREATE | NLM_F_REPLACE)
        }
        RouteChange::Delete { prefix, metric } => {
            (RouteNetlinkMessage::DelRoute(route_message(*prefix, *metric, &[])), 0)
        }
    };
    let mut message = NetlinkMessage::from(message);
    message.header.flags = NLM_F_REQUEST | flags | if acknowledge { NLM_F_ACK } else { 0 };
    message.header.sequence_number = sequence;
    message.finalize();
    let start = buffer.len();
    buffer.resize(start + message.buffer_len().next_multiple_of(4), 0);
    message.serialize(&mut buffer[start..]);
}

/// Sequence number and error number of every answer in a buffer.
fn answers(mut bytes: &[u8]) -> impl Iterator<Item = (u32, i32)> {
    let word = |bytes: &[u8], at: usize| Some(i32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?));
    std::iter::from_fn(move || {
        loop {
            let length = usize::try_from(word(bytes, 0)?).ok().filter(|length| *length >= HEADER)?;
            let message = bytes.get(..length)?;
            bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
            let kind = u16::from_ne_bytes(*message.get(4..)?.first_chunk()?);
            if kind == NLMSG_ERROR {
                return Some((word(message, 8)?.cast_unsigned(), word(message, HEADER)?.checked_neg()?));
            }
        }
    })
}

fn result(change: &RouteChange, errno: i32) -> Result<(), FibError> {
    match (change, errno) {
        (_, 0) => Ok(()),
        // Gone already: that is what was wanted.
        (RouteChange::Delete { .. }, libc::ESRCH) => Ok(()),
        _ => Err(refused(change, &std::io::Error::from_raw_os_error(errno))),
    }
}

fn refused(change: &RouteChange, error: &std::io::Error) -> FibError {
    let verb = match change {
        RouteChange::Replace { .. } => "install",
        RouteChange::Delete { .. } => "delete",
    };
    let what = format!("{verb} the route to {}", change.prefix());
    FibError::Refused { what, reason: error.to_string(), errno: error.raw_os_error().unwrap_or(0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(sequence: u32, error: i32) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(36u32.to_ne_bytes());
        bytes.extend(NLMSG_ERROR.to_ne_bytes());
        bytes.extend([0; 2]);
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend(error.to_ne_bytes());
        bytes.extend([0; 16]);
        bytes
    }

    #[test]
    fn answers_are_told_apart_by_their_sequence_numbers_and_a_cut_one_is_none() {
        let all = [answer(7, -libc::EEXIST), answer(9, 0)].concat();
        assert_eq!(answers(&all).collect::<Vec<_>>(), [(7, libc::EEXIST), (9, 0)]);
        assert_eq!(answers(&all[..60]).collect::<Vec<_>>(), [(7, libc::EEXIST)]);
        assert_eq!(answers(&[0; 40]).count(), 0, "a length of nothing");
    }

    #[test]
    fn a_route_that_is_gone_already_is_deleted() {
        let (prefix, metric) = ("10.1.0.0/24".parse().unwrap(), 20);
        let delete = RouteChange::Delete { prefix, metric };
        assert_eq!(result(&delete, libc::ESRCH), Ok(()));
        let error = result(&delete, libc::EPERM).unwrap_err().to_string();
        assert!(error.contains("delete the route to 10.1.0.0/24") && error.contains("CAP_NET_ADMIN"), "{error}");
        let replace = RouteChange::Replace { prefix, metric, next_hops: vec![] };
        assert!(result(&replace, libc::ESRCH).is_err());
    }
}
