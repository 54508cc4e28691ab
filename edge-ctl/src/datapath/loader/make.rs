//! What is not pinned yet is made: maps, with what maps of earlier layouts hold, and programs.

use std::{fs, io, path::PathBuf};

use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, MapData},
    programs::ProgramInfo,
};
use edge_common::maps::name;

use super::LoadError;
use crate::{
    config::valid::Tables,
    datapath::{
        attach::AttachedHook,
        migrate, object,
        pins::{self, Pins, chain},
        stages,
    },
};

pub(super) fn object_error(what: &str, error: &dyn std::error::Error) -> LoadError {
    LoadError::Object { what: what.to_owned(), reason: chain(error) }
}

/// Entries of a table: what is configured, but an LRU at least what its per-CPU free lists need.
pub(super) fn table_sizes(tables: &Tables) -> Vec<(&'static str, u32)> {
    let cpus = aya::util::nr_cpus().unwrap_or(1);
    let lru = u32::try_from(128 * 8 * cpus).unwrap_or(u32::MAX);
    let backends = pins::OF_BACKENDS.map(|map| (map, tables.backends));
    let flows = [
        (name::ESTABLISHED, tables.established.max(2)),
        (name::HALF_OPEN, tables.half_open.max(lru)),
        (name::CLOSING, tables.closing.max(lru)),
        (name::ESTABLISHED_V6, tables.established_v6.max(2)),
        (name::HALF_OPEN_V6, tables.half_open_v6.max(lru)),
        (name::CLOSING_V6, tables.closing_v6.max(lru)),
        (name::FLOW_CACHE, tables.cache_sets()[0].max(1)),
        (name::FLOW_CACHE_V6, tables.cache_sets()[1].max(1)),
    ];
    flows.into_iter().chain(backends).chain([(name::SELECTION, tables.selection)]).collect()
}

/// Creates the maps that are not pinned yet, with what maps of earlier layouts hold; the number created, and what users
/// should know of it.
pub(super) fn create_maps(pins: &Pins, tables: &Tables, object: &[u8]) -> Result<(u64, Vec<String>), LoadError> {
    let folder_error = |path: PathBuf| move |source: io::Error| LoadError::Folder { path, source };
    for file in pins::files(&pins.arrivals()).map_err(folder_error(pins.arrivals()))? {
        let pin = pins.arrivals().join(file);
        fs::remove_file(&pin).map_err(folder_error(pin))?;
    }
    let missing: Vec<&str> = pins.layouts().keys().copied().filter(|map| !pins.map(map).exists()).collect();
    if missing.is_empty() {
        return Ok((0, Vec::new()));
    }
    // A pinned program keeps the maps it was loaded with: it must not be adopted beside new ones.
    for xdp in [true, false] {
        stages::set_aside(pins, xdp).map_err(folder_error(pins.all_stages()))?;
    }
    for map in &missing {
        if let Some(layout) = pins.layouts().get(map) {
            migrate::describe(pins, map, layout)?;
        }
    }
    parse(pins, tables, object)?;
    for map in name::DAEMON.into_iter().filter(|map| missing.contains(map)) {
        let Some(layout) = pins.layouts().get(map) else { continue };
        let created = Array::<MapData, u64>::create(layout.max_entries, layout.flags);
        let created = created.map_err(|error| object_error(&format!("creating the map {map}"), &error))?;
        created.pin(pins.incoming(map)).map_err(|error| object_error(&format!("pinning the map {map}"), &error))?;
    }
    let notes = migrate::fill(pins, &missing)?;
    migrate::arrive(pins, &missing).map_err(folder_error(pins.maps()))?;
    Ok((missing.len() as u64, notes))
}

/// The object with its maps: pinned ones reused, others created and pinned as incoming.
pub(super) fn parse(pins: &Pins, tables: &Tables, object: &[u8]) -> Result<Ebpf, LoadError> {
    load_object(&mut loader(pins, tables), object)
}

fn load_object(loader: &mut EbpfLoader<'_>, object: &[u8]) -> Result<Ebpf, LoadError> {
    loader.load(&object::for_this_kernel(object)).map_err(|error| object_error("loading the eBPF object", &error))
}

fn loader(pins: &Pins, tables: &Tables) -> EbpfLoader<'static> {
    let mut loader = EbpfLoader::new();
    for (map, entries) in table_sizes(tables) {
        loader.map_max_entries(map, entries);
    }
    for map in name::ALL.iter().copied().chain(name::STREAMS) {
        let pinned = pins.map(map);
        loader.map_pin_path(map, if pinned.exists() { pinned } else { pins.incoming(map) });
    }
    loader
}

/// True where this object's stages and entry program of a hook are pinned.
pub(super) fn is_loaded(pins: &Pins, xdp: bool) -> bool {
    pins.program(stages::entry(xdp)).exists() && pins.stages(stages::map(xdp)).exists()
}

/// Loads and pins a hook's stages and entry program unless this object's are pinned; the number of loads.
pub(super) fn load_program(pins: &Pins, object: &[u8], xdp: bool) -> Result<u64, LoadError> {
    let (pin, slots) = (pins.program(stages::entry(xdp)), pins.stages(stages::map(xdp)));
    if is_loaded(pins, xdp) {
        return Ok(0);
    }
    stages::set_aside(pins, xdp).map_err(|source| LoadError::Folder { path: slots.clone(), source })?;
    // One object for all of a hook's programs: they share its maps that are not pinned. The sizes given here are those of
    // maps that are, and not looked at.
    let mut ebpf = load_object(loader(pins, &Tables::default()).map_pin_path(stages::map(xdp), slots), object)?;
    stages::fill(&mut ebpf, xdp, true)?;
    let program = ebpf.program_mut(stages::entry(xdp)).ok_or_else(|| LoadError::Object {
        what: format!("pinning {}", pin.display()),
        reason: "the eBPF object does not have the program".to_owned(),
    })?;
    program.pin(&pin).map_err(|error| object_error(&format!("pinning {}", pin.display()), &error))?;
    Ok(1)
}

pub(super) fn program_tag(pins: &Pins, hook: AttachedHook) -> Option<String> {
    let pin = pins.program(stages::entry(hook.is_xdp()));
    // Tools print the tag in the order of its bytes.
    ProgramInfo::from_pin(pin).ok().map(|info| format!("{:016x}", info.tag().swap_bytes()))
}

/// Tables that keep the size they were created with, although another is configured.
pub(super) fn size_notes(pins: &Pins, tables: &Tables) -> Vec<String> {
    let mut notes = Vec::new();
    for (map, wanted) in table_sizes(tables) {
        let Ok(info) = aya::maps::MapInfo::from_pin(pins.map(map)) else { continue };
        if info.max_entries() != wanted {
            notes.push(format!(
                "{map} keeps its {} entries instead of {wanted}, since what is in it is in use; `edge-ctl xdp detach` and a \
                 restart make it anew",
                info.max_entries()
            ));
        }
    }
    notes
}
