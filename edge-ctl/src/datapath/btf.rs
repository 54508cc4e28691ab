//! The part of BTF (Documentation/bpf/btf.rst of the kernel) that says where the members of a structure lie. aya reads BTF
//! too, but keeps members to itself.

use std::collections::BTreeMap;

const MAGIC: u16 = 0xeb9f;
const INT: u32 = 1;
const ARRAY: u32 = 3;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const ENUM: u32 = 6;
const TYPEDEF: u32 = 8;
const VOLATILE: u32 = 9;
const CONST: u32 = 10;
const RESTRICT: u32 = 11;
const FUNC: u32 = 12;
const FUNC_PROTO: u32 = 13;
const VAR: u32 = 14;
const DATASEC: u32 = 15;
const DECL_TAG: u32 = 17;
const TYPE_TAG: u32 = 18;
const ENUM64: u32 = 19;
/// Structures within structures that are followed.
const DEPTH: usize = 8;

/// A piece of a structure that is copied as a whole: an integer, or an array of them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Field {
    /// Member names from the outermost structure on, with dots between.
    pub path: String,
    /// Bytes from the start of the outermost structure.
    pub offset: u32,
    /// Bytes.
    pub size: u32,
}

#[derive(Clone, Debug)]
struct Type {
    name: u32,
    kind: u32,
    /// Size, or the number of another type, as the kind has it.
    size_or_type: u32,
    /// What follows, in 32-bit words.
    rest: Vec<u32>,
}

/// The types of an object.
#[derive(Clone, Debug)]
pub struct Btf {
    types: Vec<Type>,
    strings: Vec<u8>,
}

impl Btf {
    /// Reads a `.BTF` section; `None` where it is none, or cut short.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let word = |at: usize| bytes.get(at..at + 4)?.first_chunk::<4>().map(|bytes| u32::from_le_bytes(*bytes));
        if u16::from_le_bytes(*bytes.first_chunk::<2>()?) != MAGIC {
            return None;
        }
        let part = |offset: u32, length: u32| {
            let start = usize::try_from(word(4)?.checked_add(offset)?).ok()?;
            bytes.get(start..start.checked_add(usize::try_from(length).ok()?)?)
        };
        let section = part(word(8)?, word(12)?)?;
        let strings = part(word(16)?, word(20)?)?.to_vec();
        let words: Vec<u32> =
            section.chunks_exact(4).filter_map(|w| w.first_chunk()).map(|w| u32::from_le_bytes(*w)).collect();
        let mut types = Vec::new();
        let mut rest = words.as_slice();
        while let [name, info, size_or_type, after @ ..] = rest {
            let (kind, count) = (info >> 24 & 0x1f, (info & 0xffff) as usize);
            let length = match kind {
                INT | VAR | DECL_TAG => 1,
                ARRAY => 3,
                STRUCT | UNION | DATASEC | ENUM64 => 3 * count,
                ENUM | FUNC_PROTO => 2 * count,
                _ => 0,
            };
            let extra = after.get(..length)?.to_vec();
            types.push(Type { name: *name, kind, size_or_type: *size_or_type, rest: extra });
            rest = after.get(length..)?;
        }
        Some(Self { types, strings })
    }

    /// Numbers start at 1; 0 is void.
    fn get(&self, number: u32) -> Option<&Type> {
        self.types.get(usize::try_from(number).ok()?.checked_sub(1)?)
    }

    fn string(&self, offset: u32) -> String {
        let rest = self.strings.get(offset as usize..).unwrap_or_default();
        let name = rest.split(|byte| *byte == 0).next().unwrap_or_default();
        String::from_utf8_lossy(name).into_owned()
    }

    /// The name of a function by its type's number.
    pub fn function(&self, number: u32) -> Option<String> {
        self.get(number).filter(|found| found.kind == FUNC).map(|found| self.string(found.name))
    }

    /// The fields of the structure of this name (as Rust writes it, without a path), by offset, and its size; `None` where there is none, or where two
    /// differ.
    pub fn structure(&self, name: &str) -> Option<(Vec<Field>, u32)> {
        let mut found: Option<(Vec<Field>, u32)> = None;
        let name = &linked(name);
        for (number, candidate) in (1_u32..).zip(&self.types) {
            if candidate.kind != STRUCT || self.string(candidate.name) != *name {
                continue;
            }
            let mut fields = Vec::new();
            self.flatten(number, "", 0, DEPTH, &mut fields)?;
            fields.sort_by(|one, other| (one.offset, &one.path).cmp(&(other.offset, &other.path)));
            let same = (fields, candidate.size_or_type);
            if found.as_ref().is_some_and(|found| *found != same) {
                return None;
            }
            found = Some(same);
        }
        found
    }

    fn flatten(&self, number: u32, path: &str, offset: u32, depth: usize, into: &mut Vec<Field>) -> Option<()> {
        let found = self.get(number)?;
        match found.kind {
            STRUCT if depth > 0 => {
                for member in found.rest.chunks_exact(3) {
                    let [name, kind, bits] = member else { continue };
                    let name = self.string(*name);
                    let path = if path.is_empty() { name } else { format!("{path}.{name}") };
                    self.flatten(*kind, &path, offset.checked_add(bits / 8)?, depth - 1, into)?;
                }
            }
            TYPEDEF | VOLATILE | CONST | RESTRICT | TYPE_TAG if depth > 0 => {
                self.flatten(found.size_or_type, path, offset, depth - 1, into)?;
            }
            _ => into.push(Field { path: path.to_owned(), offset, size: self.size(number, depth)? }),
        }
        Some(())
    }

    fn size(&self, number: u32, depth: usize) -> Option<u32> {
        let found = self.get(number)?;
        match found.kind {
            INT | STRUCT | UNION | ENUM | ENUM64 => Some(found.size_or_type),
            ARRAY if depth > 0 => self.size(*found.rest.first()?, depth - 1)?.checked_mul(*found.rest.get(2)?),
            TYPEDEF | VOLATILE | CONST | RESTRICT | TYPE_TAG if depth > 0 => self.size(found.size_or_type, depth - 1),
            _ => None,
        }
    }
}

