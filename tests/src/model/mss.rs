//! The largest segment size in a SYN (RFC 9293, 3.7.1) of a service that has one: lowered to that, and otherwise left alone.

use edge_common::maps::ServiceEntry;

use super::{
    connections::bits::SYN,
    wire::{Segment, TCP},
};

/// Bytes of a TCP header without options.
const HEADER: usize = 20;
/// Options that are looked at.
const LOOKED_AT: usize = 16;

/// Where in the frame the value stands that is to be lowered, and what it becomes.
pub fn lowered(frame: &[u8], segment: &Segment, service: &ServiceEntry) -> Option<(usize, u16)> {
    if service.mss == 0 || segment.key.protocol != TCP || segment.flags & SYN == 0 {
        return None;
    }
    let end = segment.l4 + segment.headers - segment.ip.header_len;
    let at = segment.l4 + HEADER + place(frame.get(segment.l4 + HEADER..end)?)?;
    let value = u16::from_be_bytes([*frame.get(at)?, *frame.get(at + 1)?]);
    (value > service.mss).then_some((at, service.mss))
}

/// The value's place among the options; `None` where there is none, or they contradict themselves before it.
fn place(options: &[u8]) -> Option<usize> {
    let mut at = 0;
    for _ in 0..LOOKED_AT {
        match *options.get(at..)? {
            [1, ..] => at += 1,
            [2, 4, _, _, ..] => return Some(at + 2),
            [0 | 2, ..] | [_] | [_, 0 | 1, ..] | [] => return None,
            [_, length, ..] => at += usize::from(length),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_value_is_found_behind_other_options_and_not_behind_nonsense() {
        assert_eq!(place(&[1, 3, 3, 7, 2, 4, 5, 0xb4]), Some(6));
        assert_eq!(place(&[8, 0, 2, 4, 5, 0xb4]), None);
        assert_eq!(place(&[0, 2, 4, 5, 0xb4]), None);
        assert_eq!(place(&[2, 4, 5]), None);
        assert_eq!(place(&[[1; 16].as_slice(), &[2, 4, 5, 0xb4]].concat()), None);
        assert_eq!(place(&[[1; 15].as_slice(), &[2, 4, 5, 0xb4]].concat()), Some(17));
    }
}
