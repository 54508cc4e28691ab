//! `[log]`: the access log.

use std::path::PathBuf;

use super::read::Section;
use crate::model::access::{AccessLog, Format, Target};

/// `None`: no access log, or a fault that was reported.
pub(super) fn log(root: &Section<'_>) -> Option<AccessLog> {
    let section = root.table("log")?;
    let expected = "an absolute path such as \"/var/log/edge/access.log\", or \"journal\"";
    let target = section.parse("access", expected, target);
    let format = section.parse("format", "a format string such as \"$time $client $vip $end\"", Format::parse);
    if let (Some(format), false) = (&format, section.has("access")) {
        section.fault(&format.at, "`format` has no effect without `access`; add it, or remove this".to_owned());
    }
    section.finish();
    Some(AccessLog { target: target?.value, format: format.map(|format| format.value).unwrap_or_default() })
}

fn target(text: &str) -> Result<Target, String> {
    match PathBuf::from(text) {
        _ if text == "journal" => Ok(Target::Journal),
        path if !path.is_absolute() => Err("not absolute".to_owned()),
        path if path.file_name().is_none() || text.ends_with('/') => Err("it names a folder".to_owned()),
        path => Ok(Target::File(path)),
    }
}
