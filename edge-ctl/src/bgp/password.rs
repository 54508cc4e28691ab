//! TCP MD5 passwords (RFC 2385): where they come from, and what the kernel says about those that do not match.

use std::{collections::BTreeMap, fmt, fs, path::PathBuf};

use super::socket::LONGEST_PASSWORD;
use crate::model::bgp_session::PasswordSource;

/// A password. It has no `Debug` that shows it.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Password(Vec<u8>);

impl Password {
    /// Its octets; none: no password.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Password(...)")
    }
}

/// Reads a password.
///
/// # Errors
/// Where it should come from and why it does not, without the password.
pub fn read(source: &PasswordSource) -> Result<Password, String> {
    let failed = |why: &dyn fmt::Display| format!("the TCP MD5 password cannot be read ({source}): {why}");
    let of_file = |path: PathBuf| fs::read(path).map_err(|error| failed(&error));
    let mut password = match source {
        PasswordSource::File(path) => of_file(path.clone())?,
        PasswordSource::Credential(name) => {
            let folder = std::env::var_os("CREDENTIALS_DIRECTORY");
            let why = "CREDENTIALS_DIRECTORY is not set; the unit needs LoadCredential=";
            of_file(PathBuf::from(folder.ok_or_else(|| failed(&why))?).join(name))?
        }
        PasswordSource::Environment(name) => {
            std::env::var_os(name).ok_or_else(|| failed(&"it is not set"))?.into_encoded_bytes()
        }
    };
    while password.last().is_some_and(|last| matches!(last, b'\n' | b'\r')) {
        password.pop();
    }
    match password.len() {
        0 => Err(failed(&"it is empty")),
        length if length > LONGEST_PASSWORD => {
            Err(failed(&format!("{length} octets; the kernel takes at most {LONGEST_PASSWORD}")))
        }
        _ => Ok(Password(password)),
    }
}

/// The kernel's counters of segments that were dropped for their signature, of the whole network namespace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Signed with another password (`TCPMD5Failure`).
    pub wrong: u64,
    /// Not signed, where we expect a signature (`TCPMD5NotFound`).
    pub missing: u64,
    /// Signed, where we have no password (`TCPMD5Unexpected`).
    pub unexpected: u64,
}

impl Counters {
    /// Now; zeros where the kernel does not say.
    pub fn now() -> Self {
        // The thread's namespace, which is the sockets' one, not the process's first.
        fs::read_to_string("/proc/thread-self/net/netstat").map(|text| Self::parse(&text)).unwrap_or_default()
    }

    fn parse(text: &str) -> Self {
        let mut values = BTreeMap::new();
        let mut lines = text.lines();
        while let (Some(names), Some(numbers)) = (lines.next(), lines.next()) {
            values.extend(names.split_whitespace().zip(numbers.split_whitespace()));
        }
        let value = |name: &str| values.get(name).and_then(|number| number.parse().ok()).unwrap_or(0);
        Self { wrong: value("TCPMD5Failure"), missing: value("TCPMD5NotFound"), unexpected: value("TCPMD5Unexpected") }
    }

    /// What has come since `before`, as a remark beside a connection that does not come up. `signed`: we have a password
    /// for the peer. The counters do not say whose segments they were.
    pub fn remark(self, before: Self, signed: bool) -> Option<String> {
        let since = |now: u64, then: u64| now.saturating_sub(then);
        let (wrong, missing) = (since(self.wrong, before.wrong), since(self.missing, before.missing));
        let unexpected = since(self.unexpected, before.unexpected);
        match (signed, wrong, missing, unexpected) {
            (true, 1.., ..) => Some(format!(
                "the TCP MD5 passwords differ: {wrong} segments with another signature were dropped (TCPMD5Failure)"
            )),
            (true, _, 1.., _) => Some(format!(
                "the peer does not sign: {missing} segments without a TCP MD5 signature were dropped (TCPMD5NotFound); \
                 it has no password for us"
            )),
            (false, _, _, 1..) => Some(format!(
                "the peer signs and we have no password for it: {unexpected} signed segments were dropped \
                 (TCPMD5Unexpected); set `password_file`"
            )),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_password_ends_before_its_newline_and_is_never_shown() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"secret word\n").unwrap();
        let source = PasswordSource::File(file.path().to_owned());
        let password = read(&source).unwrap();
        assert_eq!(password.bytes(), b"secret word");
        assert!(!format!("{password:?}").contains("secret"));
    }

    #[test]
    fn what_is_no_password_is_refused_by_its_place() {
        for (content, why) in [(&b"\n"[..], "empty"), (&[b'x'; 81], "at most 80")] {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(content).unwrap();
            let error = read(&PasswordSource::File(file.path().to_owned())).unwrap_err();
            assert!(error.contains(why) && error.contains(&file.path().display().to_string()), "{error}");
        }
        let error = read(&PasswordSource::Environment("EDGE_NO_SUCH_VARIABLE".to_owned())).unwrap_err();
        assert!(error.contains("EDGE_NO_SUCH_VARIABLE is not set") || error.contains("it is not set"), "{error}");
    }

    #[test]
    fn the_kernels_counters_tell_the_three_kinds_of_mismatch_apart() {
        let text = "TcpExt: SyncookiesSent TCPMD5NotFound TCPMD5Unexpected TCPMD5Failure\nTcpExt: 9 1 2 3\n\
                    IpExt: InNoRoutes\nIpExt: 0\n";
        let counters = Counters::parse(text);
        assert_eq!(counters, Counters { missing: 1, unexpected: 2, wrong: 3 });
        let none = Counters::default();
        assert!(counters.remark(none, true).unwrap().contains("passwords differ"));
        assert!(Counters { wrong: 0, ..counters }.remark(none, true).unwrap().contains("does not sign"));
        assert!(counters.remark(none, false).unwrap().contains("we have no password"));
        assert_eq!(counters.remark(counters, true), None);
    }
}
