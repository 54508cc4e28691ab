//! Running other programs.

use std::{
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
};

use anyhow::{Context, Result, bail};

/// The repository's root.
pub fn root() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest).to_owned()
}

/// Says which step is being done.
pub fn step(text: &str) {
    eprintln!("==> {text}");
}

/// The cargo that runs this task, in the repository's root.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

/// A command as root: itself where the user is root, else by sudo, keeping the variables the lab knows.
pub fn as_root(program: &Path) -> Command {
    if is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("sudo");
    command.arg("--preserve-env=EDGE_CTL,EDGE_LAB,EDGE_LAB_RUN,EDGE_TEST_FULL").arg("--").arg(program);
    command
}

/// True where this process runs as root.
pub fn is_root() -> bool {
    // The owner of /proc/self is the effective user.
    std::fs::metadata("/proc/self").is_ok_and(|found| std::os::unix::fs::MetadataExt::uid(&found) == 0)
}

/// Runs a command to its end at this terminal.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("start `{}`", show(command)))?;
    if !status.success() {
        bail!("`{}` failed: {status}", show(command));
    }
    Ok(())
}

/// Runs a command to its end and returns its output, also where it failed.
pub fn output(command: &mut Command) -> Result<std::process::Output> {
    command.stdin(Stdio::null()).output().with_context(|| format!("start `{}`", show(command)))
}

/// Runs a command at this terminal and takes over its exit code.
pub fn pass_through(command: &mut Command) -> Result<ExitCode> {
    let status = command.status().with_context(|| format!("start `{}`", show(command)))?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
}

/// The command as it would be typed.
pub fn show(command: &Command) -> String {
    let arguments = command.get_args().map(|argument| argument.to_string_lossy());
    std::iter::once(command.get_program().to_string_lossy()).chain(arguments).collect::<Vec<_>>().join(" ")
}
