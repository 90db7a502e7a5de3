//! Where a QMP server listens.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::error::Error;

/// Where a QMP server listens.
///
/// Written as QEMU writes it: `unix:/path` or `tcp:host:port`. A text with a slash and no prefix is
/// the path of a Unix socket. An IPv6 host stands in brackets: `tcp:[::1]:4444`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// A Unix stream socket.
    Unix(PathBuf),
    /// Host and port with a colon between; the host may be a name.
    Tcp(String),
}

impl FromStr for Address {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let bad = || Error::BadAddress {
            given: text.to_owned(),
        };
        if let Some(host_and_port) = text.strip_prefix("tcp:") {
            return if is_host_and_port(host_and_port) {
                Ok(Self::Tcp(host_and_port.to_owned()))
            } else {
                Err(bad())
            };
        }
        match text.strip_prefix("unix:") {
            Some("") => Err(bad()),
            Some(path) => Ok(Self::Unix(path.into())),
            None if text.contains('/') => Ok(Self::Unix(text.into())),
            None => Err(bad()),
        }
    }
}

fn is_host_and_port(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else {
        return false;
    };
    let bracketed = host.starts_with('[') && host.ends_with(']') && host.len() > 2;
    let plain = !host.is_empty() && !host.contains([':', '[', ']', '/']);
    (bracketed || plain) && port.parse::<u16>().is_ok_and(|port| port > 0)
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(host_and_port) => write!(f, "tcp:{host_and_port}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_qemu_writes() {
        let unix = Address::Unix("/run/qmp.sock".into());
        assert_eq!("unix:/run/qmp.sock".parse::<Address>().unwrap(), unix);
        assert_eq!("/run/qmp.sock".parse::<Address>().unwrap(), unix);
        let relative = "./qmp.sock".parse::<Address>().unwrap();
        assert_eq!(relative, Address::Unix("./qmp.sock".into()));
        for tcp in ["localhost:4444", "127.0.0.1:1", "[::1]:65535"] {
            let address = format!("tcp:{tcp}").parse::<Address>().unwrap();
            assert_eq!(address, Address::Tcp(tcp.into()));
        }
    }

    #[test]
    fn shows_what_it_reads() {
        for text in ["unix:/run/qmp.sock", "unix:qmp", "tcp:[::1]:4444"] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn refuses_everything_else() {
        for text in [
            "",
            "qmp.sock",
            "unix:",
            "tcp:",
            "tcp:host",
            "tcp::1",
            "tcp:host:",
            "tcp:host:0",
            "tcp:host:65536",
            "tcp:::1:4444",
            "tcp:[]:1",
        ] {
            let refused = text.parse::<Address>();
            assert!(
                matches!(&refused, Err(Error::BadAddress { given }) if given == text),
                "{text:?} gave {refused:?}"
            );
        }
    }
}
