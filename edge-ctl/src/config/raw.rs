//! What the files say, and where: TOML as a tree in which every node knows its file and line, so that an error found
//! long after parsing, or between two files, can still name the line.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::read::Report;

/// A line of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub file: Arc<PathBuf>,
    /// Position among the files read; the main file is 0.
    pub rank: usize,
    /// From 1; `None`: the file as a whole.
    pub line: Option<usize>,
}

impl Place {
    pub fn of_file(file: &Path) -> Self {
        Self { file: Arc::new(file.to_owned()), rank: 0, line: None }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "{}:{line}", self.file.display()),
            None => write!(f, "{}", self.file.display()),
        }
    }
}

pub(super) type Table = BTreeMap<String, Node>;

/// A value and where it stands: the line of its key, or its own in an array.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub at: Place,
    pub value: Value,
}

#[derive(Clone, Debug)]
pub(super) enum Value {
    String(String),
    Integer(i64),
    Boolean(bool),
    Array(Vec<Node>),
    Table(Table),
    /// A float, a date, or an integer beyond 64 bits: no key takes one.
    Other(&'static str),
}

impl Value {
    pub fn kind(&self) -> &'static str {
        match self {
            Self::String(_) => "a string",
            Self::Integer(_) => "a number",
            Self::Boolean(_) => "true or false",
            Self::Array(_) => "an array",
            Self::Table(_) => "a table",
            Self::Other(kind) => kind,
        }
    }
}

/// Several files as one tree. Tables are united key by key and arrays of tables are joined; anything else that stands in
/// two files is an error, because which one would win is not visible.
#[derive(Debug, Default)]
pub(super) struct Merged {
    root: Table,
    files: usize,
}

impl Merged {
    pub fn add(&mut self, file: &Path, text: &str, report: &Report) {
        let reader = Reader::new(file, self.files, text);
        self.files += 1;
        let (document, errors) = DeTable::parse_recoverable(text);
        for error in errors {
            // Without a span it is the whole text.
            let at = reader.place(error.span().map_or(0, |span| span.start));
            report.add(&at, format!("this line is not TOML: {}", error.message().trim()));
        }
        unite(&mut self.root, reader.table(document.into_inner()), "", report);
    }

    pub fn table(&self) -> &Table {
        &self.root
    }
}

fn unite(into: &mut Table, from: Table, path: &str, report: &Report) {
    for (key, node) in from {
        let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        let Some(present) = into.get_mut(&key) else {
            into.insert(key, node);
            continue;
        };
        match (&mut present.value, node.value) {
            // A service or resolver is described in one place; only the tables that hold them are united.
            (Value::Table(present), Value::Table(new)) if !is_one_thing(&path) => unite(present, new, &path, report),
            (Value::Array(present), Value::Array(mut new)) if are_tables(present) && are_tables(&new) => {
                present.append(&mut new);
            }
            _ => report.add(&node.at, format!("`{path}` is already set at {}; remove one of the two", present.at)),
        }
    }
}

/// True for `service.NAME`, `resolver.NAME` and `bgp.group.NAME`.
fn is_one_thing(path: &str) -> bool {
    ["service.", "resolver.", "bgp.group."].iter().any(|prefix| path.starts_with(prefix))
}

fn are_tables(nodes: &[Node]) -> bool {
    nodes.iter().all(|node| matches!(node.value, Value::Table(_)))
}

struct Reader {
    file: Arc<PathBuf>,
    rank: usize,
    /// Offsets of the line ends, in order: every value asks for its line, and there may be a hundred thousand.
    ends: Vec<usize>,
}

impl Reader {
    fn new(file: &Path, rank: usize, text: &str) -> Self {
        let ends = text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n').map(|(at, _)| at);
        Self { file: Arc::new(file.to_owned()), rank, ends: ends.collect() }
    }

    fn line(&self, offset: usize) -> usize {
        1 + self.ends.partition_point(|end| *end < offset)
    }

    fn place(&self, offset: usize) -> Place {
        Place { file: Arc::clone(&self.file), rank: self.rank, line: Some(self.line(offset)) }
    }

    fn table(&self, table: DeTable<'_>) -> Table {
        table
            .into_iter()
            .map(|(key, value)| {
                let at = self.place(key.span().start);
                (key.into_inner().into_owned(), Node { at, value: self.value(value.into_inner()) })
            })
            .collect()
    }

    fn value(&self, value: DeValue<'_>) -> Value {
        match value {
            DeValue::String(text) => Value::String(text.into_owned()),
            DeValue::Integer(integer) => i64::from_str_radix(integer.as_str(), integer.radix())
                .map_or(Value::Other("a number beyond 64 bits"), Value::Integer),
            DeValue::Float(_) => Value::Other("a number with a fraction"),
            DeValue::Boolean(boolean) => Value::Boolean(boolean),
            DeValue::Datetime(_) => Value::Other("a date"),
            DeValue::Array(array) => Value::Array(array.into_iter().map(|node| self.element(node)).collect()),
            DeValue::Table(table) => Value::Table(self.table(table)),
        }
    }

    fn element(&self, node: Spanned<DeValue<'_>>) -> Node {
        let at = self.place(node.span().start);
        Node { at, value: self.value(node.into_inner()) }
    }
}
