//! The systemd unit as `systemd-analyze` sees it.
#![allow(
    clippy::unwrap_used,
    reason = "a test may stop at the first broken assumption; clippy knows only #[test] as one"
)]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

/// The unit in a folder of its own, with programs that exist here; `None` (and a line) without systemd-analyze.
fn unit(test: &str) -> Option<(tempfile::TempDir, PathBuf)> {
    if Command::new("systemd-analyze").arg("--version").output().is_err() {
        println!("SKIPPED {test}: systemd-analyze is not installed");
        return None;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("edge.service");
    let text = fs::read_to_string(deploy().join("edge.service")).unwrap();
    fs::write(&path, text.replace("/usr/bin/edge-ctl", env!("CARGO_BIN_EXE_edge-ctl"))).unwrap();
    Some((folder, path))
}

fn analyze(arguments: &[&str], unit: &Path) -> (Output, String) {
    let output = Command::new("systemd-analyze").args(arguments).arg(unit).output().unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    (output, text)
}

#[test]
fn the_unit_is_valid_and_causes_no_warning() {
    let Some((_folder, unit)) = unit("the_unit_is_valid_and_causes_no_warning") else { return };
    let (output, text) = analyze(&["verify", "--man=no", "--recursive-errors=no"], &unit);
    assert!(output.status.success(), "{text}");
    assert!(!text.contains("edge.service"), "{text}");
}

#[test]
fn the_unit_exposes_no_more_than_it_must() {
    let Some((_folder, unit)) = unit("the_unit_exposes_no_more_than_it_must") else { return };
    // Tenths: 2.0 of 10.
    let (output, text) = analyze(&["security", "--offline=true", "--threshold=20", "--no-pager"], &unit);
    assert!(output.status.success(), "{text}");
}

#[test]
fn the_unit_has_exactly_the_five_capabilities_and_no_root() {
    let text = fs::read_to_string(deploy().join("edge.service")).unwrap();
    let value = |key: &str| text.lines().find_map(|line| line.strip_prefix(&format!("{key}="))).unwrap().to_owned();
    for key in ["AmbientCapabilities", "CapabilityBoundingSet"] {
        let mut names: Vec<_> = value(key).split(' ').map(str::to_owned).collect();
        names.sort();
        assert_eq!(names, ["CAP_BPF", "CAP_NET_ADMIN", "CAP_NET_BIND_SERVICE", "CAP_NET_RAW", "CAP_PERFMON"], "{key}");
    }
    assert_eq!((value("Type"), value("User")), ("notify".into(), "edge".into()));
    assert!(!text.lines().any(|line| line.starts_with("Before=")));
}

#[test]
fn the_sysctls_are_those_that_forwarding_needs() {
    let text = fs::read_to_string(deploy().join("sysctl.d/edge.conf")).unwrap();
    let lines: Vec<&str> = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).collect();
    let expected = [
        "net.ipv4.ip_forward = 1",
        "net.ipv4.conf.all.accept_local = 1",
        "net.ipv4.conf.all.rp_filter = 2",
        "net.ipv4.conf.default.rp_filter = 2",
    ];
    assert_eq!(lines, expected);
}
