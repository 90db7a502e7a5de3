//! How each way is gone: a target that waits, then the move itself.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use ferry_testbed::{End, Ferry, Link, Qemu, TestbedError, wait_until};
use serde_json::json;

use crate::cost::{Engine, Used};
use crate::guest::failed;
use crate::peer::{Compression, Peer};
use crate::watch::{LastPage, last_event_where, now_since_epoch};

/// How long one move may take.
const BOUND: Duration = Duration::from_secs(30);

/// What QEMU takes for an unlimited bandwidth: the largest that it accepts.
const UNLIMITED_BYTES_PER_S: i64 = i64::MAX;

/// Between two questions about whether a round is over: a guest that is to be handed over after it runs
/// on until that is known.
const ROUND_INTERVAL: Duration = Duration::from_millis(5);

/// Between two questions about QEMU's state: QEMU reads each question a byte at a time in the thread
/// that also serves the guest, and the figures come from the probe.
const QUESTION_INTERVAL: Duration = Duration::from_millis(100);

/// Where a side is in the network.
#[derive(Clone, Copy)]
pub enum Place<'a> {
    /// At an end of a link on this machine.
    Link(&'a Link, End),
    /// On this machine as it is.
    Host,
}

impl Place<'_> {
    /// Runs `work` there: processes and sockets made there belong to it.
    fn on<T: Send>(self, work: impl FnOnce() -> T + Send) -> Result<T, TestbedError> {
        match self {
            Self::Link(link, end) => link.on(end, work),
            Self::Host => Ok(work()),
        }
    }

    /// Starts a machine there.
    pub fn start(self, machine: &ferry_testbed::Machine) -> Result<Qemu, TestbedError> {
        self.on(|| machine.start())?
    }

    /// The address to listen on.
    fn listens(self) -> String {
        match self {
            Self::Link(link, end) => link.address(end).to_string(),
            // From which of its addresses the other host comes is its own matter.
            Self::Host => "0.0.0.0".into(),
        }
    }
}

/// A target that waits, however it does.
pub struct Waiting {
    /// Where, as the client wants it.
    pub uri: String,
    /// `ferry receive`, where it is Ferry that waits.
    pub receive: Option<Engine>,
}

/// Makes `target` wait for a guest: before the clock starts, for every way.
pub fn wait(peer: Peer, target: &Qemu, place: Place<'_>) -> Result<Waiting, TestbedError> {
    let address = place.listens();
    if peer.is_ferry() {
        let listen = format!("{address}:0");
        let args = ["--insecure", "--json", "--listen", &listen];
        let (receive, uri) = place.on(|| Ferry::receive(target, &args))??;
        let receive = Some(Engine::watch(receive));
        return Ok(Waiting { uri, receive });
    }
    prepare(peer, target)?;
    let listen = match peer {
        Peer::Switchover => unix_uri(target.folder()),
        _ => format!("tcp:{address}:0"),
    };
    target.execute("migrate-incoming", &json!({ "uri": listen }))?;
    let uri = if peer == Peer::Switchover {
        listen
    } else {
        wait_until("the target listens", BOUND, || {
            let migration = target.execute("query-migrate", &json!({})).ok()?;
            let port = migration["socket-address"][0]["port"].as_str()?.to_owned();
            Some(format!("tcp:{address}:{port}"))
        })?
    };
    Ok(Waiting { uri, receive: None })
}

/// The moment at which the client was started, by both clocks.
#[derive(Clone, Copy, Debug)]
pub struct Began {
    /// By the clock that never jumps.
    pub at: Instant,
    /// By the clock that QEMU's events have.
    since_epoch: Duration,
}

impl Began {
    fn now() -> Self {
        Self {
            at: Instant::now(),
            since_epoch: now_since_epoch(),
        }
    }

    /// By the wall clock.
    pub fn since_epoch(&self) -> Duration {
        self.since_epoch
    }
}

/// A source whose guest has gone.
pub struct Gone {
    /// When the client was started.
    pub began: Began,
    /// What Ferry's engine used.
    pub engine: Option<Used>,
    /// When QEMU told that all is there, since the epoch, where pages came after the guest.
    pub completed: Option<Duration>,
}

impl Gone {
    /// When the last page came that followed the guest: by QEMU's event, or by Ferry's account.
    pub fn last_page(&self) -> Option<LastPage> {
        if let Some(completed) = self.completed {
            let since_epoch = self.began.since_epoch();
            return Some(LastPage::SinceStart(completed.saturating_sub(since_epoch)));
        }
        let told = self.engine.as_ref()?.ended.json();
        let followed_ms = told["postcopy"]["last_page_ms"].as_f64()?;
        let followed = Duration::from_secs_f64(followed_ms.max(0.0) / 1e3);
        Some(LastPage::AfterGuest(followed))
    }
}

