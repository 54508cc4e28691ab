//! Taking a table apart key by key. Whatever was not asked for by the time a section is finished is unknown, and is
//! reported with the nearest key that would have been known; no error stops the reading of the rest.

use std::{cell::RefCell, collections::BTreeSet, ops::RangeInclusive};

use super::{
    Problem,
    raw::{Node, Place, Table, Value},
};

/// Faults found so far.
#[derive(Debug, Default)]
pub(super) struct Report {
    /// With the rank of the file.
    problems: RefCell<Vec<(usize, Problem)>>,
    /// Sections and the keys that were asked for in them, for the test that holds the schema to the parser.
    #[cfg(test)]
    pub known: RefCell<BTreeSet<(String, &'static str)>>,
}

impl Report {
    pub fn add(&self, at: &Place, message: String) {
        let problem = Problem { file: at.file.as_ref().clone(), line: at.line, message };
        self.problems.borrow_mut().push((at.rank, problem));
    }

    pub fn is_empty(&self) -> bool {
        self.problems.borrow().is_empty()
    }

    /// In the order of files and lines, each once.
    pub fn into_problems(self) -> Vec<Problem> {
        let mut problems = self.problems.into_inner();
        problems.sort_by_key(|(rank, problem)| (*rank, problem.line));
        // A fault of a group is found again for each of its peers.
        problems.dedup();
        problems.into_iter().map(|(_, problem)| problem).collect()
    }
}

/// A value read, with its place for errors found later.
#[derive(Clone, Debug)]
pub(super) struct At<T> {
    pub value: T,
    pub at: Place,
}

/// An element of an array that holds strings, tables, or both.
pub(super) enum Mixed<'a> {
    Text(&'a str),
    Table(Section<'a>),
}

/// One table of the configuration.
pub(super) struct Section<'a> {
    report: &'a Report,
    /// As users write it: `[bgp]`, `[service.web]`, `[[bgp.peer]]`; empty for the root.
    name: String,
    at: Place,
    table: &'a Table,
    asked: RefCell<BTreeSet<&'static str>>,
}

impl<'a> Section<'a> {
    pub fn root(report: &'a Report, at: Place, table: &'a Table) -> Self {
        Self::new(report, String::new(), at, table)
    }

    fn new(report: &'a Report, name: String, at: Place, table: &'a Table) -> Self {
        Self { report, name, at, table, asked: RefCell::default() }
    }

    pub fn place(&self) -> &Place {
        &self.at
    }

    pub fn has(&self, key: &str) -> bool {
        self.table.contains_key(key)
    }

    /// Reports a fault of a value.
    pub fn fault(&self, at: &Place, message: String) {
        let text = if self.name.is_empty() { message } else { format!("{}: {message}", self.name) };
        self.report.add(at, text);
    }

