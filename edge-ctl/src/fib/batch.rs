//! Route changes, many requests to one system call. The kernel works through a buffer before `send` returns, so that
//! a table of a million costs eight thousand calls, and one withdrawal costs two and no wait.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use ipnet::IpNet;
use rtnetlink::{
    packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage},
    packet_route::{RouteNetlinkMessage, route::RouteAttribute},
    sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE},
};
use socket2::SockRef;

use super::{
    FibError, NextHopStyle, ObjectCounts,
    netlink::route_message,
    nexthop::{Kind, Object, Objects, Request, wire},
    plan::RouteChange,
};

/// Requests in a buffer: where every one fails, the answers still fit into a receive buffer of default size.
const BATCH: usize = 128;
/// An answer is there when `send` returns; a kernel that has none by then is broken.
const PATIENCE: Duration = Duration::from_secs(5);
/// Octets of a message header, and of the error code behind it (`struct nlmsghdr`, `struct nlmsgerr`).
const HEADER: usize = 16;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;

/// A socket for route changes alone.
pub(super) struct Batches {
    socket: Socket,
    /// Its netlink port, by which our own changes are told from others'.
    pub(super) port: u32,
    sequence: AtomicU32,
    objects: Mutex<Objects>,
}

impl Batches {
    pub(super) fn open(next_hops: NextHopStyle) -> std::io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        let port = socket.bind_auto()?.port_number();
        socket.connect(&SocketAddr::new(0, 0))?;
        // Answers without the request that they answer.
        socket.set_cap_ack(true)?;
        SockRef::from(&socket).set_read_timeout(Some(PATIENCE))?;
        Ok(Self { socket, port, sequence: AtomicU32::new(1), objects: Mutex::new(Objects::new(next_hops)) })
    }

    /// Carries out changes in order, each with its result.
    pub(super) fn change(&self, changes: &[RouteChange]) -> Vec<Result<(), FibError>> {
        let mut objects = self.objects.lock().unwrap_or_else(PoisonError::into_inner);
        let mut results = Vec::with_capacity(changes.len());
        let mut rest = changes;
        while !rest.is_empty() {
            let (requests, taken) = objects.requests(rest, BATCH);
            results.extend(self.carry_out(&mut objects, &requests));
            rest = rest.get(taken..).unwrap_or_default();
        }
        results
    }

    /// The results of the routes among the requests.
    fn carry_out(&self, objects: &mut Objects, requests: &[Request<'_>]) -> Vec<Result<(), FibError>> {
        let errors =
            match self.exchange(requests.len(), |number, sequence, last| append(&requests[number], sequence, last)) {
                Ok(errors) => errors,
                Err(error) => return routes(requests).map(|change| Err(refused(change, &error))).collect(),
            };
        let (mut results, mut again) = (Vec::with_capacity(requests.len()), Vec::new());
        for (request, errno) in requests.iter().zip(errors) {
            match request {
                Request::Make { .. } if errno == 0 => {}
                Request::Make { id, kind, .. } => not_made(objects, *id, kind, errno),
                Request::Route(change, Some(id)) if errno != 0 => {
                    // That there is no such object, among other things.
                    if errno == libc::EINVAL {
                        objects.failed(*id);
                    }
                    again.push((results.len(), Request::Route(change, None)));
                    results.push(Ok(()));
                }
                Request::Route(change, _) => results.push(result(change, errno)),
            }
        }
        if !again.is_empty() {
            let (places, inline): (Vec<usize>, Vec<Request<'_>>) = again.into_iter().unzip();
            for (place, result) in places.into_iter().zip(self.carry_out(objects, &inline)) {
                results.splice(place..=place, [result]);
            }
        }
        results
    }

    /// Sends requests, which `request` makes out of a number, a sequence number, and whether it is the last; the error
    /// number of each, 0 for those that were carried out.
    fn exchange(&self, count: usize, request: impl Fn(usize, u32, bool) -> Vec<u8>) -> std::io::Result<Vec<i32>> {
        let mut errors = vec![0; count];
        let first = self.sequence.fetch_add(u32::try_from(count).unwrap_or(u32::MAX), Ordering::Relaxed);
        let mut buffer = Vec::with_capacity(count * 64);
        for (number, sequence) in (first..).enumerate().take(count) {
            // What fails is answered in any case; that the last is done says that all are.
            buffer.extend(request(number, sequence, number + 1 == count));
        }
        self.socket.send(&buffer, 0)?;
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

    /// How many next-hop objects of ours there are.
    pub(super) fn counts(&self) -> ObjectCounts {
        self.objects.lock().unwrap_or_else(PoisonError::into_inner).counts()
    }

    /// The kernel's next-hop objects; `None`: it has none, or they are not used.
    pub(super) fn objects(&self) -> Result<Option<Vec<Object>>, FibError> {
        let mut objects = self.objects.lock().unwrap_or_else(PoisonError::into_inner);
        if !objects.are_used() {
            return Ok(None);
        }
        match self.dump() {
            Ok(all) => Ok(Some(all)),
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                tracing::info!(
                    "this kernel has no next-hop objects (Linux 5.3); routes name their gateways themselves"
                );
                objects.give_up();
                Ok(None)
            }
            Err(error) => Err(unread(&error)),
        }
    }

    /// Takes over what was read, with the object that each route names, and deletes those of ours that nothing uses.
    pub(super) fn settle(&self, all: &[Object], routes: &[(IpNet, u32)]) {
        let mut objects = self.objects.lock().unwrap_or_else(PoisonError::into_inner);
        for unused in objects.read(all, routes).chunks(BATCH) {
            let delete = |number: usize, sequence, last| wire::delete(unused[number], flags(0, last), sequence);
            // What stays is tried again by the next reading.
            match self.exchange(unused.len(), delete) {
                Ok(errors) if errors.iter().all(|errno| [0, libc::ENOENT].contains(errno)) => {}
                Ok(errors) => tracing::debug!(?errors, "next-hop objects that nothing uses were not deleted"),
                Err(error) => tracing::debug!(%error, "next-hop objects that nothing uses were not deleted"),
            }
        }
    }

    fn dump(&self) -> std::io::Result<Vec<Object>> {
        let own = self.sequence.fetch_add(1, Ordering::Relaxed);
        self.socket.send(&wire::dump(NLM_F_REQUEST | NLM_F_DUMP, own), 0)?;
        let mut all = Vec::new();
        let mut buffer = Vec::with_capacity(32 * 1024);
        loop {
            buffer.clear();
            self.socket.recv(&mut buffer, 0)?;
            for (kind, sequence, message) in messages(&buffer).filter(|(_, sequence, _)| *sequence == own) {
                match kind {
                    wire::NEW => all.extend(wire::object(message)),
                    NLMSG_DONE => return Ok(all),
                    NLMSG_ERROR => {
                        let errno =
                            answers(message).find(|(number, _)| *number == sequence).map_or(0, |(_, errno)| errno);
                        return Err(std::io::Error::from_raw_os_error(errno));
                    }
                    _ => {}
                }
            }
        }
    }
}

fn unread(error: &std::io::Error) -> FibError {
    FibError::Refused {
        what: "read the next-hop objects".into(),
        reason: error.to_string(),
        errno: error.raw_os_error().unwrap_or(0),
    }
}

fn not_made(objects: &mut Objects, id: u32, kind: &Kind, errno: i32) {
    let error = std::io::Error::from_raw_os_error(errno);
    objects.failed(id);
    match kind {
        _ if errno == libc::EOPNOTSUPP && !matches!(kind, Kind::Group { .. }) => {
            tracing::info!(%error, "this kernel has no next-hop objects; routes name their gateways themselves");
            objects.give_up();
        }
        Kind::Group { resilient: true, .. } => {
            tracing::warn!(%error, "no resilient group (Linux 5.13): groups are plain from now on");
            objects.no_resilience();
        }
        _ => tracing::debug!(id, %error, "no next-hop object; the route names its gateways itself"),
    }
}

fn routes<'a>(requests: &[Request<'a>]) -> impl Iterator<Item = &'a RouteChange> {
    requests.iter().filter_map(|request| match request {
        Request::Route(change, _) => Some(*change),
        Request::Make { .. } => None,
    })
}

