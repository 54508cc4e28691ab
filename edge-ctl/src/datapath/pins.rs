//! Where maps, programs and links are pinned, and how the pins are told apart.
//!
//! Under the pin folder: `maps/NAME-LAYOUT`, `programs/NAME-OBJECT`,
//! `stages/NAME-OBJECT`, `links/INTERFACE-HOOK`. LAYOUT is a hash over all that
//! must match for two programs to share a map, OBJECT one over the whole object file. bpffs refuses names with a dot.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use aya::maps::{Map, MapData, MapError};
use edge_common::maps::{self, name};

use super::{
    btf::{self, Btf, Field},
    sys::{self, Shape},
};
use crate::reconcile::ports::PortError;

/// FNV-1a, 64 bits: stable across builds, which a hash in a file name must be.
pub fn fnv1a(chunks: &[&[u8]]) -> u64 {
    let bytes = chunks.iter().flat_map(|chunk| chunk.iter());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

/// A map's definition, as far as sharing it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// `BPF_MAP_TYPE_*`.
    pub kind: u32,
    /// Key, bytes.
    pub key: u32,
    /// Value, bytes (of one CPU).
    pub value: u32,
    /// Capacity.
    pub max_entries: u32,
    /// Creation flags.
    pub flags: u32,
    /// Hash of the names, offsets and sizes of the fields.
    pub fields: u64,
}

/// Structures in the maps, by their names in the object's BTF; what is not listed is one integer, or has no inner layout.
/// A structure that the BTF does not have under this name counts as one field.
const STRUCTURES: [(&str, &str, &str); 19] = [
    (name::ESTABLISHED, "FlowKey<u32>", "Flow<u32>"),
    (name::HALF_OPEN, "FlowKey<u32>", "Flow<u32>"),
    (name::CLOSING, "FlowKey<u32>", "Flow<u32>"),
    (name::ESTABLISHED_V6, "FlowKey<[u32; 4]>", "Flow<[u32; 4]>"),
    (name::HALF_OPEN_V6, "FlowKey<[u32; 4]>", "Flow<[u32; 4]>"),
    (name::CLOSING_V6, "FlowKey<[u32; 4]>", "Flow<[u32; 4]>"),
    (name::SERVICE_INDEX, "ServiceKey", ""),
    (name::SERVICES, "", "ServiceEntry"),
    (name::BACKENDS, "", "BackendEntry"),
    (name::BACKEND_INDEX, "ServiceKey", ""),
    (name::NEXT_HOPS, "", "NextHop"),
    (name::NEXT_HOP_INDEX, "NeighbourKey", ""),
    (name::VLANS, "Port", "Port"),
    (name::CONTROL, "", "Control"),
    (name::SERVICE_STATS, "", "ServiceStats"),
    (name::BACKEND_STATS, "", "ServiceStats"),
    (name::FLOW_CACHE, "", "CacheSet<u32>"),
    (name::FLOW_CACHE_V6, "", "CacheSet<[u32; 4]>"),
    (name::CACHE_WINDOWS, "", "CacheWindow"),
];

/// Maps that start empty whenever their layout is another one: copies, and what belongs to copies.
pub const NOT_CARRIED: [&str; 4] = [name::FLOW_CACHE, name::FLOW_CACHE_V6, name::CACHE_WINDOWS, name::FLOW_GENERATIONS];

/// The fields of a map's keys (`k:`) and values (`v:`), as [`btf::describe`] writes them.
fn describe(btf: Option<&Btf>, map: &str, key: u32, value: u32) -> String {
    let (_, key_name, value_name) = STRUCTURES.into_iter().find(|(name, ..)| *name == map).unwrap_or_default();
    let half = |half: char, name: &str, size: u32| {
        // A structure of another size than the map's is not the one that lies in it.
        let found = btf.and_then(|btf| btf.structure(name)).filter(|(_, found)| *found == size);
        let fields = found.map_or_else(
            || vec![Field { path: format!("{half}:"), offset: 0, size }],
            |(fields, _)| {
                fields.into_iter().map(|field| Field { path: format!("{half}:{}", field.path), ..field }).collect()
            },
        );
        btf::describe(&fields)
    };
    format!("{}\n{}", half('k', key_name, key), half('v', value_name, value))
}

