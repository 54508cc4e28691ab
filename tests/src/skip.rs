//! Telling that a test cannot run here, and how much of it runs.

use std::io::Write;

/// Prints `SKIPPED name: reason`, past libtest's capture of output, so that `cargo xtask test` counts it.
pub fn skipped(name: &str, reason: &str) {
    // A closed stderr leaves nobody to tell.
    let _ = writeln!(std::io::stderr().lock(), "SKIPPED {name}: {reason}");
}

/// True where the full counts were asked for (`cargo xtask test --full`).
pub fn full() -> bool {
    std::env::var_os("EDGE_TEST_FULL").is_some_and(|value| value == "1")
}

/// The count a scenario uses, printed past libtest's capture: `reduced` normally, `complete` with `--full`.
pub fn count(what: &str, reduced: usize, complete: usize) -> usize {
    let (count, kind) = if full() { (complete, "full") } else { (reduced, "reduced") };
    let _ = writeln!(std::io::stderr().lock(), "{what}: {count} ({kind}; {reduced} reduced, {complete} full)");
    count
}

/// Why a test that needs namespaces cannot run here, if it cannot.
pub fn namespaces_missing() -> Option<&'static str> {
    crate::lab::netns::effective_user_is_root().then_some(()).map_or(Some("network namespaces need root"), |()| None)
}
