//! Loaded objects that are used again: verifying all stages of a hook takes seconds, and most tests want nothing but empty
//! maps.

use std::{
    ops::{Deref, DerefMut},
    os::fd::{AsFd as _, BorrowedFd},
    sync::{Mutex, PoisonError},
};

use anyhow::{Context as _, Result};
use aya::{
    Ebpf,
    maps::{Map, MapData, RingBuf},
    programs::{
        SchedClassifier, TcAttachType, Xdp, XdpMode,
        tc::{self, SchedClassifierLinkId},
        xdp::XdpLinkId,
    },
};
use edge_ctl::datapath::{
    attach::{AttachedHook, tc_hook},
    sys::{self, Cursor, Shape},
};

use super::{
    rig::{Hook, Settings},
    tap::Wire,
};
use crate::model::kernel as raw;

/// What an object was loaded for: hook, and entries of the maps whose sizes a test may choose.
type Kind = (Hook, [u32; 3]);

fn kind(hook: Hook, settings: &Settings) -> Kind {
    (hook, [settings.established, settings.lru, settings.cache])
}

static IDLE: Mutex<Vec<(Kind, usize, Ebpf)>> = Mutex::new(Vec::new());

/// A loaded object, which waits for the next test once this one is through with it.
pub struct Loaded {
    ebpf: Option<Ebpf>,
    /// Maps that it had when loaded; `None` where nobody may use it again.
    again: Option<(Kind, usize)>,
    attached: Vec<Attached>,
}

enum Attached {
    Xdp(XdpLinkId),
    Tc(SchedClassifierLinkId),
}

impl Loaded {
    /// An object of this test alone.
    pub fn once(ebpf: Ebpf) -> Self {
        Self { ebpf: Some(ebpf), again: None, attached: Vec::new() }
    }

    /// An object for these settings: one that waits, else what `load` loads. All its maps are as after loading.
    ///
    /// # Errors
    /// Those of `load`, and of a map that cannot be emptied.
    pub(super) fn taken(hook: Hook, settings: &Settings, load: impl FnOnce() -> Result<Ebpf>) -> Result<Self> {
        let kind = kind(hook, settings);
        let waiting = {
            let mut idle = IDLE.lock().unwrap_or_else(PoisonError::into_inner);
            let place = idle.iter().position(|(other, ..)| *other == kind);
            place.map(|place| idle.swap_remove(place))
        };
        let (maps, ebpf) = match waiting {
            Some((_, maps, ebpf)) => {
                empty(&ebpf)?;
                (maps, ebpf)
            }
            None => {
                let ebpf = load()?;
                (ebpf.maps().count(), ebpf)
            }
        };
        Ok(Self { ebpf: Some(ebpf), again: Some((kind, maps)), attached: Vec::new() })
    }

    /// Attaches the entry program to an interface of this thread's namespace, until the owner is through.
    ///
    /// # Errors
    /// Where it is not loaded, or the kernel refuses.
    pub fn attach(&mut self, interface: &str, wire: Wire) -> Result<()> {
        let attached = if wire == Wire::Tc {
            if tc_hook() == AttachedHook::Clsact {
                tc::qdisc_add_clsact(interface)?;
            }
            Attached::Tc(self.tc()?.attach(interface, TcAttachType::Ingress)?)
        } else {
            let mode = if wire == Wire::Native { XdpMode::Driver } else { XdpMode::Skb };
            Attached::Xdp(self.xdp()?.attach(interface, mode)?)
        };
        self.attached.push(attached);
        Ok(())
    }

    fn detach(&mut self) -> Result<()> {
        for attached in std::mem::take(&mut self.attached) {
            match attached {
                Attached::Xdp(link) => self.xdp()?.detach(link)?,
                Attached::Tc(link) => self.tc()?.detach(link)?,
            }
        }
        Ok(())
    }

    fn xdp(&mut self) -> Result<&mut Xdp> {
        Ok(self.program_mut("edge_xdp").context("no edge_xdp")?.try_into()?)
    }

    fn tc(&mut self) -> Result<&mut SchedClassifier> {
        Ok(self.program_mut("edge_tc").context("no edge_tc")?.try_into()?)
    }
}

impl Deref for Loaded {
    type Target = Ebpf;

    fn deref(&self) -> &Ebpf {
        match &self.ebpf {
            Some(ebpf) => ebpf,
            None => unreachable!("only dropping takes it"),
        }
    }
}

impl DerefMut for Loaded {
    fn deref_mut(&mut self) -> &mut Ebpf {
        match &mut self.ebpf {
            Some(ebpf) => ebpf,
            None => unreachable!("only dropping takes it"),
        }
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        // One that does not let go ends here.
        let detached = self.detach().is_ok();
        let (Some(ebpf), Some((kind, maps))) = (self.ebpf.take(), self.again) else { return };
        // A test may have taken a map out.
        if detached && ebpf.maps().count() == maps {
            IDLE.lock().unwrap_or_else(PoisonError::into_inner).push((kind, maps, ebpf));
        }
    }
}

/// Brings every map to where loading left it, but for the slots of stages.
fn empty(ebpf: &Ebpf) -> Result<()> {
    // What begins with a dot is the program's constants.
    for (name, map) in ebpf.maps().filter(|(name, _)| !name.starts_with('.')) {
        let emptied = match map {
            Map::Array(data) => zero(data, 1),
            Map::PerCpuArray(data) => {
                aya::util::nr_cpus().map_err(|(_, error)| error.into()).and_then(|cpus| zero(data, cpus))
            }
            Map::HashMap(data) | Map::LruHashMap(data) | Map::LpmTrie(data) => remove_all(data),
            Map::RingBuf(_) => read_all(map),
            _ => Ok(()),
        };
        emptied.with_context(|| format!("empty the map {name}"))?;
    }
    Ok(())
}

/// Elements of a map's page.
const PAGE: usize = 4096;

/// Zeroes the elements of an array that hold anything, for each of so many values to an element.
fn zero(data: &MapData, values: usize) -> Result<()> {
    let value = data.info()?.value_size() as usize;
    let shape = Shape { key: 4, value: if values == 1 { value } else { value.next_multiple_of(8) * values } };
    let zeros = vec![0; shape.value];
    each(data.fd().as_fd(), shape, PAGE.min((1 << 22) / shape.value.max(1)), |map, key, value| {
        if value.iter().any(|byte| *byte != 0) { Ok(sys::update(map, key, &zeros, 0)?) } else { Ok(()) }
    })
}

fn remove_all(data: &MapData) -> Result<()> {
    let info = data.info()?;
    let shape = Shape { key: info.key_size() as usize, value: info.value_size() as usize };
    let mut keys = Vec::new();
    each(data.fd().as_fd(), shape, PAGE, |_, key, _| {
        keys.push(key.to_vec());
        Ok(())
    })?;
    keys.iter().for_each(|key| raw::Map::of(data).delete_bytes(key));
    Ok(())
}

fn each(
    map: BorrowedFd<'_>,
    shape: Shape,
    page: usize,
    mut visit: impl FnMut(BorrowedFd<'_>, &[u8], &[u8]) -> Result<()>,
) -> Result<()> {
    let mut cursor = Cursor::default();
    while !cursor.is_finished() {
        let page = cursor.next_page(map, shape, page)?;
        page.iter(shape).try_for_each(|(key, value)| visit(map, key, value))?;
    }
    Ok(())
}

fn read_all(map: &Map) -> Result<()> {
    let mut ring = RingBuf::try_from(map)?;
    while ring.next().is_some() {}
    Ok(())
}