/// Maps whose capacity is the operator's choice, and so no part of their layout.
fn is_sized(map: &str) -> bool {
    FLOW_TABLES.contains(&map)
        || OF_BACKENDS.contains(&map)
        || map == name::SELECTION
        || map == name::FLOW_CACHE
        || map == name::FLOW_CACHE_V6
}

/// Maps with one element for each backend.
pub const OF_BACKENDS: [&str; 9] = [
    name::BACKENDS,
    name::BACKEND_STATE,
    name::BACKEND_CURSOR,
    name::BACKEND_LIVE,
    name::BACKEND_PENDING,
    name::BACKEND_EXPIRED,
    name::BACKEND_INDEX,
    name::BACKEND_STATS,
    name::BACKEND_SIGNALS,
];

/// Maps whose entries the sweep counts on its way.
pub const FLOW_TABLES: [&str; 6] =
    [name::ESTABLISHED, name::HALF_OPEN, name::CLOSING, name::ESTABLISHED_V6, name::HALF_OPEN_V6, name::CLOSING_V6];

impl Layout {
    /// The hash in the pin's name.
    pub fn hash(&self, map: &str) -> u64 {
        let max_entries = if is_sized(map) { 0 } else { self.max_entries };
        let numbers = [maps::LAYOUT, self.kind, self.key, self.value, max_entries, self.flags];
        let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        fnv1a(&[map.as_bytes(), &bytes, &self.fields.to_le_bytes()])
    }
}

/// The layouts of all maps of an object and of the daemon's own.
///
/// # Errors
/// Where the object is not an eBPF object, or lacks one of our maps.
pub fn layouts(object: &[u8]) -> Result<BTreeMap<&'static str, Layout>, PortError> {
    Ok(described_layouts(object)?.into_iter().map(|(map, (layout, _))| (map, layout)).collect())
}

/// As [`layouts`], with the descriptions of the fields.
fn described_layouts(object: &[u8]) -> Result<BTreeMap<&'static str, (Layout, String)>, PortError> {
    let parsed = aya_obj::Object::parse(object).map_err(|error| PortError::new("reading the eBPF object", error))?;
    let btf = parsed.btf.as_ref().and_then(|btf| Btf::parse(&btf.to_bytes()));
    let mut layouts = BTreeMap::new();
    for map in name::ALL.iter().copied().chain(name::STREAMS) {
        let Some(definition) = parsed.maps.get(map) else {
            return Err(PortError::new("reading the eBPF object", format!("it has no map {map}")));
        };
        let fields = describe(btf.as_ref(), map, definition.key_size(), definition.value_size());
        let layout = Layout {
            kind: definition.map_type(),
            key: definition.key_size(),
            value: definition.value_size(),
            max_entries: definition.max_entries(),
            flags: definition.map_flags(),
            fields: fnv1a(&[fields.as_bytes()]),
        };
        layouts.insert(map, (layout, fields));
    }
    for (map, max_entries) in name::DAEMON.into_iter().zip([maps::SERVICES, maps::BACKENDS]) {
        let kind = aya_obj::generated::bpf_map_type::BPF_MAP_TYPE_ARRAY as u32;
        let fields = describe(None, map, 4, 8);
        let layout = Layout { kind, key: 4, value: 8, max_entries, flags: 0, fields: fnv1a(&[fields.as_bytes()]) };
        layouts.insert(map, (layout, fields));
    }
    Ok(layouts)
}

/// The pin folder and what this build calls its pins.
#[derive(Clone, Debug)]
pub struct Pins {
    root: PathBuf,
    layouts: BTreeMap<&'static str, Layout>,
    fields: BTreeMap<&'static str, String>,
    object: u64,
}

impl Pins {
    /// Pins of `object` under `root`.
    ///
    /// # Errors
    /// As [`layouts`].
    pub fn new(root: &Path, object: &[u8]) -> Result<Self, PortError> {
        let described = described_layouts(object)?;
        let layouts = described.iter().map(|(map, (layout, _))| (*map, *layout)).collect();
        let fields = described.into_iter().map(|(map, (_, fields))| (map, fields)).collect();
        Ok(Self { root: root.to_owned(), layouts, fields, object: fnv1a(&[object]) })
    }

