//! The eBPF object, built by the build script and carried inside the binary; and what is changed in it for kernels that lack
//! multi-buffer XDP.

use std::borrow::Cow;

use super::host::kernel_is_at_least;

/// The ELF object with the programs `edge_xdp` and `edge_tc` and every map of `edge_common::maps::name`, aligned as
/// the ELF parser needs it.
pub const EBPF_OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/edge-ebpf"));

/// Name of the section whose programs take packets of several buffers; cut after its first word, that of those that do not.
const FRAGS: &[u8] = b"xdp.frags\0";
/// Where that name is cut.
const CUT: usize = 3;
/// `call bpf_xdp_get_buff_len` (number 188).
const CALL_BUFF_LEN: [u8; 8] = [0x85, 0, 0, 0, 188, 0, 0, 0];
/// `r0 = 0`: no buffer but the first.
const NO_BUFFERS: [u8; 8] = [0xb7, 0, 0, 0, 0, 0, 0, 0];

/// True where XDP programs may take packets of several buffers (kernel 5.18), such as jumbo frames.
pub fn has_frags() -> bool {
    kernel_is_at_least(5, 18)
}

/// The object as this kernel can load it.
pub fn for_this_kernel(object: &[u8]) -> Cow<'_, [u8]> {
    for_kernel(object, has_frags())
}

/// The object for a kernel with multi-buffer XDP (`frags`), which is the object as it is, or without: its XDP programs no longer
/// ask for it, and no longer call the helper that came with it. What is no ELF object stays as it is; the parser names
/// the fault.
pub fn for_kernel(object: &[u8], frags: bool) -> Cow<'_, [u8]> {
    let changes = if frags { None } else { changes(object) };
    let Some(changes) = changes.filter(|changes| !changes.is_empty()) else { return Cow::Borrowed(object) };
    let mut changed = object.to_vec();
    for (at, bytes) in changes {
        if let Some(place) = changed.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    }
    Cow::Owned(changed)
}

/// Offsets in the file, and what stands there instead.
fn changes(object: &[u8]) -> Option<Vec<(usize, &'static [u8])>> {
    const STRINGS: u32 = 3;
    const EXECUTABLE: u64 = 4;
    let mut changes: Vec<(usize, &'static [u8])> = Vec::new();
    for section in sections(object)? {
        let bytes = object.get(section.offset..section.offset.checked_add(section.size)?)?;
        if section.flags & EXECUTABLE != 0 {
            let calls = bytes.chunks_exact(8).enumerate().filter(|(_, instruction)| *instruction == CALL_BUFF_LEN);
            changes.extend(calls.map(|(number, _)| (section.offset + 8 * number, NO_BUFFERS.as_slice())));
        } else if section.kind == STRINGS || is_btf(bytes) {
            // Names of sections stand in a string table and, for the functions' types, in the BTF.
            let names = bytes.windows(FRAGS.len()).enumerate().filter(|(_, name)| *name == FRAGS);
            changes.extend(names.map(|(at, _)| (section.offset + at + CUT, b"\0".as_slice())));
        }
    }
    Some(changes)
}

fn is_btf(section: &[u8]) -> bool {
    section.starts_with(&0xeb9f_u16.to_le_bytes())
}

/// A section of an ELF64 file, little endian.
struct Section {
    kind: u32,
    flags: u64,
    offset: usize,
    size: usize,
}

/// Section headers as the ELF specification lays them out; `None` where the file is cut short.
fn sections(object: &[u8]) -> Option<Vec<Section>> {
    let short = |at: usize| Some(usize::from(u16::from_le_bytes(*object.get(at..)?.first_chunk()?)));
    let long = |at: usize| Some(u64::from_le_bytes(*object.get(at..)?.first_chunk()?));
    let (table, size, count) = (usize::try_from(long(40)?).ok()?, short(58)?, short(60)?);
    let section = |number: usize| {
        let at = table.checked_add(number.checked_mul(size)?)?;
        Some(Section {
            kind: u32::from_le_bytes(*object.get(at.checked_add(4)?..)?.first_chunk()?),
            flags: long(at.checked_add(8)?)?,
            offset: usize::try_from(long(at.checked_add(24)?)?).ok()?,
            size: usize::try_from(long(at.checked_add(32)?)?).ok()?,
        })
    };
    (0..count).map(section).collect()
}

#[cfg(test)]
mod tests {
    use aya_obj::{Object, ProgramSection};

    use super::*;

    fn facts(object: &[u8]) -> (Vec<bool>, usize) {
        let object = Object::parse(object).unwrap();
        let frags = object.programs.values().filter_map(|program| match program.section {
            ProgramSection::Xdp { frags, .. } => Some(frags),
            _ => None,
        });
        let instructions = object.functions.values().flat_map(|function| &function.instructions);
        let calls = instructions.filter(|ins| ins.code == 0x85 && ins.src_reg() == 0 && ins.imm == 188);
        (frags.collect(), calls.count())
    }

    #[test]
    fn without_multi_buffer_xdp_no_program_asks_for_it_and_nothing_calls_its_helper() {
        let (frags, calls) = facts(&for_kernel(EBPF_OBJECT, true));
        assert!(!frags.is_empty() && frags.iter().all(|frags| *frags), "{frags:?}");
        assert!(calls > 0);
        let (frags, calls) = facts(&for_kernel(EBPF_OBJECT, false));
        assert!(!frags.is_empty() && frags.iter().all(|frags| !*frags), "{frags:?}");
        assert_eq!(calls, 0);
    }

    #[test]
    fn functions_keep_their_names_in_the_btf_without_multi_buffer_xdp() {
        let plain = for_kernel(EBPF_OBJECT, false);
        let known = |object: &[u8]| {
            let object = Object::parse(object).unwrap();
            object.functions.values().map(|function| function.func_info.func_info.len()).sum::<usize>()
        };
        assert_eq!(known(&plain), known(EBPF_OBJECT));
    }

    #[test]
    fn what_is_no_object_or_cut_short_is_left_to_the_parser() {
        for bytes in [&b""[..], b"ELF", &EBPF_OBJECT[..64], &EBPF_OBJECT[..EBPF_OBJECT.len() - 64]] {
            assert!(*for_kernel(bytes, false) == *bytes, "{} bytes", bytes.len());
        }
    }
}
