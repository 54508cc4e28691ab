//! What has a number in the maps, by number. A copy costs one pointer for each page of 64 numbers and shares the pages with
//! its original until one of the two changes: the state is handed out after each change, and a change touches few of them.

use std::{collections::BTreeMap, ops::Index, sync::Arc};

/// Numbers of a page.
const PAGE: u32 = 64;

/// Elements of a page, by number.
type Page<T> = Arc<Vec<(u32, T)>>;

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pages<T> {
    /// None is empty.
    pages: BTreeMap<u32, Page<T>>,
}

impl<T> Default for Pages<T> {
    fn default() -> Self {
        Self { pages: BTreeMap::new() }
    }
}

impl<T> Pages<T> {
    /// The element with this number.
    pub fn get(&self, number: &u32) -> Option<&T> {
        let page = self.pages.get(&(number / PAGE))?;
        let at = find(page, *number).ok()?;
        page.get(at).map(|(_, value)| value)
    }

    /// True where the number has an element.
    pub fn contains_key(&self, number: &u32) -> bool {
        self.get(number).is_some()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.pages.values().map(|page| page.len()).sum()
    }

    /// True where there is none.
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// All, by number.
    pub fn iter(&self) -> impl Iterator<Item = (&u32, &T)> {
        self.pages.values().flat_map(|page| page.iter().map(|(number, value)| (number, value)))
    }

    /// Their numbers, in order.
    pub fn keys(&self) -> impl Iterator<Item = &u32> {
        self.iter().map(|(number, _)| number)
    }

    /// The elements, by number.
    pub fn values(&self) -> impl Iterator<Item = &T> {
        self.iter().map(|(_, value)| value)
    }

    /// The one with the highest number.
    pub fn last_key_value(&self) -> Option<(&u32, &T)> {
        let (_, page) = self.pages.last_key_value()?;
        page.last().map(|(number, value)| (number, value))
    }
}

impl<T: Clone> Pages<T> {
    /// The element with this number, to be changed.
    pub fn get_mut(&mut self, number: &u32) -> Option<&mut T> {
        let page = self.pages.get_mut(&(number / PAGE))?;
        let at = find(page, *number).ok()?;
        Arc::make_mut(page).get_mut(at).map(|(_, value)| value)
    }

    /// Gives a number an element; returns the one that it had.
    pub fn insert(&mut self, number: u32, value: T) -> Option<T> {
        let page = Arc::make_mut(self.pages.entry(number / PAGE).or_default());
        match find(page, number) {
            Ok(at) => page.get_mut(at).map(|(_, known)| std::mem::replace(known, value)),
            Err(at) => {
                page.insert(at, (number, value));
                None
            }
        }
    }

    /// Takes a number's element away.
    pub fn remove(&mut self, number: &u32) -> Option<T> {
        let page = self.pages.get_mut(&(number / PAGE))?;
        let at = find(page, *number).ok()?;
        let (_, value) = Arc::make_mut(page).remove(at);
        if page.is_empty() {
            self.pages.remove(&(number / PAGE));
        }
        Some(value)
    }
}

impl<T: Clone + Default> Pages<T> {
    /// Changes the element with this number, or the default one where it has none.
    pub fn change<R>(&mut self, number: u32, change: impl FnOnce(&mut T) -> R) -> R {
        if let Some(known) = self.get_mut(&number) {
            return change(known);
        }
        let mut value = T::default();
        let result = change(&mut value);
        self.insert(number, value);
        result
    }
}

impl<T> Index<&u32> for Pages<T> {
    type Output = T;

    /// As with a `BTreeMap`, the number must have an element.
    fn index(&self, number: &u32) -> &T {
        #[allow(clippy::expect_used, reason = "what indexing means; no code outside of tests indexes")]
        self.get(number).expect("no element with this number")
    }
}

impl<T: Clone> FromIterator<(u32, T)> for Pages<T> {
    fn from_iter<I: IntoIterator<Item = (u32, T)>>(elements: I) -> Self {
        let mut all = Self::default();
        for (number, value) in elements {
            all.insert(number, value);
        }
        all
    }
}

fn find<T>(page: &[(u32, T)], number: u32) -> Result<usize, usize> {
    page.binary_search_by_key(&number, |(known, _)| *known)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn pages_hold_what_a_map_holds_and_a_copy_stays_as_it_was(
            steps in prop::collection::vec((0_u32..300, prop::option::of(any::<u8>())), 0..200),
            copy_at in 0_usize..200,
        ) {
            let (mut pages, mut model) = (Pages::default(), BTreeMap::new());
            let mut copies = None;
            for (step, (number, value)) in steps.into_iter().enumerate() {
                if step == copy_at {
                    copies = Some((pages.clone(), model.clone()));
                }
                match value {
                    Some(value) if value % 2 == 0 => prop_assert_eq!(pages.insert(number, value), model.insert(number, value)),
                    Some(value) => {
                        pages.change(number, |known| *known = value);
                        model.insert(number, value);
                    }
                    None => prop_assert_eq!(pages.remove(&number), model.remove(&number)),
                }
                prop_assert_eq!(pages.get(&number), model.get(&number));
            }
            for (pages, model) in copies.into_iter().chain([(pages, model)]) {
                prop_assert!(pages.iter().eq(model.iter()));
                prop_assert_eq!((pages.len(), pages.is_empty()), (model.len(), model.is_empty()));
                prop_assert_eq!(pages.last_key_value(), model.last_key_value());
                prop_assert_eq!(model.into_iter().collect::<Pages<u8>>(), pages);
            }
        }
    }

    #[test]
    fn a_change_copies_one_page_and_shares_the_others() {
        let mut pages: Pages<u32> = (0..50_000).map(|number| (number, number)).collect();
        let copy = pages.clone();
        pages.insert(70, 0);
        let shared = pages.pages.values().zip(copy.pages.values()).filter(|(one, other)| Arc::ptr_eq(one, other));
        assert_eq!(shared.count(), pages.pages.len() - 1);
        assert_eq!((copy[&70], pages[&70]), (70, 0));
    }
}
