//! Selection tables that were made before: a table depends on nothing but members and shape, and most pools stay as they
//! are from one round to the next. What the maps are known to hold shares them.

use std::{cell::RefCell, collections::BTreeMap, sync::Arc};

use super::actor::OwnedFill;
use crate::model::{PoolMember, TableShape};

/// Tables by what they were made of.
type Tables = BTreeMap<(TableShape, Vec<PoolMember>), (u64, Arc<[u16]>)>;

/// See the module.
pub(super) struct Memo {
    fill: OwnedFill,
    tables: RefCell<Tables>,
    round: u64,
}

impl Memo {
    pub fn new(fill: OwnedFill) -> Self {
        Self { fill, tables: RefCell::default(), round: 0 }
    }

    /// The table of these members, made only if it was not.
    pub fn table(&self, members: &[PoolMember], shape: TableShape) -> Arc<[u16]> {
        let mut tables = self.tables.borrow_mut();
        let (used, table) =
            tables.entry((shape, members.to_vec())).or_insert_with(|| (self.round, (self.fill)(members, shape)));
        *used = self.round;
        Arc::clone(table)
    }

    /// A round over all services begins: what the one before did not use is forgotten at its end.
    pub fn begin(&mut self) {
        self.round += 1;
    }

    /// The round is over.
    pub fn end(&mut self) {
        let round = self.round;
        self.tables.get_mut().retain(|_, (used, _)| *used == round);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    use super::*;
    use crate::model::Balance;

    #[test]
    fn a_table_is_made_once_and_forgotten_when_a_round_did_not_use_it() {
        let made = Arc::<AtomicUsize>::default();
        let counter = Arc::clone(&made);
        let mut memo = Memo::new(Box::new(move |members, _| {
            counter.fetch_add(1, Ordering::Relaxed);
            [members.len() as u16].into()
        }));
        let shape = TableShape { balance: Balance::Maglev, maglev_size: None };
        let pool = |hosts: &[u8]| -> Vec<PoolMember> {
            hosts.iter().map(|host| PoolMember::new(([10, 1, 0, *host], 80).into(), 1)).collect()
        };
        for _ in 0..3 {
            memo.begin();
            assert_eq!(*memo.table(&pool(&[1, 2]), shape), [2]);
            memo.end();
        }
        assert_eq!(made.load(Ordering::Relaxed), 1);
        memo.begin();
        assert_eq!(*memo.table(&pool(&[1]), shape), [1]);
        memo.end();
        memo.begin();
        assert_eq!(*memo.table(&pool(&[1, 2]), shape), [2]);
        assert_eq!(made.load(Ordering::Relaxed), 3);
        assert_eq!(*memo.table(&pool(&[1, 2]), TableShape { maglev_size: Some(1021), ..shape }), [2]);
        assert_eq!(made.load(Ordering::Relaxed), 4, "another shape is another table");
    }
}