/// A name as bpf-linker writes it, since the kernel takes C identifiers only: `_3C_` for `<`, for one.
fn linked(name: &str) -> String {
    let escape = |text: char| match text {
        'a'..='z' | 'A'..='Z' | '0'..='9' | '_' => text.to_string(),
        other => format!("_{:X}_", u32::from(other)),
    };
    name.chars().map(escape).collect()
}

/// The fields of every structure in `names`, as text: one line each, so that it may be kept beside a map and read by
/// another version of this program.
pub fn describe(fields: &[Field]) -> String {
    let lines: Vec<String> =
        fields.iter().map(|field| format!("{} {} {}", field.path, field.offset, field.size)).collect();
    lines.join("\n")
}

/// [`describe`] read again; lines that are none are left out.
pub fn described(text: &str) -> BTreeMap<String, Field> {
    let field = |line: &str| {
        let mut words = line.split_whitespace();
        let (path, offset, size) = (words.next()?, words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        Some((path.to_owned(), Field { path: path.to_owned(), offset, size }))
    };
    text.lines().filter_map(field).collect()
}

#[cfg(test)]
mod tests {
    use aya_obj::Object;
    use edge_common::{flow::FlowKeyV4, maps::FlowV4};

    use super::*;
    use crate::datapath::object::EBPF_OBJECT;

    fn own() -> Btf {
        Btf::parse(&Object::parse(EBPF_OBJECT).unwrap().btf.unwrap().to_bytes()).unwrap()
    }

    #[test]
    fn the_objects_btf_gives_the_offsets_that_the_compiler_chose() {
        let (fields, size) = own().structure("Flow<u32>").unwrap();
        assert_eq!(size as usize, size_of::<FlowV4>());
        let at = |path: &str| fields.iter().find(|field| field.path == path).map(|field| (field.offset, field.size));
        let key = std::mem::offset_of!(FlowV4, key) as u32;
        assert_eq!(at("key.src"), Some((key + std::mem::offset_of!(FlowKeyV4, src) as u32, 4)));
        assert_eq!(at("state"), Some((std::mem::offset_of!(FlowV4, state) as u32, 1)));
        assert_eq!(at("bytes"), Some((std::mem::offset_of!(FlowV4, bytes) as u32, 8)));
        assert_eq!(fields.iter().map(|field| field.size).sum::<u32>(), size, "no byte without a name");
    }

    #[test]
    fn a_description_reads_back_as_it_was_written() {
        let (fields, _) = own().structure("Flow<u32>").unwrap();
        let read: Vec<Field> = described(&describe(&fields)).into_values().collect();
        assert_eq!(read.len(), fields.len());
        assert!(fields.iter().all(|field| read.contains(field)));
        assert!(described("garbage\nkey 1").is_empty());
    }

    #[test]
    fn bytes_that_are_no_btf_are_refused_at_every_length() {
        let bytes = Object::parse(EBPF_OBJECT).unwrap().btf.unwrap().to_bytes();
        assert!(Btf::parse(&[]).is_none());
        assert!((0..bytes.len()).step_by(97).all(|length| Btf::parse(&bytes[..length]).is_none()));
        assert!(own().structure("NoSuchThing").is_none());
    }
}
