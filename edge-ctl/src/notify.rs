//! What the service manager hears (sd_notify(3)): readiness, reloads, the watchdog, a status line. Without a manager
//! (`NOTIFY_SOCKET` unset) nothing is sent. A message that cannot be sent is logged and never stops the daemon.

use std::time::Duration;

use sd_notify::NotifyState;

/// Startup is finished: VIPs are served. `status` is what `systemctl status` shows.
pub fn ready(status: &str) {
    send(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// The configuration is being read again; [`ready`] must follow, whether it was accepted or not.
pub fn reloading() {
    match NotifyState::monotonic_usec_now() {
        // systemd 253 and later want the time with the message.
        Ok(now) => send(&[NotifyState::Reloading, now]),
        Err(error) => tracing::warn!(%error, "no time for the service manager"),
    }
}

/// The daemon is on its way out.
pub fn stopping() {
    send(&[NotifyState::Stopping]);
}

/// One line for `systemctl status`.
pub fn status(text: &str) {
    send(&[NotifyState::Status(text)]);
}

/// The daemon's loop still turns. To be sent from that loop itself, never from a timer of its own, which would go on
/// while the loop hangs.
pub fn alive() {
    send(&[NotifyState::Watchdog]);
}

/// How often [`alive`] must be called: half of what the manager allows. `None`: it does not watch.
pub fn watchdog_interval() -> Option<Duration> {
    sd_notify::watchdog_enabled().map(|limit| limit / 2)
}

fn send(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "the service manager cannot be told");
    }
}

#[cfg(test)]
mod tests {
    use std::{env, os::unix::net::UnixDatagram, process::Command, time::Duration};

    const CHILD: &str = "EDGE_NOTIFY_TEST_CHILD";

    /// Runs in a process of its own, because a test must not change its own environment.
    #[test]
    fn the_child_of_the_next_test() {
        if env::var_os(CHILD).is_none() {
            return;
        }
        assert_eq!(super::watchdog_interval(), Some(Duration::from_secs(5)));
        super::ready("serving 2 VIPs");
        super::alive();
        super::reloading();
        super::stopping();
    }

    #[test]
    fn the_service_manager_hears_readiness_watchdog_reload_and_stop() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        manager.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let status = Command::new(env::current_exe().unwrap())
            .args(["--exact", "notify::tests::the_child_of_the_next_test"])
            .env("NOTIFY_SOCKET", &path)
            .env("WATCHDOG_USEC", "10000000")
            .env_remove("WATCHDOG_PID")
            .env(CHILD, "1")
            .status()
            .unwrap();
        assert!(status.success());
        let next = || {
            let mut buffer = [0; 512];
            let length = manager.recv(&mut buffer).unwrap();
            String::from_utf8(buffer[..length].to_vec()).unwrap()
        };
        assert_eq!(next(), "READY=1\nSTATUS=serving 2 VIPs\n");
        assert_eq!(next(), "WATCHDOG=1\n");
        let reloading = next();
        assert!(reloading.starts_with("RELOADING=1\nMONOTONIC_USEC="), "{reloading}");
        assert_eq!(next(), "STOPPING=1\n");
    }
}
