//! Carries flows and numbers over to maps of another layout, in either direction: an upgrade and a roll back are the same.
//!
//! Beside each map its description is pinned: the names, offsets and sizes of its fields, taken from the BTF of the object
//! that made it (the kernel has none for these maps, and reading BTF by its id takes CAP_SYS_ADMIN). A field is carried over
//! by its name, wherever it lies; one that the new layout lacks is left out, one that the old lacked is zero. Maps of another
//! [`LAYOUT`](edge_common::maps::LAYOUT) are not carried over: there a field changed its meaning.
//!
//! The steps, of which each leaves what the next start can go on from:
//!
//! 1. New maps are made and filled under `incoming/`, which no program knows and every start clears.
//! 2. They move to `maps/`, one rename each. A map that has not moved is filled again by the next start; nothing uses them yet.
//! 3. The links are updated to the new program ([`super::attach`]). It finds every flow that was there at step 1.
//! 4. Hash tables are copied once more, without replacing: flows that began in between.
//! 5. The old maps' pins are removed, and the old maps end with them.
//!
//! What a packet counted between steps 1 and 3 is not carried over.

use std::{collections::BTreeMap, fs, io, os::fd::AsFd as _, path::Path};

use aya::maps::{Array, MapData};
use aya_obj::generated::bpf_map_type::{
    BPF_MAP_TYPE_ARRAY, BPF_MAP_TYPE_HASH, BPF_MAP_TYPE_LRU_HASH, BPF_MAP_TYPE_PERCPU_ARRAY,
};

use super::{
    btf::{Field, described},
    pins::{self, Layout, Pins, Reader},
    sys::{self, NOEXIST},
};
use crate::reconcile::ports::PortError;

/// Bytes of a description.
const DESCRIPTION: usize = 8192;

/// How one half of an element, its key or value, becomes the other layout's.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Moves {
    /// From, to and length, in bytes.
    pieces: Vec<(usize, usize, usize)>,
    size: usize,
}

impl Moves {
    fn between(old: &BTreeMap<String, Field>, new: &BTreeMap<String, Field>, half: char, size: usize) -> Self {
        let prefix = format!("{half}:");
        let shared = new.iter().filter(|(path, _)| path.starts_with(&prefix)).filter_map(|(path, to)| {
            let from = old.get(path)?;
            let length = from.size.min(to.size) as usize;
            Some((from.offset as usize, to.offset as usize, length))
        });
        Self { pieces: shared.collect(), size }
    }

    /// `None` where `old` is shorter than its description says.
    fn apply(&self, old: &[u8]) -> Option<Vec<u8>> {
        let mut new = vec![0; self.size];
        for (from, to, length) in &self.pieces {
            new.get_mut(*to..to + length)?.copy_from_slice(old.get(*from..from + length)?);
        }
        Some(new)
    }
}

/// Pins the description of a map that is about to be made.
///
/// # Errors
/// Where the kernel refuses.
pub fn describe(pins: &Pins, map: &str, layout: &Layout) -> Result<(), PortError> {
    let path = pins.description(map);
    if path.exists() {
        return Ok(());
    }
    let what = || format!("pinning the description {}", path.display());
    let text = pins.fields(map);
    let mut value = [0_u8; DESCRIPTION];
    let head = format!("layout {} {} {}\n", edge_common::maps::LAYOUT, layout.key, layout.value);
    for (to, from) in value.iter_mut().zip(head.bytes().chain(text.bytes())) {
        *to = from;
    }
    let mut made = Array::<MapData, [u8; DESCRIPTION]>::create(1, 0)
        .map_err(|error| PortError::new(what(), pins::chain(&error)))?;
    made.set(0, value, 0).map_err(|error| PortError::new(what(), pins::chain(&error)))?;
    made.pin(&path).map_err(|error| PortError::new(what(), pins::chain(&error)))
}

/// The fields of a pinned map of an earlier layout; `None` where nothing describes it, or its fields meant something else.
fn fields(description: &Path) -> Option<BTreeMap<String, Field>> {
    let data = MapData::from_fd(sys::open_pin(description, true).ok()?).ok()?;
    let shape = sys::Shape { key: 4, value: DESCRIPTION };
    let value = sys::lookup(data.fd().as_fd(), shape, &0_u32.to_ne_bytes()).ok()??;
    let text = value.split(|byte| *byte == 0).next().map(String::from_utf8_lossy)?.into_owned();
    let layout = text.lines().next()?.split_whitespace().nth(1)?.parse::<u32>().ok()?;
    (layout == edge_common::maps::LAYOUT).then(|| described(&text))
}

/// Fills maps that were just made under `incoming/` from those of earlier layouts; what could not be carried over, in words.
///
/// # Errors
/// Where a map cannot be read or written.
pub fn fill(pins: &Pins, made: &[&str]) -> Result<Vec<String>, PortError> {
    let mut notes = Vec::new();
    let pinned = pinned(pins)?;
    for map in made {
        for old in earlier(pins, &pinned, map) {
            match copy(pins, map, old, &pins.incoming(map), true)? {
                Some(count) => tracing::info!(map, %old, count, "elements carried over from an earlier layout"),
                None => notes.push(format!(
                    "{map} starts empty: the fields of {old} are not described, or meant something else"
                )),
            }
        }
    }
    Ok(notes)
}

