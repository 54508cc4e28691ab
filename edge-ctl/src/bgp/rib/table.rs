//! Prefixes in order, each family by itself, in leaves of up to [`LEAF`] entries: a value costs its own size and its key's,
//! where a map with a node for each would cost twice as much, and a million prefixes that come in order fill every leaf.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// Entries of a leaf: few enough that one which comes out of order moves at most some kilobytes.
const LEAF: usize = 128;

/// Leaves by a key that is not above any of their entries'; an entry lies in the last leaf whose key is not above its own.
#[derive(Clone, Debug)]
struct Leaves<K, T>(BTreeMap<K, Vec<(K, T)>>);

impl<K: Copy + Ord, T: Default> Leaves<K, T> {
    const fn new() -> Self {
        Self(BTreeMap::new())
    }

    /// The leaf that `key` lies in, where it is anywhere.
    fn leaf(&self, key: &K) -> Option<K> {
        self.0.range(..=key).next_back().map(|(first, _)| *first)
    }

    fn get(&self, key: &K) -> Option<&T> {
        let (_, leaf) = self.0.range(..=key).next_back()?;
        let place = leaf.binary_search_by_key(key, |(key, _)| *key).ok()?;
        leaf.get(place).map(|(_, value)| value)
    }

    /// The value of `key`, a new one where there is none.
    fn at(&mut self, key: K) -> &mut T {
        let first = self.room(key);
        let leaf = self.0.entry(first).or_default();
        let place = leaf.binary_search_by_key(&key, |(key, _)| *key).unwrap_or_else(|place| {
            leaf.insert(place, (key, T::default()));
            place
        });
        &mut leaf[place].1
    }

    /// The leaf that `key` lies in, or has room to be put into.
    fn room(&mut self, key: K) -> K {
        let Some(first) = self.leaf(&key) else {
            // The first leaf of all begins with it from now on.
            let leaf = self.0.pop_first().map(|(_, leaf)| leaf).unwrap_or_default();
            self.0.insert(key, leaf);
            return self.room(key);
        };
        let Some(leaf) = self.0.get_mut(&first) else { return key };
        if leaf.len() < LEAF || leaf.binary_search_by_key(&key, |(key, _)| *key).is_ok() {
            return first;
        }
        // What comes in order begins a leaf, and leaves full ones behind.
        if leaf.last().is_some_and(|(last, _)| *last < key) {
            return key;
        }
        let upper = leaf.split_off(LEAF / 2);
        let Some(middle) = upper.first().map(|(key, _)| *key) else { return first };
        self.0.insert(middle, upper);
        if key < middle { first } else { middle }
    }

    fn remove(&mut self, key: &K) {
        let Some(first) = self.leaf(key) else { return };
        let Some(leaf) = self.0.get_mut(&first) else { return };
        if let Ok(place) = leaf.binary_search_by_key(key, |(key, _)| *key) {
            leaf.remove(place);
        }
        if leaf.is_empty() {
            self.0.remove(&first);
        } else if leaf.len() < leaf.capacity() / 4 {
            leaf.shrink_to(leaf.len() * 2);
        }
    }

    fn iter(&self) -> impl Iterator<Item = &(K, T)> {
        self.0.values().flatten()
    }
}

/// A map by prefix, in the order of [`IpNet`].
#[derive(Clone, Debug)]
pub struct Table<T> {
    ipv4: Leaves<Ipv4Net, T>,
    ipv6: Leaves<Ipv6Net, T>,
}

impl<T: Default> Default for Table<T> {
    fn default() -> Self {
        Self { ipv4: Leaves::new(), ipv6: Leaves::new() }
    }
}

impl<T: Default> Table<T> {
    pub fn get(&self, prefix: &IpNet) -> Option<&T> {
        match prefix {
            IpNet::V4(net) => self.ipv4.get(net),
            IpNet::V6(net) => self.ipv6.get(net),
        }
    }

    /// The value of `prefix`, a new one where there is none.
    pub fn at(&mut self, prefix: IpNet) -> &mut T {
        match prefix {
            IpNet::V4(net) => self.ipv4.at(net),
            IpNet::V6(net) => self.ipv6.at(net),
        }
    }

    pub fn remove(&mut self, prefix: &IpNet) {
        match prefix {
            IpNet::V4(net) => self.ipv4.remove(net),
            IpNet::V6(net) => self.ipv6.remove(net),
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = (IpNet, &T)> {
        let ipv4 = self.ipv4.iter().map(|(net, value)| (IpNet::V4(*net), value));
        ipv4.chain(self.ipv6.iter().map(|(net, value)| (IpNet::V6(*net), value)))
    }
}

/// A set of prefixes, in the order of [`IpNet`]; an IPv4 one costs a third of what it would in one set for both.
#[derive(Clone, Debug, Default)]
pub struct Prefixes {
    ipv4: BTreeSet<Ipv4Net>,
    ipv6: BTreeSet<Ipv6Net>,
}

impl Prefixes {
    pub fn insert(&mut self, prefix: IpNet) {
        match prefix {
            IpNet::V4(net) => self.ipv4.insert(net),
            IpNet::V6(net) => self.ipv6.insert(net),
        };
    }

    pub fn pop_first(&mut self) -> Option<IpNet> {
        self.ipv4.pop_first().map(IpNet::V4).or_else(|| self.ipv6.pop_first().map(IpNet::V6))
    }

    pub fn is_empty(&self) -> bool {
        self.ipv4.is_empty() && self.ipv6.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn net(number: u32) -> IpNet {
        let address = std::net::Ipv4Addr::from((10 << 24) | (number << 8));
        IpNet::V4(Ipv4Net::new(address, 24).unwrap_or_default())
    }

    #[test]
    fn what_comes_in_order_fills_every_leaf() {
        let mut table = Table::<u32>::default();
        (0..10_000).for_each(|number| *table.at(net(number)) = number);
        assert!(table.ipv4.0.len() <= 10_000 / LEAF + 1, "{} leaves", table.ipv4.0.len());
        assert!(table.iter().map(|(_, value)| *value).eq(0..10_000));
    }

    proptest! {
        #[test]
        fn a_table_holds_what_a_map_would(steps in proptest::collection::vec((any::<bool>(), 0u32..700), 0..4_000)) {
            let (mut table, mut map) = (Table::<u32>::default(), BTreeMap::new());
            for (time, (add, number)) in (0..).zip(steps) {
                if add {
                    *table.at(net(number)) = time;
                    map.insert(net(number), time);
                } else {
                    table.remove(&net(number));
                    map.remove(&net(number));
                }
                prop_assert_eq!(table.get(&net(number)), map.get(&net(number)));
            }
            prop_assert!(table.iter().map(|(prefix, value)| (prefix, *value)).eq(map));
            prop_assert!(table.ipv4.0.values().all(|leaf| (1..=LEAF).contains(&leaf.len())));
        }
    }
}