fn flags(more: u16, acknowledge: bool) -> u16 {
    NLM_F_REQUEST | more | if acknowledge { NLM_F_ACK } else { 0 }
}

fn append(request: &Request<'_>, sequence: u32, acknowledge: bool) -> Vec<u8> {
    let (change, object) = match request {
        Request::Make { id, kind, replace } => {
            let create = NLM_F_CREATE | if *replace { NLM_F_REPLACE } else { NLM_F_EXCL };
            return wire::make(*id, kind, flags(create, acknowledge), sequence);
        }
        Request::Route(change, object) => (*change, *object),
    };
    let (message, more) = match change {
        RouteChange::Replace { prefix, metric, next_hops } => {
            let mut message = route_message(*prefix, *metric, if object.is_some() { &[] } else { next_hops });
            message.attributes.extend(object.map(RouteAttribute::NhId));
            (RouteNetlinkMessage::NewRoute(message), NLM_F_CREATE | NLM_F_REPLACE)
        }
        RouteChange::Delete { prefix, metric } => {
            (RouteNetlinkMessage::DelRoute(route_message(*prefix, *metric, &[])), 0)
        }
    };
    let mut message = NetlinkMessage::from(message);
    message.header.flags = flags(more, acknowledge);
    message.header.sequence_number = sequence;
    message.finalize();
    let mut bytes = vec![0; message.buffer_len().next_multiple_of(4)];
    message.serialize(&mut bytes);
    bytes
}

/// Type, sequence number and bytes of every message in a buffer.
pub(super) fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u16, u32, &[u8])> {
    let word = |bytes: &[u8], at: usize| Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?));
    std::iter::from_fn(move || {
        let length = usize::try_from(word(bytes, 0)?).ok().filter(|length| *length >= HEADER)?;
        let message = bytes.get(..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        let kind = u16::from_ne_bytes(*message.get(4..)?.first_chunk()?);
        Some((kind, word(message, 8)?, message))
    })
}

/// Sequence number and error number of every answer in a buffer.
fn answers(bytes: &[u8]) -> impl Iterator<Item = (u32, i32)> {
    messages(bytes).filter(|(kind, ..)| *kind == NLMSG_ERROR).filter_map(|(_, sequence, message)| {
        let code = i32::from_ne_bytes(*message.get(HEADER..)?.first_chunk()?);
        Some((sequence, code.checked_neg()?))
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