/// Moves what was made under `incoming/` to where programs find it.
///
/// # Errors
/// Where bpffs refuses.
pub fn arrive(pins: &Pins, made: &[&str]) -> io::Result<()> {
    made.iter().try_for_each(|map| fs::rename(pins.incoming(map), pins.map(map)))
}

/// Adds flows that began in the tables of earlier layouts after [`fill`], now that no program writes to those any more; how many.
///
/// # Errors
/// Where a map cannot be read or written.
pub fn catch_up(pins: &Pins) -> Result<u64, PortError> {
    let mut added = 0;
    let pinned = pinned(pins)?;
    for (map, layout) in pins.layouts() {
        if layout.kind != BPF_MAP_TYPE_HASH as u32 && layout.kind != BPF_MAP_TYPE_LRU_HASH as u32 {
            continue;
        }
        for old in earlier(pins, &pinned, map) {
            added += copy(pins, map, old, &pins.map(map), false)?.unwrap_or(0);
        }
    }
    Ok(added)
}

/// True where a map has pins of another layout, or nobody can say.
pub fn is_pending(pins: &Pins) -> bool {
    let Ok(pinned) = pinned(pins) else { return true };
    pins.layouts().keys().any(|map| earlier(pins, &pinned, map).next().is_some())
}

/// File names of the pinned maps.
fn pinned(pins: &Pins) -> Result<Vec<String>, PortError> {
    pins::files(&pins.maps()).map_err(|error| PortError::new("listing pins", error))
}

/// Those of the pins that are of this map with another layout.
fn earlier<'a>(pins: &Pins, pinned: &'a [String], map: &str) -> impl Iterator<Item = &'a String> {
    let own = pins.map(map);
    pinned.iter().filter(move |file| {
        file.rsplit_once('-').is_some_and(|(name, _)| name == map)
            && own.file_name().is_some_and(|own| own != file.as_str())
    })
}

/// Copies every element of an old map that the new one does not have; how many, or `None` where that cannot be done.
fn copy(pins: &Pins, map: &str, old: &str, to: &Path, arrays: bool) -> Result<Option<u64>, PortError> {
    let Some(layout) = pins.layouts().get(map) else { return Ok(None) };
    let is_hash = layout.kind == BPF_MAP_TYPE_HASH as u32 || layout.kind == BPF_MAP_TYPE_LRU_HASH as u32;
    let is_array = layout.kind == BPF_MAP_TYPE_ARRAY as u32 || layout.kind == BPF_MAP_TYPE_PERCPU_ARRAY as u32;
    if !(is_hash || arrays && is_array) || pins::NOT_CARRIED.contains(&map) {
        return Ok(Some(0));
    }
    let Some(before) = fields(&pins.descriptions().join(old)) else { return Ok(None) };
    let reader = Reader::at(&pins.maps().join(old))?;
    let new = Reader::at(to)?;
    let after = described(&pins.fields(map));
    let per_cpu = |reader: &Reader| reader.shape.value / reader.cpus.max(1);
    let keys = Moves::between(&before, &after, 'k', new.shape.key);
    let values = Moves::between(&before, &after, 'v', per_cpu(&new));
    let what = || format!("carrying {old} over");
    let writable = sys::open_pin(to, false).map_err(|error| PortError::new(what(), error))?;
    let (mut count, mut failed) = (0, None);
    let entries = if is_array { layout.max_entries as usize } else { usize::MAX };
    reader.for_first(entries, |key, value| {
        let value: Option<Vec<u8>> = value
            .chunks_exact(per_cpu(&reader).max(1))
            .map(|one| values.apply(one))
            .collect::<Option<Vec<_>>>()
            .map(|all| all.concat());
        let (Some(key), Some(value)) = (if is_array { Some(key.to_vec()) } else { keys.apply(key) }, value) else {
            return;
        };
        match sys::update(writable.as_fd(), &key, &value, if is_hash { NOEXIST } else { 0 }) {
            Ok(()) => count += 1,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => failed = Some(error),
        }
    })?;
    match failed {
        Some(error) if error.raw_os_error() != Some(libc::E2BIG) => Err(PortError::new(what(), error)),
        Some(_) => {
            tracing::warn!(map, old, "the new table is smaller and full: not every flow was carried over");
            Ok(Some(count))
        }
        None => Ok(Some(count)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(text: &str) -> BTreeMap<String, Field> {
        described(text)
    }

    #[test]
    fn fields_follow_their_names_in_both_directions_and_new_ones_are_zero() {
        let old = layout("v:a 0 2\nv:b 2 2\nv:c 4 4");
        let new = layout("v:a 0 2\nv:middle 2 4\nv:c 6 4\nv:b 10 2");
        let value = [1, 2, 3, 4, 5, 6, 7, 8];
        let there = Moves::between(&old, &new, 'v', 12).apply(&value).unwrap();
        assert_eq!(there, [1, 2, 0, 0, 0, 0, 5, 6, 7, 8, 3, 4]);
        assert_eq!(Moves::between(&new, &old, 'v', 8).apply(&there).unwrap(), value);
    }

    #[test]
    fn a_value_shorter_than_described_is_left_out() {
        let fields = layout("v:a 0 8");
        assert_eq!(Moves::between(&fields, &fields, 'v', 8).apply(&[1; 7]), None);
    }
}
