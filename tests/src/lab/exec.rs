//! Running commands with errors that say what was run and what it answered, and waiting for conditions.

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

/// Runs a command to its end and returns its standard output.
///
/// # Errors
/// Where it cannot be started or does not exit with 0; the message holds what it printed to standard error.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("start {}", show(command)))?;
    finished(command, &output)
}

/// Runs a command to its end with `input` on its standard input.
///
/// # Errors
/// As [`run`].
pub fn run_with_input(command: &mut Command, input: &str) -> Result<String> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {}", show(command)))?;
    if let Some(mut pipe) = child.stdin.take() {
        pipe.write_all(input.as_bytes()).with_context(|| format!("write to {}", show(command)))?;
    }
    let output = child.wait_with_output().with_context(|| format!("wait for {}", show(command)))?;
    finished(command, &output)
}

fn finished(command: &Command, output: &Output) -> Result<String> {
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("`{}` failed ({}): {}", show(command), output.status, said.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The command as a user would type it.
pub fn show(command: &Command) -> String {
    let arguments = command.get_args().map(|argument| argument.to_string_lossy());
    std::iter::once(command.get_program().to_string_lossy()).chain(arguments).collect::<Vec<_>>().join(" ")
}

/// Runs `ip -batch` in a namespace with these lines (in the default namespace for `None`).
///
/// # Errors
/// Where a line is refused: the message names it.
pub fn ip_batch(namespace: Option<&str>, lines: &[String]) -> Result<()> {
    let mut command = Command::new("ip");
    if let Some(name) = namespace {
        command.args(["-n", name]);
    }
    command.args(["-batch", "-"]);
    run_with_input(&mut command, &(lines.join("\n") + "\n"))
        .with_context(|| format!("in namespace {}:\n{}", namespace.unwrap_or("(default)"), lines.join("\n")))?;
    Ok(())
}

/// Asks `condition` every 10 ms until it holds.
///
/// # Errors
/// When `limit` is over: the message names `what` and the last thing the condition said.
pub fn wait_for(what: &str, limit: Duration, mut condition: impl FnMut() -> Result<bool>) -> Result<Duration> {
    let start = Instant::now();
    loop {
        let asked = Instant::now();
        let last = match condition() {
            Ok(true) => return Ok(start.elapsed()),
            Ok(false) => "the condition is false".to_owned(),
            Err(error) => format!("{error:#}"),
        };
        if start.elapsed() > limit {
            bail!("waited {} s for {what}: {last}", limit.as_secs_f64());
        }
        // Asking takes half of a core at most: what is waited for may want the other half.
        thread::sleep(asked.elapsed().clamp(Duration::from_millis(10), Duration::from_millis(50)));
    }
}

/// A program of this workspace: by its environment variable (`EDGE_CTL`, `EDGE_LAB`), else beside the running
/// executable (`target/PROFILE/`, or its `deps` folder for tests).
///
/// # Errors
/// Where it was not built.
pub fn product(name: &str, variable: &str) -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(variable) {
        return Ok(PathBuf::from(path));
    }
    let me = std::env::current_exe().context("find the running executable")?;
    let folders = [me.parent(), me.parent().and_then(Path::parent)];
    folders.into_iter().flatten().map(|folder| folder.join(name)).find(|path| path.is_file()).with_context(|| {
        format!("{name} is not built beside {}: run `cargo build --workspace`, or set {variable}", me.display())
    })
}

/// Where a server program is, in the folders Debian uses.
///
/// # Errors
/// Where it is not installed; the message names the package.
pub fn program(name: &str, package: &str) -> Result<PathBuf> {
    // FRR's folder first: OpenBGPD has a bgpd too.
    ["/usr/lib/frr", "/usr/sbin", "/usr/bin", "/sbin", "/bin"]
        .iter()
        .map(|folder| Path::new(folder).join(name))
        .find(|path| path.exists())
        .with_context(|| format!("{name} is not installed: `cargo xtask setup` installs the Debian package {package}"))
}
