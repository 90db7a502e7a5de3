//! How each way is gone: a target that waits, then the move itself.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use ferry_testbed::{End, Ferry, Link, Qemu, TestbedError, wait_until};
use serde_json::{Value, json};

use crate::cost::{Engine, Used};
use crate::peer::{Compression, Peer};

/// How long one move may take.
const BOUND: Duration = Duration::from_secs(300);

/// What QEMU takes for an unlimited bandwidth: the largest that it accepts.
const UNLIMITED_BYTES_PER_S: i64 = i64::MAX;

/// Between two questions about QEMU's state: QEMU reads each question a byte at a time in the thread
/// that also loads the guest, and the figures come from the probe.
const QUESTION_INTERVAL: Duration = Duration::from_millis(100);

/// Two QEMUs and what lies between them.
#[derive(Clone, Copy)]
pub struct Road<'a> {
    /// Where the guest is.
    pub source: &'a Qemu,
    /// Where it goes.
    pub target: &'a Qemu,
    /// What is between.
    pub link: &'a Link,
    /// At which of its ends the source is.
    pub end: End,
    /// The downtime limit.
    pub limit: Duration,
}

/// A target that waits, however it does.
pub enum Waiting {
    /// QEMU itself, there.
    Qemu {
        /// Its address as QEMU writes it.
        uri: String,
    },
    /// `ferry receive`.
    Ferry {
        /// Its address.
        uri: String,
        /// The command.
        receive: Engine,
    },
}

/// A move that is over.
pub struct Gone {
    /// When the client was started.
    pub began: Instant,
    /// What Ferry's engines used, source and target.
    pub engines: Option<[Used; 2]>,
}

impl Road<'_> {
    /// Makes the target wait for a guest: before the clock starts, for every way.
    pub fn wait(&self, peer: Peer) -> Result<Waiting, TestbedError> {
        let address = self.link.address(self.end.other());
        if peer.is_ferry() {
            let listen = format!("{address}:0");
            let args = ["--insecure", "--listen", &listen];
            let receive = || Ferry::receive(self.target, &args);
            let (receive, uri) = self.link.on(self.end.other(), receive)??;
            let receive = Engine::watch(receive);
            return Ok(Waiting::Ferry { uri, receive });
        }
        for qemu in [self.source, self.target] {
            prepare(peer, qemu)?;
        }
        if peer == Peer::Switchover {
            let uri = unix_uri(self.target.folder());
            self.incoming(&uri)?;
            return Ok(Waiting::Qemu { uri });
        }
        self.incoming(&format!("tcp:{address}:0"))?;
        let uri = wait_until("the target listens", BOUND, || {
            let migration = self.target.execute("query-migrate", &json!({})).ok()?;
            let port = migration["socket-address"][0]["port"].as_str()?.to_owned();
            Some(format!("tcp:{address}:{port}"))
        })?;
        Ok(Waiting::Qemu { uri })
    }

    fn incoming(&self, uri: &str) -> Result<Value, TestbedError> {
        let arguments = json!({ "uri": uri });
        self.target.execute("migrate-incoming", &arguments)
    }

    /// Moves the guest, live.
    pub fn go(&self, peer: Peer, waiting: Waiting) -> Result<Gone, TestbedError> {
        match waiting {
            Waiting::Qemu { uri } => self.go_by_qemu(&uri),
            Waiting::Ferry { uri, receive } => self.go_by_ferry(peer, &uri, receive),
        }
    }

    fn go_by_ferry(&self, peer: Peer, uri: &str, receive: Engine) -> Result<Gone, TestbedError> {
        let limit_ms = self.limit.as_millis().to_string();
        // A QEMU that ends takes CPU time away from the guest; QEMU's own migration leaves its own.
        let mut args = vec!["--live", "--insecure", "--keep-source"];
        args.extend(["--max-downtime", &limit_ms]);
        let lanes = lanes(peer);
        args.extend(lanes.iter().map(String::as_str));
        let began = Instant::now();
        let migrate = || Ferry::migrate(self.source, uri, &args);
        let migrate = Engine::watch(self.link.on(self.end, migrate)??);
        let source = migrate.finish(BOUND)?;
        let target = receive.finish(BOUND)?;
        if source.ended.code() == 0 {
            return Ok(Gone {
                began,
                engines: Some([source, target]),
            });
        }
        Err(TestbedError::Program {
            program: "ferry migrate".into(),
            log: source.ended.stderr + &target.ended.stderr,
        })
    }

    fn go_by_qemu(&self, uri: &str) -> Result<Gone, TestbedError> {
        let limit_ms = u64::try_from(self.limit.as_millis()).unwrap_or(u64::MAX);
        let parameters = json!({
            "max-bandwidth": UNLIMITED_BYTES_PER_S,
            "downtime-limit": limit_ms,
        });
        self.source.execute("migrate-set-parameters", &parameters)?;
        let began = Instant::now();
        let arguments = json!({ "uri": uri });
        self.source.execute("migrate", &arguments)?;
        while self.target.run_state()? != "running" {
            let answer = self.source.execute("query-migrate", &json!({}))?;
            if answer["status"] == "failed" || began.elapsed() > BOUND {
                return Err(TestbedError::Program {
                    program: "QEMU's migration".into(),
                    log: answer.to_string() + &self.source.log() + &self.target.log(),
                });
            }
            thread::sleep(QUESTION_INTERVAL);
        }
        Ok(Gone {
            began,
            engines: None,
        })
    }
}

/// The options of `ferry migrate` that ask for so many connections.
fn lanes(peer: Peer) -> Vec<String> {
    match peer {
        Peer::FerryOver { lanes } => vec![
            "--parallel".into(),
            "--parallel-connections".into(),
            lanes.to_string(),
        ],
        _ => Vec::new(),
    }
}

/// Puts QEMU's migration settings to what `peer` needs, whatever an earlier way has left.
fn prepare(peer: Peer, qemu: &Qemu) -> Result<(), TestbedError> {
    let is_multifd = matches!(peer, Peer::Multifd { .. });
    let capability = |name, state| json!({"capability": name, "state": state});
    let capabilities = [
        capability("multifd", is_multifd),
        capability("x-ignore-shared", peer == Peer::Switchover),
    ];
    let capabilities = json!({ "capabilities": capabilities });
    qemu.execute("migrate-set-capabilities", &capabilities)?;
    if let Peer::Multifd {
        channels,
        compression,
    } = peer
    {
        let compression = match compression {
            Compression::None => "none",
            Compression::Zstd => "zstd",
        };
        let parameters = json!({
            "multifd-channels": channels,
            "multifd-compression": compression,
        });
        qemu.execute("migrate-set-parameters", &parameters)?;
    }
    Ok(())
}

fn unix_uri(folder: &Path) -> String {
    format!("unix:{}/switchover", folder.display())
}