    /// The pin folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Folder of the maps.
    pub fn maps(&self) -> PathBuf {
        self.root.join("maps")
    }

    /// Folder of maps that are being filled; see [`super::migrate`].
    pub fn arrivals(&self) -> PathBuf {
        self.root.join("incoming")
    }

    /// Folder of the descriptions of the maps' fields.
    pub fn descriptions(&self) -> PathBuf {
        self.root.join("layouts")
    }

    /// Folder of the programs.
    pub fn programs(&self) -> PathBuf {
        self.root.join("programs")
    }

    /// Folder of the links.
    pub fn links(&self) -> PathBuf {
        self.root.join("links")
    }

    /// All map names and layouts.
    pub fn layouts(&self) -> &BTreeMap<&'static str, Layout> {
        &self.layouts
    }

    /// Pin of a map.
    pub fn map(&self, map: &str) -> PathBuf {
        self.maps().join(self.file(map))
    }

    /// Pin of a map that is being filled.
    pub fn incoming(&self, map: &str) -> PathBuf {
        self.arrivals().join(self.file(map))
    }

    /// Pin of the description of a map's fields.
    pub fn description(&self, map: &str) -> PathBuf {
        self.descriptions().join(self.file(map))
    }

    /// The fields of a map in this object, as text.
    pub fn fields(&self, map: &str) -> String {
        self.fields.get(map).cloned().unwrap_or_default()
    }

    fn file(&self, map: &str) -> String {
        let hash = self.layouts.get(map).map_or(0, |layout| layout.hash(map));
        format!("{map}-{:08x}", hash >> 32)
    }

    /// Pin of a program of this object.
    pub fn program(&self, program: &str) -> PathBuf {
        self.programs().join(format!("{program}-{:016x}", self.object))
    }

    /// Folder of the slots of the programs' stages; see [`super::stages`].
    pub fn all_stages(&self) -> PathBuf {
        self.root.join("stages")
    }

    /// Pin of the slots of a hook's stages, of this object.
    pub fn stages(&self, map: &str) -> PathBuf {
        self.all_stages().join(format!("{map}-{:016x}", self.object))
    }

    /// Pin of slots that were set aside; see [`super::stages`].
    pub fn stages_aside(&self, map: &str, number: u32) -> PathBuf {
        self.all_stages().join(format!("{map}-{:016x}-aside{number}", self.object))
    }

    /// Pin of an interface's link.
    pub fn link(&self, interface: &str, xdp: bool) -> PathBuf {
        // bpffs has no dots in names, and '%' cannot be confused with what replaces them.
        let interface = interface.replace('%', "%25").replace('.', "%2e");
        self.links().join(format!("{interface}-{}", if xdp { "xdp" } else { "tc" }))
    }

    /// Interfaces that have a pinned link, and whether it is XDP's.
    ///
    /// # Errors
    /// Where the folder cannot be read; a missing one is empty.
    pub fn linked(&self) -> io::Result<Vec<(String, bool)>> {
        let mut linked = Vec::new();
        for file in files(&self.links())? {
            let Some((interface, hook)) = file.rsplit_once('-') else { continue };
            linked.push((interface.replace("%2e", ".").replace("%25", "%"), hook == "xdp"));
        }
        Ok(linked)
    }
}

