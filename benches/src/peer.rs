//! The ways to move a guest.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, Instant};

use ferry_testbed::{Ferry, Qemu, TestbedError, wait_until};
use serde_json::json;

/// How long one move may take.
const BOUND: Duration = Duration::from_secs(300);

/// What QEMU takes for an unlimited bandwidth: the largest that it accepts.
const UNLIMITED_BYTES_PER_S: i64 = i64::MAX;

/// A way to move a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Peer {
    /// Ours.
    Ferry,
    /// QEMU's precopy over one connection.
    QemuPrecopy,
    /// QEMU's precopy over several.
    QemuMultifd {
        /// How many.
        channels: u8,
    },
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ferry => f.write_str("ferry"),
            Self::QemuPrecopy => f.write_str("QEMU precopy"),
            Self::QemuMultifd { channels } => write!(f, "QEMU multifd {channels}"),
        }
    }
}

/// A text that names no way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownPeer;

impl fmt::Display for UnknownPeer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a way to move is ferry, precopy or multifd:CHANNELS")
    }
}

impl std::error::Error for UnknownPeer {}

impl FromStr for Peer {
    type Err = UnknownPeer;

    fn from_str(text: &str) -> Result<Self, UnknownPeer> {
        match text.split_once(':') {
            None if text == "ferry" => Ok(Self::Ferry),
            None if text == "precopy" => Ok(Self::QemuPrecopy),
            Some(("multifd", channels)) => {
                let channels = channels.parse().map_err(|_| UnknownPeer)?;
                Ok(Self::QemuMultifd { channels })
            }
            _ => Err(UnknownPeer),
        }
    }
}

/// A target that waits, however it does.
pub struct Waiting {
    uri: String,
    receive: Option<Ferry>,
}

impl Peer {
    /// Makes `target` wait for a guest.
    pub fn wait(self, source: &Qemu, target: &Qemu) -> Result<Waiting, TestbedError> {
        if self == Self::Ferry {
            let (receive, uri) = Ferry::receive(target, &[])?;
            return Ok(Waiting {
                uri,
                receive: Some(receive),
            });
        }
        for qemu in [source, target] {
            self.prepare(qemu)?;
        }
        target.execute("migrate-incoming", &json!({"uri": "tcp:127.0.0.1:0"}))?;
        let uri = wait_until("the target listens", BOUND, || {
            let migration = target.execute("query-migrate", &json!({})).ok()?;
            let port = migration["socket-address"][0]["port"].as_str()?.to_owned();
            Some(format!("tcp:127.0.0.1:{port}"))
        })?;
        Ok(Waiting { uri, receive: None })
    }

    fn prepare(self, qemu: &Qemu) -> Result<(), TestbedError> {
        let Self::QemuMultifd { channels } = self else {
            return Ok(());
        };
        let capabilities = json!({"capabilities": [{"capability": "multifd", "state": true}]});
        qemu.execute("migrate-set-capabilities", &capabilities)?;
        qemu.execute(
            "migrate-set-parameters",
            &json!({"multifd-channels": channels}),
        )?;
        Ok(())
    }

    /// Moves the guest of `source` there, live. Tells when the client was started.
    pub fn carry(
        self,
        source: &Qemu,
        target: &Qemu,
        waiting: Waiting,
        downtime_limit: Duration,
    ) -> Result<Instant, TestbedError> {
        let limit_ms = downtime_limit.as_millis();
        let Some(receive) = waiting.receive else {
            return carry_by_qemu(source, target, &waiting.uri, limit_ms);
        };
        let began = Instant::now();
        let limit_ms = limit_ms.to_string();
        let more = ["--live", "--max-downtime", &limit_ms];
        let moved = Ferry::migrate(source, &waiting.uri, &more)?.wait(BOUND)?;
        receive.wait(BOUND)?;
        if moved.code() == 0 {
            if std::env::var_os("FERRY_BENCH_TELL").is_some() {
                eprintln!("{}", moved.json());
            }
            return Ok(began);
        }
        Err(TestbedError::Program {
            program: "ferry migrate".into(),
            log: moved.stderr,
        })
    }
}

fn carry_by_qemu(
    source: &Qemu,
    target: &Qemu,
    uri: &str,
    limit_ms: u128,
) -> Result<Instant, TestbedError> {
    let parameters = json!({
        "max-bandwidth": UNLIMITED_BYTES_PER_S,
        "downtime-limit": u64::try_from(limit_ms).unwrap_or(u64::MAX),
    });
    source.execute("migrate-set-parameters", &parameters)?;
    let began = Instant::now();
    source.execute("migrate", &json!({"uri": uri}))?;
    target.wait_for_run_state("running", BOUND)?;
    Ok(began)
}