    /// The value of `key`, which counts as known from now on.
    pub fn get(&self, key: &'static str) -> Option<&'a Node> {
        self.asked.borrow_mut().insert(key);
        #[cfg(test)]
        self.report.known.borrow_mut().insert((self.name.trim_matches(['[', ']']).to_owned(), key));
        self.table.get(key)
    }

    pub fn wrong_kind(&self, key: &str, node: &Node, expected: &str) {
        self.fault(&node.at, format!("`{key}` is {}; expected {expected}", node.value.kind()));
    }

    /// Reports that `key` must be there.
    pub fn missing(&self, key: &str, expected: &str) {
        self.fault(&self.at, format!("`{key}` is missing; expected {expected}"));
    }

    /// A string that `parse` accepts; its error says what was wrong, `expected` what is accepted.
    pub fn parse<T>(
        &self,
        key: &'static str,
        expected: &str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Option<At<T>> {
        let node = self.get(key)?;
        self.element(key, node, expected, &parse)
    }

    fn element<T>(
        &self,
        key: &str,
        node: &Node,
        expected: &str,
        parse: &impl Fn(&str) -> Result<T, String>,
    ) -> Option<At<T>> {
        let Value::String(text) = &node.value else {
            self.wrong_kind(key, node, expected);
            return None;
        };
        match parse(text) {
            Ok(value) => Some(At { value, at: node.at.clone() }),
            Err(why) => {
                let separator = if why.is_empty() { "" } else { ": " };
                self.fault(&node.at, format!("`{key}`: \"{text}\" is refused{separator}{why}; expected {expected}"));
                None
            }
        }
    }

    /// An array of strings that `parse` accepts. Elements that it refuses are reported and left out.
    pub fn list<T>(
        &self,
        key: &'static str,
        expected: &str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Option<Vec<At<T>>> {
        let node = self.get(key)?;
        let Value::Array(nodes) = &node.value else {
            self.wrong_kind(key, node, &format!("an array, each element {expected}"));
            return None;
        };
        Some(nodes.iter().filter_map(|node| self.element(key, node, expected, &parse)).collect())
    }

    /// [`Section::list`], which must be there and not be empty. An array whose elements were all refused is not missing.
    pub fn required_list<T>(
        &self,
        key: &'static str,
        expected: &str,
        example: &str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Vec<At<T>> {
        let is_empty = match self.get(key).map(|node| &node.value) {
            None => true,
            Some(Value::Array(nodes)) => nodes.is_empty(),
            Some(_) => false,
        };
        if is_empty {
            self.missing(key, example);
        }
        self.list(key, expected, parse).unwrap_or_default()
    }

    /// The elements of an array that holds strings, tables, or both.
    pub fn mixed(&self, key: &'static str, expected: &str) -> Option<Vec<(Place, Mixed<'a>)>> {
        let node = self.get(key)?;
        let Value::Array(nodes) = &node.value else {
            self.wrong_kind(key, node, &format!("an array, each element {expected}"));
            return None;
        };
        let name = format!("[{}]", self.path(key));
        let element = |node: &'a Node| match &node.value {
            Value::String(text) => Some((node.at.clone(), Mixed::Text(text))),
            Value::Table(table) => {
                let section = Section::new(self.report, name.clone(), node.at.clone(), table);
                Some((node.at.clone(), Mixed::Table(section)))
            }
            _ => {
                self.wrong_kind(key, node, expected);
                None
            }
        };
        Some(nodes.iter().filter_map(element).collect())
    }

    pub fn integer(&self, key: &'static str, range: RangeInclusive<u32>) -> Option<u32> {
        let node = self.get(key)?;
        let expected = format!("a number from {} to {}", range.start(), range.end());
        match &node.value {
            Value::Integer(number) => match u32::try_from(*number).ok().filter(|number| range.contains(number)) {
                Some(number) => return Some(number),
                None => self.fault(&node.at, format!("`{key}`: {number} is refused; expected {expected}")),
            },
            _ => self.wrong_kind(key, node, &expected),
        }
        None
    }

    pub fn port(&self, key: &'static str, lowest: u16) -> Option<u16> {
        self.integer(key, u32::from(lowest)..=u32::from(u16::MAX)).and_then(|port| u16::try_from(port).ok())
    }

    pub fn boolean(&self, key: &'static str) -> Option<bool> {
        let node = self.get(key)?;
        match node.value {
            Value::Boolean(value) => Some(value),
            _ => {
                self.wrong_kind(key, node, "true or false");
                None
            }
        }
    }

    /// A table below this one.
    pub fn table(&self, key: &'static str) -> Option<Section<'a>> {
        let node = self.get(key)?;
        self.section(key, node)
    }

    /// The tables of `[key.NAME]`, in the order in which they stand in the files, so that of two that exclude each other
    /// the later one is at fault.
    pub fn named(&self, key: &'static str) -> Vec<(&'a str, Section<'a>)> {
        let Some(node) = self.get(key) else { return Vec::new() };
        let Value::Table(tables) = &node.value else {
            self.wrong_kind(key, node, &format!("tables `[{key}.NAME]`"));
            return Vec::new();
        };
        let mut tables: Vec<_> = tables.iter().collect();
        tables.sort_by_key(|(_, node)| (node.at.rank, node.at.line));
        tables
            .into_iter()
            .filter_map(|(name, node)| {
                let section = self.section(&format!("{key}.{name}"), node)?;
                Some((name.as_str(), section))
            })
            .collect()
    }

    /// The tables of `[[key]]`.
    pub fn each(&self, key: &'static str) -> Vec<Section<'a>> {
        let Some(node) = self.get(key) else { return Vec::new() };
        let Value::Array(nodes) = &node.value else {
            self.wrong_kind(key, node, &format!("tables `[[{}]]`", self.path(key)));
            return Vec::new();
        };
        let name = format!("[[{}]]", self.path(key));
        nodes
            .iter()
            .filter_map(|node| match &node.value {
                Value::Table(table) => Some(Section::new(self.report, name.clone(), node.at.clone(), table)),
                _ => {
                    self.wrong_kind(key, node, "a table");
                    None
                }
            })
            .collect()
    }

    fn section(&self, key: &str, node: &'a Node) -> Option<Section<'a>> {
        match &node.value {
            Value::Table(table) => {
                Some(Section::new(self.report, format!("[{}]", self.path(key)), node.at.clone(), table))
            }
            _ => {
                self.wrong_kind(key, node, "a table");
                None
            }
        }
    }

    fn path(&self, key: &str) -> String {
        let own = self.name.trim_matches(['[', ']']);
        if own.is_empty() { key.to_owned() } else { format!("{own}.{key}") }
    }

    /// Refuses keys that belong to the design but that this version cannot honour.
    pub fn not_yet(&self, keys: &[&'static str]) {
        for key in keys {
            if let Some(node) = self.get(key) {
                self.fault(&node.at, not_yet(&format!("`{key}`")));
            }
            #[cfg(test)]
            self.report.known.borrow_mut().remove(&(self.name.trim_matches(['[', ']']).to_owned(), *key));
        }
    }

    /// Reports every key that nobody asked for.
    pub fn finish(self) {
        let asked = self.asked.borrow();
        for (key, node) in self.table.iter().filter(|(key, _)| !asked.contains(key.as_str())) {
            let hint = match nearest(key, asked.iter().copied()) {
                Some(known) => format!("did you mean `{known}`?"),
                None => format!("known here: {}", asked.iter().copied().collect::<Vec<_>>().join(", ")),
            };
            self.fault(&node.at, format!("unknown key `{key}`; {hint}"));
        }
    }
}

/// The message for what the design has and this version has not.
pub(super) fn not_yet(what: &str) -> String {
    format!("{what} is known, but this version does not do it yet (README, \"Not yet\"); remove it")
}

/// The candidate nearest to `word`, if one is near enough to be meant.
pub(super) fn nearest<'c>(word: &str, candidates: impl Iterator<Item = &'c str>) -> Option<&'c str> {
    let bound = (word.chars().count() / 3).max(1);
    candidates
        .map(|candidate| (distance(word, candidate), candidate))
        .filter(|(distance, candidate)| *distance <= bound && *distance < candidate.chars().count())
        .min()
        .map(|(_, candidate)| candidate)
}

/// Edits between two words: insertions, deletions, substitutions, and swaps of neighbours.
fn distance(a: &str, b: &str) -> usize {
    let a: Vec<char> = a.chars().collect();
    let b: Vec<char> = b.chars().collect();
    let mut before: Vec<usize> = Vec::new();
    let mut above: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, y) in b.iter().enumerate() {
            let mut best = (above[j] + usize::from(x != y)).min(above[j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && *x == b[j - 1] && a[i - 1] == *y {
                best = best.min(before[j - 1] + 1);
            }
            row.push(best);
        }
        before = std::mem::replace(&mut above, row);
    }
    above.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_key_is_found_and_a_far_one_is_not_offered() {
        let keys = ["interfaces", "hook", "pod_networks"];
        assert_eq!(nearest("interface", keys.into_iter()), Some("interfaces"));
        assert_eq!(nearest("podnetworks", keys.into_iter()), Some("pod_networks"));
        assert_eq!(nearest("zzz", keys.into_iter()), None);
    }

    #[test]
    fn distances_are_counted_in_edits() {
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("", "abc"), 3);
        assert_eq!(distance("abc", "abc"), 0);
        assert_eq!(distance("bpg", "bgp"), 1);
    }
}