/// File names in a folder; none where it does not exist.
///
/// # Errors
/// Where it exists and cannot be read.
pub fn files(folder: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut names = Vec::new();
    for entry in entries {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// Opens a pinned map for reading and writing, as an aya map type.
///
/// # Errors
/// Where it is not pinned, or has another type.
pub fn open<T: TryFrom<Map, Error = MapError>>(pins: &Pins, map: &str) -> Result<T, PortError> {
    let path = pins.map(map);
    let what = || format!("opening the map {}", path.display());
    let data = MapData::from_pin(&path).map_err(|error| PortError::new(what(), chain(&error)))?;
    let typed = Map::from_map_data(data).and_then(T::try_from);
    typed.map_err(|error| PortError::new(what(), chain(&error)))
}

/// A pinned map, for reading.
#[derive(Debug)]
pub struct Reader {
    data: MapData,
    /// Sizes of its elements.
    pub shape: Shape,
    /// CPUs that each value holds; 1 for maps that are not per-CPU.
    pub cpus: usize,
}

impl Reader {
    /// Opens the pin read-only.
    ///
    /// # Errors
    /// Where it is not pinned, or may not be read.
    pub fn open(pins: &Pins, map: &str) -> Result<Self, PortError> {
        Self::at(&pins.map(map))
    }

    /// As [`Reader::open`], by the pin's path.
    ///
    /// # Errors
    /// As [`Reader::open`].
    pub fn at(path: &Path) -> Result<Self, PortError> {
        use aya_obj::generated::bpf_map_type::BPF_MAP_TYPE_PERCPU_ARRAY;
        let what = || format!("opening the map {}", path.display());
        let fd = sys::open_pin(path, true).map_err(|error| PortError::new(what(), error))?;
        let data = MapData::from_fd(fd).map_err(|error| PortError::new(what(), chain(&error)))?;
        let info = data.info().map_err(|error| PortError::new(what(), chain(&error)))?;
        let kind = info.map_type().map_err(|error| PortError::new(what(), chain(&error)))?;
        let (key, value) = (info.key_size() as usize, info.value_size() as usize);
        let (value, cpus) = if kind as u32 == BPF_MAP_TYPE_PERCPU_ARRAY as u32 {
            let cpus = aya::util::nr_cpus().map_err(|(_, error)| PortError::new("counting CPUs", error))?;
            (value.next_multiple_of(8) * cpus, cpus)
        } else {
            (value, 1)
        };
        Ok(Self { data, shape: Shape { key, value }, cpus })
    }

    /// The map.
    pub fn data(&self) -> &MapData {
        &self.data
    }

    /// One page; see [`sys::Cursor::next_page`].
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn page(&self, cursor: &mut sys::Cursor, limit: usize) -> Result<sys::Page, PortError> {
        use std::os::fd::AsFd as _;
        // Some values are as large as a thousand of others.
        let limit = limit.min((LARGEST_PAGE / self.shape.value.max(1)).max(1));
        let page = cursor.next_page(self.data.fd().as_fd(), self.shape, limit);
        page.map_err(|error| PortError::new("reading a map", error))
    }

    /// Every element, through `visit`.
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn for_each(&self, mut visit: impl FnMut(&[u8], &[u8])) -> Result<(), PortError> {
        self.for_first(usize::MAX, &mut visit)
    }

    /// The first `count` elements, through `visit`: those below that number where the map is an array.
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn for_first(&self, count: usize, mut visit: impl FnMut(&[u8], &[u8])) -> Result<(), PortError> {
        self.read(sys::Cursor::default(), count, &mut visit)
    }

    /// The `count` elements of an array from number `first` on, through `visit`.
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn for_range(&self, first: u32, count: usize, mut visit: impl FnMut(&[u8], &[u8])) -> Result<(), PortError> {
        self.read(first.checked_sub(1).map_or_else(sys::Cursor::default, sys::Cursor::after), count, &mut visit)
    }

    fn read(
        &self,
        mut cursor: sys::Cursor,
        count: usize,
        visit: &mut dyn FnMut(&[u8], &[u8]),
    ) -> Result<(), PortError> {
        let mut left = count;
        while left > 0 && !cursor.is_finished() {
            for (key, value) in self.page(&mut cursor, left.min(PAGE))?.iter(self.shape).take(left) {
                visit(key, value);
                left -= 1;
            }
        }
        Ok(())
    }

    /// One element's bytes.
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, PortError> {
        use std::os::fd::AsFd as _;
        let value = sys::lookup(self.data.fd().as_fd(), self.shape, key);
        value.map_err(|error| PortError::new("reading a map", error))
    }
}

/// Bytes of values read in one call.
const LARGEST_PAGE: usize = 16 << 20;
/// Elements read in one call.
const PAGE: usize = 1024;

/// An error with its causes, which aya keeps apart.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
