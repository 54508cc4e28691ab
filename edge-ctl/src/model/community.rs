//! BGP communities as operators write them.

use std::{fmt, str::FromStr};

/// A community of any kind. Numbers are in host order; the wire has them big-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Community {
    /// RFC 1997: `64512:100`, or a well-known name.
    Standard(u32),
    /// RFC 8092: `64512:1:2`.
    Large(u32, u32, u32),
    /// RFC 4360, transitive two-octet or four-octet AS specific: `rt:64512:100`, `soo:64512:100`; others as `ext:0x...`.
    Extended(u64),
}

/// Sub-types of RFC 4360 that have a name.
const SUBTYPES: [(&str, u64); 2] = [("rt", 0x02), ("soo", 0x03)];
/// Well-known communities (RFC 1997, 7999, 8326).
const WELL_KNOWN: [(&str, u32); 5] = [
    ("graceful-shutdown", 0xffff_0000),
    ("blackhole", 0xffff_029a),
    ("no-export", 0xffff_ff01),
    ("no-advertise", 0xffff_ff02),
    ("no-export-subconfed", 0xffff_ff03),
];

impl Community {
    /// GRACEFUL_SHUTDOWN (RFC 8326).
    pub const GRACEFUL_SHUTDOWN: Self = Self::Standard(0xffff_0000);
    /// LLGR_STALE, as its number: the path is long-lived stale (RFC 9494 4.2).
    pub const LLGR_STALE_VALUE: u32 = 0xffff_0006;
    /// LLGR_STALE (RFC 9494).
    pub const LLGR_STALE: Self = Self::Standard(Self::LLGR_STALE_VALUE);
    /// NO_LLGR: the path must not become long-lived stale (RFC 9494).
    pub const NO_LLGR: Self = Self::Standard(0xffff_0007);
    /// NO_EXPORT (RFC 1997).
    pub const NO_EXPORT: Self = Self::Standard(0xffff_ff01);
    /// NO_ADVERTISE (RFC 1997).
    pub const NO_ADVERTISE: Self = Self::Standard(0xffff_ff02);
    /// NO_EXPORT_SUBCONFED (RFC 1997).
    pub const NO_EXPORT_SUBCONFED: Self = Self::Standard(0xffff_ff03);
}

impl FromStr for Community {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some((_, value)) = WELL_KNOWN.iter().find(|(name, _)| *name == text) {
            return Ok(Self::Standard(*value));
        }
        let wrong = || "not a community".to_owned();
        let parts: Vec<&str> = text.split(':').collect();
        match parts.as_slice() {
            ["ext", raw] => {
                let digits = raw.strip_prefix("0x").ok_or_else(wrong)?;
                u64::from_str_radix(digits, 16).map(Self::Extended).map_err(|_| wrong())
            }
            [kind, admin, local] => match SUBTYPES.iter().find(|(name, _)| name == kind) {
                Some((_, subtype)) => extended(*subtype, admin, local).ok_or_else(wrong),
                None => match (kind.parse(), admin.parse(), local.parse()) {
                    (Ok(a), Ok(b), Ok(c)) => Ok(Self::Large(a, b, c)),
                    _ => Err(wrong()),
                },
            },
            [high, low] => match (high.parse::<u16>(), low.parse::<u16>()) {
                (Ok(high), Ok(low)) => Ok(Self::Standard(u32::from(high) << 16 | u32::from(low))),
                _ => Err(wrong()),
            },
            _ => Err(wrong()),
        }
    }
}

/// RFC 4360 3.1 (two-octet AS, four-octet value) or RFC 5668 (four-octet AS, two-octet value).
fn extended(subtype: u64, admin: &str, local: &str) -> Option<Community> {
    let (admin, local): (u32, u32) = (admin.parse().ok()?, local.parse().ok()?);
    let (kind, value) = match (u16::try_from(admin), u16::try_from(local)) {
        (Ok(admin), _) => (0x00, u64::from(admin) << 32 | u64::from(local)),
        (Err(_), Ok(local)) => (0x02, u64::from(admin) << 16 | u64::from(local)),
        _ => return None,
    };
    Some(Community::Extended(kind << 56 | subtype << 48 | value))
}

impl fmt::Display for Community {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Standard(value) => match WELL_KNOWN.iter().find(|(_, known)| known == value) {
                Some((name, _)) => f.write_str(name),
                None => write!(f, "{}:{}", value >> 16, value & 0xffff),
            },
            Self::Large(a, b, c) => write!(f, "{a}:{b}:{c}"),
            Self::Extended(raw) => {
                let name = SUBTYPES.iter().find(|(_, subtype)| *subtype == raw >> 48 & 0xff).map(|(name, _)| *name);
                match (name, raw >> 56) {
                    (Some(name), 0x00) => write!(f, "{name}:{}:{}", raw >> 32 & 0xffff, raw & 0xffff_ffff),
                    (Some(name), 0x02) => write!(f, "{name}:{}:{}", raw >> 16 & 0xffff_ffff, raw & 0xffff),
                    _ => write!(f, "ext:{raw:#018x}"),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_reads_back_as_it_is_shown() {
        for text in [
            "64512:100",
            "no-export",
            "graceful-shutdown",
            "64512:1:2",
            "4200000000:1:2",
            "rt:64512:4200000000",
            "rt:4200000000:7",
            "soo:64512:100",
            "ext:0x4300000000000001",
        ] {
            assert_eq!(text.parse::<Community>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_no_community_is_refused() {
        for text in ["", "64512", "70000:1", "1:2:3:4", "rt:70000:70000", "xx:1:2", "ext:12", "-1:2"] {
            assert!(text.parse::<Community>().is_err(), "{text}");
        }
    }
}
