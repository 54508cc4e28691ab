//! Loads the object, or adopts what an earlier run left pinned: maps of the same layout, programs of the same object,
//! links. With unchanged inputs nothing is written, loaded or attached ([`Datapath::writes`] counts).

mod links;
mod make;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::PathBuf,
    sync::Arc,
};

use aya::maps::{Array, HashMap, MapData};
use edge_common::{
    conntrack,
    maps::{Control, PortSet, name},
};

pub use self::links::{ProgramLoad, ProgramLoaded};
use self::make::{create_maps, object_error, parse, size_notes};
use super::{
    attach::{self, AttachedHook, Attachment},
    cache::FlowCache,
    cache_split::Receivers,
    events::EventsReader,
    flow_ends::FlowEnder,
    host, interfaces,
    kernel_view::KernelView,
    maps::Maps,
    migrate,
    pins::{self, Pins},
    program_log::ProgramLog,
    quiet::Quiet,
    stages,
    sweep::Sweeper,
    sys::monotonic_ns,
};
use crate::{config::valid::Edge, model::view::MapRow, reconcile::ports::PortError};

/// Why the datapath could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Not enough privilege.
    #[error("missing {missing}: run as root, or give the process these capabilities (the systemd unit does)")]
    Capability {
        /// Capability names.
        missing: String,
    },
    /// The kernel lacks something.
    #[error("{what}")]
    Feature {
        /// What it lacks.
        what: String,
    },
    /// The pin folder is not on a bpffs.
    #[error("{path} is not on a BPF file system; `mount -t bpf bpf /sys/fs/bpf` mounts one")]
    NoBpffs {
        /// The pin folder.
        path: PathBuf,
    },
    /// The pin folder cannot be made.
    #[error("making the folder {path}: {source}")]
    Folder {
        /// The folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A configured interface is not there.
    #[error("there is no interface `{name}`")]
    NoInterface {
        /// Its name.
        name: String,
    },
    /// Somebody else's XDP program is on the interface.
    #[error(
        "{interface} already runs the XDP program `{program}` (id {id}), which is not ours; detach it \
         (`ip link set dev {interface} xdp off`), or use hook = \"tc\""
    )]
    ForeignXdp {
        /// Interface.
        interface: String,
        /// Program name.
        program: String,
        /// Kernel id.
        id: u32,
    },
    /// No hook of the interface works.
    #[error("cannot attach to {interface}: {reason}")]
    Hook {
        /// Interface.
        interface: String,
        /// What each hook answered.
        reason: String,
    },
    /// The program is not loaded yet.
    #[error("the kernel has yet to verify the {} program", if *xdp { "XDP" } else { "TC" })]
    NotLoaded {
        /// Which program.
        xdp: bool,
    },
    /// The program could not be loaded.
    #[error("{reason}")]
    Refused {
        /// Why.
        reason: String,
    },
    /// The object, a map or a program.
    #[error("{what}: {reason}")]
    Object {
        /// What was being done.
        what: String,
        /// Why it failed.
        reason: String,
    },
    /// The seed.
    #[error("seed {path}: {reason}")]
    Seed {
        /// File.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

impl LoadError {
    /// True where waiting may help: the interface may yet appear, or somebody may detach their program.
    pub const fn is_retryable(&self) -> bool {
        matches!(self, Self::NoInterface { .. } | Self::ForeignXdp { .. } | Self::Hook { .. })
    }
}

impl From<PortError> for LoadError {
    fn from(error: PortError) -> Self {
        Self::Object { what: error.what, reason: error.reason }
    }
}

/// The loaded datapath. Dropping it leaves everything in place.
pub struct Datapath {
    edge: Edge,
    object: &'static [u8],
    pins: Pins,
    /// Where the program runs, by interface.
    attachments: BTreeMap<String, Attachment>,
    /// For each configured interface the one that the program runs on for it.
    bases: BTreeMap<String, String>,
    failures: BTreeMap<String, String>,
    /// Interfaces whose program (`true`: XDP) has yet to be loaded.
    waiting: BTreeMap<String, bool>,
    /// Why a program could not be loaded, until that has been told.
    refused: BTreeMap<bool, String>,
    control: Array<MapData, Control>,
    interfaces: HashMap<MapData, u32, u32>,
    ports: Array<MapData, PortSet>,
    /// Mapped once for everybody: each mapping is counted as this process's memory again.
    cache: Arc<FlowCache>,
    receivers: Receivers,
    quiet: Quiet,
    notes: Vec<String>,
    writes: u64,
}

impl Datapath {
    /// Creates or adopts the maps, and writes seed and SNAT ports where they differ. Attaches nothing yet:
    /// [`Datapath::attach_missing`] does.
    ///
    /// # Errors
    /// Names what is missing: a capability, a kernel feature, the bpffs, a readable seed.
    pub fn open(edge: &Edge, object: &'static [u8]) -> Result<Self, LoadError> {
        host::check()?;
        host::prepare_pin_folder(&edge.pin_path)?;
        let pins = Pins::new(&edge.pin_path, object)?;
        let (created, mut notes) = create_maps(&pins, &edge.tables, object)?;
        notes.extend(size_notes(&pins, &edge.tables));
        let mut datapath = Self {
            edge: edge.clone(),
            object,
            control: pins::open(&pins, name::CONTROL)?,
            interfaces: pins::open(&pins, name::INTERFACES)?,
            ports: pins::open(&pins, name::SNAT_PORTS)?,
            cache: Arc::new(FlowCache::open(&pins)?),
            receivers: Receivers::default(),
            quiet: Quiet::new(pins::open(&pins, name::ANSWERS_FROM)?),
            notes,
            pins,
            attachments: BTreeMap::new(),
            bases: BTreeMap::new(),
            failures: BTreeMap::new(),
            waiting: BTreeMap::new(),
            refused: BTreeMap::new(),
            writes: created,
        };
        datapath.write_seed()?;
        if datapath.cache.split_first(edge.tables.cache_sets() != [0, 0])? {
            datapath.writes += 1;
        }
        datapath.refresh_snat_ports()?;
        Ok(datapath)
    }

    /// The pins.
    pub fn pins(&self) -> &Pins {
        &self.pins
    }

    /// Writes to maps, loads and attachments since start; 0 where all was adopted unchanged.
    pub fn writes(&self) -> u64 {
        self.writes
    }

    /// What users should know although it works: a table that keeps its old size.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The reconciler's port.
    ///
    /// # Errors
    /// Where a map cannot be opened.
    pub fn port(&self) -> Result<Maps, PortError> {
        Maps::open(&self.pins)
    }

    /// What ends flows on order.
    ///
    /// # Errors
    /// Where a map cannot be opened.
    pub fn flow_ender(&self) -> Result<FlowEnder, PortError> {
        FlowEnder::open(&self.pins, Arc::clone(&self.cache))
    }

    /// What the program reports.
    ///
    /// # Errors
    /// Where a map cannot be opened.
    pub fn events(&self) -> Result<EventsReader, PortError> {
        EventsReader::open(&self.pins, Arc::clone(&self.cache))
    }

    /// The sweep over established flows.
    ///
    /// # Errors
    /// Where a map cannot be opened.
    pub fn sweeper(&self) -> Result<Sweeper, PortError> {
        Sweeper::open(&self.pins, Arc::clone(&self.cache))
    }

    /// What the program logs.
    ///
    /// # Errors
    /// Where the ring buffer cannot be opened.
    pub fn program_log(&self) -> Result<ProgramLog, LoadError> {
        // aya-log takes its ring buffer out of a loaded object; the maps are pinned, so this one makes none.
        let mut ebpf = parse(&self.pins, &self.edge.tables, self.object)?;
        ProgramLog::open(&mut ebpf).map_err(|error| object_error("opening the program's log", &error))
    }

    /// The views.
    ///
    /// # Errors
    /// Where a map cannot be opened.
    pub fn view(&self) -> Result<KernelView, PortError> {
        KernelView::with_cache(self.pins.clone(), Arc::clone(&self.cache))
    }

    /// True while maps of an earlier layout are in use, whose entries follow once the program has been swapped.
    pub fn is_migrating(&self) -> bool {
        migrate::is_pending(&self.pins)
    }

    /// Takes over a changed `[edge]`: interfaces and hook, at the next [`Datapath::attach_missing`].
    pub fn reconfigure(&mut self, edge: &Edge) {
        self.notes = size_notes(&self.pins, &edge.tables);
        self.edge = Edge { pin_path: self.edge.pin_path.clone(), ..edge.clone() };
    }

    /// One row for each map.
    ///
    /// # Errors
    /// Where a map cannot be read.
    pub fn map_rows(&self) -> Result<Vec<MapRow>, PortError> {
        self.view()?.map_rows()
    }

    /// Makes all flows look their route up again.
    ///
    /// # Errors
    /// Where the map cannot be written.
    pub fn bump_route_generation(&mut self) -> Result<u32, LoadError> {
        let mut control = self.read_control()?;
        control.route_generation = control.route_generation.wrapping_add(1);
        self.control.set(0, control, 0).map_err(|error| object_error("writing the control map", &error))?;
        self.writes += 1;
        Ok(control.route_generation)
    }

    /// From now on clients of unknown connections are told nothing for a while: another edge was lost.
    ///
    /// # Errors
    /// Where the map cannot be written.
    pub fn begin_quiet(&mut self) -> Result<(), LoadError> {
        self.quiet
            .begin(monotonic_ns())
            .map_err(|error| object_error("writing the time until which nobody is told", &error))?;
        self.writes += 1;
        Ok(())
    }

    /// Seconds for which clients of unknown connections are still told nothing.
    ///
    /// # Errors
    /// Where the map cannot be read.
    pub fn quiet_left(&self) -> Result<u64, LoadError> {
        self.quiet
            .left(monotonic_ns())
            .map_err(|error| object_error("reading the time until which nobody is told", &error))
    }

    /// Splits the flow cache anew where other CPUs receive packets than have a part of it; those that have one then.
    ///
    /// # Errors
    /// Where the kernel cannot say that no program uses the old parts any more; there is no cache then.
    pub fn split_cache(&mut self) -> Result<Option<Vec<u32>>, LoadError> {
        let Some(cpus) = self.receivers.look(&self.cache.cpus()) else { return Ok(None) };
        self.cache.split(&cpus)?;
        self.writes += 1;
        Ok(Some(cpus))
    }

    /// Writes the ports that SNAT may use, where they changed.
    ///
    /// # Errors
    /// Where the host's ports cannot be read or the map not written.
    pub fn refresh_snat_ports(&mut self) -> Result<(), LoadError> {
        let what = "finding the ports that SNAT may use";
        let ports = host::snat_ports()
            .map_err(|error| LoadError::Object { what: what.to_owned(), reason: error.to_string() })?;
        let before = self.ports.get(&0, 0).map_err(|error| object_error(what, &error))?;
        if before != ports {
            self.ports.set(0, ports, 0).map_err(|error| object_error(what, &error))?;
            self.writes += 1;
        }
        Ok(())
    }

    /// Detaches from every interface and removes all pins: nothing of ours is left in the kernel, and flows end.
    ///
    /// # Errors
    /// Where a pin cannot be removed.
    pub fn detach_all(self) -> io::Result<()> {
        detach_all(&self.pins)
    }

    /// Has the program copy packets of a service (and, unless 0, of one backend only), `length` bytes of each, for so many
    /// seconds; 0 ends it.
    ///
    /// # Errors
    /// Where the map cannot be written.
    pub fn capture(&mut self, service: u32, backend: u32, length: u16, seconds: u8) -> Result<(), LoadError> {
        let before = self.read_control()?;
        let ends = monotonic_ns().saturating_add(u64::from(seconds) * 1_000_000_000);
        let control = Control {
            // 0 means off.
            capture_until: if seconds == 0 { 0 } else { conntrack::ticks(ends).max(1) },
            capture_service: u16::try_from(service).unwrap_or(0),
            capture_length: length,
            capture_backend: backend,
            ..before
        };
        if control != before {
            self.control.set(0, control, 0).map_err(|error| object_error("writing the control map", &error))?;
            self.writes += 1;
        }
        Ok(())
    }

    /// Ends a capture that nobody renewed, so that the program does not even look.
    ///
    /// # Errors
    /// Where the map cannot be written.
    pub fn end_stale_capture(&mut self) -> Result<(), LoadError> {
        let until = self.read_control()?.capture_until;
        if until != 0 && conntrack::due(until, conntrack::ticks(monotonic_ns())) {
            self.capture(0, 0, 0, 0)?;
        }
        Ok(())
    }

    fn read_control(&self) -> Result<Control, LoadError> {
        self.control.get(&0, 0).map_err(|error| object_error("reading the control map", &error))
    }

    fn write_seed(&mut self) -> Result<(), LoadError> {
        let seed = host::seed(&self.edge)?;
        let before = self.read_control()?;
        if before.seed != seed {
            let control = Control { seed, ..before };
            self.control.set(0, control, 0).map_err(|error| object_error("writing the control map", &error))?;
            self.writes += 1;
        }
        Ok(())
    }

    /// The seed in force, for the Maglev fill.
    ///
    /// # Errors
    /// Where the control map cannot be read.
    pub fn seed(&self) -> Result<[u64; 2], LoadError> {
        Ok(self.read_control()?.seed)
    }

    /// Removes pins of other objects and layouts, now that nothing of this edge runs them.
    fn retire_old_pins(&mut self) {
        let own: BTreeSet<PathBuf> = self.pins.layouts().keys().map(|map| self.pins.map(map)).collect();
        let hooks = [true, false];
        let programs = hooks.map(|xdp| self.pins.program(stages::entry(xdp)));
        let slots = hooks.map(|xdp| self.pins.stages(stages::map(xdp)));
        let descriptions = self.pins.layouts().keys().map(|map| self.pins.description(map)).collect();
        // A map without its description could not be carried over: maps first.
        let folders = [
            (self.pins.maps(), own),
            (self.pins.descriptions(), descriptions),
            (self.pins.programs(), programs.into_iter().collect()),
            (self.pins.all_stages(), slots.into_iter().collect()),
        ];
        for (folder, keep) in folders {
            for file in pins::files(&folder).unwrap_or_default() {
                let pin = folder.join(file);
                if !keep.contains(&pin) {
                    tracing::info!(pin = %pin.display(), "removing the pin of an earlier version");
                    self.writes += u64::from(fs::remove_file(&pin).is_ok());
                }
            }
        }
    }
}

/// Detaches every pinned link under these pins and removes them all, with no daemon needed.
///
/// # Errors
/// Where a pin cannot be removed.
pub fn detach_all(pins: &Pins) -> io::Result<()> {
    for (interface, xdp) in pins.linked()? {
        attach::detach_pin(&pins.link(&interface, xdp));
    }
    if attach::tc_hook() == AttachedHook::Clsact {
        for interface in interfaces::list()? {
            attach::detach_clsact(&interface.name);
        }
    }
    let programs = [pins.links(), pins.programs(), pins.all_stages()];
    for folder in programs.into_iter().chain([pins.maps(), pins.arrivals(), pins.descriptions()]) {
        for file in pins::files(&folder)? {
            fs::remove_file(folder.join(file))?;
        }
        fs::remove_dir(&folder)?;
    }
    match fs::remove_dir(pins.root()) {
        // The folder may be a mount point, or made for us by the unit.
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        result => result,
    }
}
