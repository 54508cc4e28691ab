//! A path, and the paths of one prefix: of a full table almost every prefix has one, which then needs no allocation.

use std::{sync::Arc, time::Duration};

use super::{Rejection, Route};

/// What policy made of a path, where that is not what was received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Changed(Arc<Route>),
    Rejected(Rejection),
}

/// What policy makes of a path; `None`: it is used as received.
pub(super) type Judged = Option<Box<Outcome>>;

/// A path learnt from a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Path {
    /// As the peer sent it.
    pub received: Arc<Route>,
    pub(super) judged: Judged,
    /// Path identifier (RFC 7911); 0 without ADD-PATH.
    pub id: u32,
    /// Seconds on the actor's clock.
    pub(super) learnt: u32,
    pub(super) source: u32,
    /// Its session is down, and the peer is expected back (RFC 4724 4.2).
    pub stale: bool,
}

impl Path {
    /// After policy; of a rejected path as received.
    pub fn used(&self) -> &Arc<Route> {
        match self.judged.as_deref() {
            Some(Outcome::Changed(route)) => route,
            None | Some(Outcome::Rejected(_)) => &self.received,
        }
    }

    /// Why it does not take part in route selection.
    pub fn rejection(&self) -> Option<Rejection> {
        match self.judged.as_deref() {
            Some(Outcome::Rejected(why)) => Some(*why),
            None | Some(Outcome::Changed(_)) => None,
        }
    }

    /// When it was learnt, on the actor's clock.
    pub const fn learnt(&self) -> Duration {
        Duration::from_secs(self.learnt as u64)
    }

    pub(super) const fn key(&self) -> (u32, u32) {
        (self.source, self.id)
    }
}

/// Paths of a prefix, by source and path identifier.
#[derive(Clone, Debug, Default)]
pub(super) enum Paths {
    #[default]
    None,
    One(Path),
    Many(Vec<Path>),
}

const _: () = assert!(size_of::<Paths>() == 32);

impl Paths {
    pub(super) fn as_slice(&self) -> &[Path] {
        match self {
            Self::None => &[],
            Self::One(path) => std::slice::from_ref(path),
            Self::Many(paths) => paths,
        }
    }

    pub(super) fn as_mut_slice(&mut self) -> &mut [Path] {
        match self {
            Self::None => &mut [],
            Self::One(path) => std::slice::from_mut(path),
            Self::Many(paths) => paths,
        }
    }

    pub(super) fn iter(&self) -> std::slice::Iter<'_, Path> {
        self.as_slice().iter()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.as_slice().is_empty()
    }

    /// Puts a path in, in place of the one with its key.
    pub(super) fn put(&mut self, path: Path) {
        let place = self.as_slice().binary_search_by_key(&path.key(), Path::key);
        if let Ok(index) = place {
            if let Some(old) = self.as_mut_slice().get_mut(index) {
                *old = path;
            }
            return;
        }
        let index = place.unwrap_or_else(|index| index);
        *self = match std::mem::take(self) {
            Self::None => Self::One(path),
            Self::One(other) if index == 0 => Self::Many(vec![path, other]),
            Self::One(other) => Self::Many(vec![other, path]),
            Self::Many(mut paths) => {
                paths.insert(index, path);
                Self::Many(paths)
            }
        };
    }

    /// Keeps those that `keep` says.
    pub(super) fn retain(&mut self, mut keep: impl FnMut(&mut Path) -> bool) {
        *self = match std::mem::take(self) {
            Self::None => Self::None,
            Self::One(mut path) => {
                if keep(&mut path) {
                    Self::One(path)
                } else {
                    Self::None
                }
            }
            Self::Many(mut paths) => {
                paths.retain_mut(keep);
                match paths.len() {
                    0 | 1 => paths.pop().map_or(Self::None, Self::One),
                    _ => Self::Many(paths),
                }
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;
    use crate::bgp::wire::Attributes;

    fn path(source: u32, id: u32) -> Path {
        let next_hop = IpAddr::from([10, 0, 0, 1]);
        let received = Arc::new(Route { attributes: Attributes::default(), next_hop });
        Path { received, judged: None, id, learnt: 0, source, stale: false }
    }

    #[test]
    fn paths_stand_in_order_once_each_whatever_the_order_they_come_in() {
        let mut paths = Paths::default();
        [(2, 0), (1, 7), (2, 0), (1, 3), (3, 0)].into_iter().for_each(|(source, id)| paths.put(path(source, id)));
        let keys = |paths: &Paths| paths.iter().map(Path::key).collect::<Vec<_>>();
        assert_eq!(keys(&paths), [(1, 3), (1, 7), (2, 0), (3, 0)]);
        paths.retain(|path| path.source == 1);
        assert_eq!(keys(&paths), [(1, 3), (1, 7)]);
        paths.retain(|path| path.id == 7);
        assert!(matches!(&paths, Paths::One(only) if only.id == 7), "one path needs no list");
        paths.retain(|_| false);
        assert!(paths.is_empty());
    }
}