/// A source and where it goes.
#[derive(Clone, Copy)]
pub struct Departure<'a> {
    /// Where the guest is.
    pub source: &'a Qemu,
    /// Where that is.
    pub place: Place<'a>,
    /// The downtime limit.
    pub limit: Duration,
}

impl Departure<'_> {
    /// Puts the source's settings right: before the clock starts.
    pub fn prepare(&self, peer: Peer) -> Result<(), TestbedError> {
        if peer.is_ferry() {
            return Ok(());
        }
        prepare(peer, self.source)?;
        let limit_ms = u64::try_from(self.limit.as_millis()).unwrap_or(u64::MAX);
        let parameters = json!({
            "max-bandwidth": UNLIMITED_BYTES_PER_S,
            "downtime-limit": limit_ms,
        });
        let set = self.source.execute("migrate-set-parameters", &parameters);
        set.map(drop)
    }

    /// Moves the guest to `uri`, live.
    pub fn go(&self, peer: Peer, uri: &str) -> Result<Gone, TestbedError> {
        if peer.is_ferry() {
            self.go_by_ferry(peer, uri)
        } else {
            self.go_by_qemu(peer, uri)
        }
    }

    fn go_by_ferry(&self, peer: Peer, uri: &str) -> Result<Gone, TestbedError> {
        let limit_ms = self.limit.as_millis().to_string();
        // A QEMU that ends takes CPU time away from the guest; QEMU's own migration leaves its own.
        let mut args = vec!["--live", "--insecure", "--keep-source"];
        args.extend(["--max-downtime", &limit_ms]);
        let lanes = options(peer);
        args.extend(lanes.iter().map(String::as_str));
        let began = Began::now();
        let migrate = self
            .place
            .on(|| Ferry::migrate(self.source, uri, &args))??;
        let used = Engine::watch(migrate).finish(BOUND)?;
        if used.ended.code() != 0 {
            return Err(failed("ferry migrate", &used.ended.stderr));
        }
        Ok(Gone {
            began,
            engine: Some(used),
            completed: None,
        })
    }

    /// Has QEMU hand the guest over before its pages, as soon as it can, or after its first round.
    fn hand_over(&self, peer: Peer) -> Result<(), TestbedError> {
        let began = Instant::now();
        loop {
            let answer = self.source.execute("query-migrate", &json!({}))?;
            let rounds = answer["ram"]["dirty-sync-count"].as_u64().unwrap_or(0);
            if answer["status"] == "active" && (peer == Peer::Postcopy || rounds > 1) {
                break;
            }
            // It may be over before it could be handed over.
            if answer["status"] == "completed" {
                return Ok(());
            }
            if answer["status"] == "failed" || began.elapsed() > BOUND {
                return Err(failed("QEMU's post-copy", &answer.to_string()));
            }
            thread::sleep(ROUND_INTERVAL);
        }
        self.source
            .execute("migrate-start-postcopy", &json!({}))
            .map(drop)
    }

    fn go_by_qemu(&self, peer: Peer, uri: &str) -> Result<Gone, TestbedError> {
        self.source.take_events()?;
        let began = Began::now();
        let arguments = json!({ "uri": uri });
        self.source.execute("migrate", &arguments)?;
        if peer.is_qemu_postcopy() {
            self.hand_over(peer)?;
        }
        loop {
            let answer = self.source.execute("query-migrate", &json!({}))?;
            if answer["status"] == "completed" {
                let completed = peer.is_qemu_postcopy().then(|| completion(self.source));
                return Ok(Gone {
                    began,
                    engine: None,
                    completed: completed.transpose()?,
                });
            }
            if answer["status"] == "failed" || began.at.elapsed() > BOUND {
                let log = answer.to_string() + &self.source.log();
                return Err(failed("QEMU's migration", &log));
            }
            thread::sleep(QUESTION_INTERVAL);
        }
    }
}

/// When QEMU told that its migration was over.
fn completion(source: &Qemu) -> Result<Duration, TestbedError> {
    let is_end = |event: &serde_json::Value| {
        event["event"] == "MIGRATION" && event["data"]["status"] == "completed"
    };
    last_event_where(source, "MIGRATION completed", is_end)
}

/// The options of `ferry migrate` that ask for so many connections, with pages on them: within a host
/// none would carry any.
fn options(peer: Peer) -> Vec<String> {
    match peer {
        Peer::FerryPostcopy => vec!["--postcopy-now".into(), "--within-host=never".into()],
        Peer::FerryHybrid => vec![
            "--postcopy-after-precopy".into(),
            "--within-host=never".into(),
        ],
        Peer::FerryOver { lanes } => vec![
            "--parallel".into(),
            "--parallel-connections".into(),
            lanes.to_string(),
            "--within-host=never".into(),
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
        capability("postcopy-ram", peer.is_qemu_postcopy()),
        capability("postcopy-preempt", peer.is_qemu_postcopy()),
        capability("events", true),
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
