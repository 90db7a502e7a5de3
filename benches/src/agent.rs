//! The target's host, where that is another: a process there that obeys lines on its standard input.
//!
//! It starts the target's QEMU and whatever waits, watches the guest's arrival with a probe of its own
//! and by its own clock, and ends, with all that it has started, when its input ends: with the
//! connection.

use std::io::{BufRead as _, Write as _};
use std::time::{Duration, Instant};

use ferry_testbed::{Populate, Probe, Qemu, StatusPage, TestbedError};
use serde::{Deserialize, Serialize};

use crate::cost::{Account, Cpu};
use crate::guest::{BOUND, Guest, failed};
use crate::host::Host;
use crate::peer::Peer;
use crate::watch::{last_event, now_since_epoch};
use crate::way::{Place, Waiting, wait};

/// What is asked of it, one line each.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// What time it is there.
    Clock,
    /// Start a target for this guest, to be reached this way.
    Start {
        /// The guest.
        guest: Box<Guest>,
        /// The way.
        peer: Peer,
    },
    /// Watch for the guest's arrival; its status page is at this offset of its RAM, if it has one.
    Watch {
        /// The offset.
        page: Option<u64>,
    },
    /// Wait until it is there and at work, tell all, and end the target.
    Finish,
}

/// What it answers, one line each.
#[derive(Debug, Serialize, Deserialize)]
pub enum Reply {
    /// It is there. The first line.
    Ready(Box<Host>),
    /// The time.
    Clock(Clocks),
    /// The target waits, at this address as it sees itself.
    Waiting {
        /// The address.
        uri: String,
    },
    /// It watches.
    Watching,
    /// The guest is there.
    Finished(Arrival),
    /// It could not be done.
    Failed(String),
}

/// Two clocks at one moment.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Clocks {
    /// Since the process began, by the clock that never jumps.
    pub steady: Duration,
    /// By the wall clock that QEMU's events have.
    pub since_epoch: Duration,
}

/// What was seen of an arrival.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Arrival {
    /// Every change of the guest's counter, by the steady clock.
    pub progress: Vec<(Duration, u64)>,
    /// QEMU's word that the guest runs, by the wall clock.
    pub resumed: Duration,
    /// CPU time used here.
    pub cpu: Cpu,
    /// Ferry's peak memory here, in KiB.
    pub peak_kib: Option<u64>,
    /// What the guest has found bad.
    pub bad: u64,
}

/// Serves the requests on standard input until it ends.
pub fn serve() -> Result<(), TestbedError> {
    let mut agent = Agent {
        epoch: Instant::now(),
        target: None,
    };
    tell(&Reply::Ready(Box::new(Host::here()?)))?;
    for line in std::io::stdin().lock().lines() {
        let line = line.map_err(TestbedError::io("read a request"))?;
        let reply = match serde_json::from_str(&line) {
            Ok(request) => agent.obey(request),
            Err(error) => Err(failed("the request", &error.to_string())),
        };
        let reply = reply.unwrap_or_else(|error| {
            agent.target = None;
            Reply::Failed(error.to_string())
        });
        tell(&reply)?;
    }
    Ok(())
}

fn tell(reply: &Reply) -> Result<(), TestbedError> {
    let error = || TestbedError::io("tell a reply");
    let text = serde_json::to_string(reply).map_err(|wrong| error()(wrong.into()))?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "{text}")
        .and_then(|()| out.flush())
        .map_err(error())
}

struct Agent {
    epoch: Instant,
    target: Option<Target>,
}

struct Target {
    guest: Guest,
    waiting: Waiting,
    watch: Option<Watch>,
    // Last: the engine that holds it goes before.
    qemu: Qemu,
}

struct Watch {
    page: Option<StatusPage>,
    probe: Option<Probe>,
    account: Account,
}

impl Agent {
    fn obey(&mut self, request: Request) -> Result<Reply, TestbedError> {
        match request {
            Request::Clock => Ok(Reply::Clock(Clocks {
                steady: self.epoch.elapsed(),
                since_epoch: now_since_epoch(),
            })),
            Request::Start { guest, peer } => {
                // One target at a time: their memory may not fit twice.
                self.target = None;
                let target = Target::start(*guest, peer)?;
                let uri = target.waiting.uri.clone();
                self.target = Some(target);
                Ok(Reply::Waiting { uri })
            }
            Request::Watch { page } => {
                let target = self.target.as_mut().ok_or_else(no_target)?;
                target.watch(page)?;
                Ok(Reply::Watching)
            }
            Request::Finish => {
                let target = self.target.take().ok_or_else(no_target)?;
                target.finish(self.epoch).map(Reply::Finished)
            }
        }
    }
}

fn no_target() -> TestbedError {
    failed("the request", "no target was started")
}

impl Target {
    fn start(guest: Guest, peer: Peer) -> Result<Self, TestbedError> {
        let populate = if guest.conditions.preallocated {
            Populate::AtStart
        } else {
            Populate::OnDemand
        };
        let machine = guest.machine(None)?.incoming().populate(populate);
        let qemu = Place::Host.start(&machine)?;
        let waiting = wait(peer, &qemu, Place::Host)?;
        guest.check_untouched(&qemu)?;
        Ok(Self {
            guest,
            waiting,
            watch: None,
            qemu,
        })
    }

    fn watch(&mut self, page: Option<u64>) -> Result<(), TestbedError> {
        let page = page.map(|offset| self.qemu.ram().status_at(offset));
        let probe = page.clone().map(|page| Probe::start(page, None));
        self.qemu.take_events()?;
        self.watch = Some(Watch {
            page,
            probe,
            account: Account::of(&self.qemu)?,
        });
        Ok(())
    }

    fn finish(self, epoch: Instant) -> Result<Arrival, TestbedError> {
        let Watch {
            page,
            probe,
            account,
        } = self.watch.ok_or_else(no_target)?;
        let receive = self
            .waiting
            .receive
            .map(|it| it.finish(BOUND))
            .transpose()?;
        self.guest.wait_for_arrival(&self.qemu, page.as_ref())?;
        let engine = receive.as_ref().map_or(Duration::ZERO, |used| used.cpu);
        let cpu = account.until(&Account::of(&self.qemu)?, engine);
        let progress = match probe {
            None => Vec::new(),
            Some(probe) => {
                let seen = probe.finish()?;
                changes(
                    seen.started.saturating_duration_since(epoch),
                    &seen.progress,
                )
            }
        };
        let resumed = last_event(&self.qemu, "RESUME")?;
        let bad = match &page {
            None => 0,
            Some(page) => self.guest.verify(&self.qemu, page)?,
        };
        Ok(Arrival {
            progress,
            resumed,
            cpu,
            peak_kib: receive.map(|used| used.peak_kib),
            bad,
        })
    }
}

/// The looks at which the counter had changed: nearly all of a move passes before the first.
fn changes(started: Duration, progress: &[(Duration, u64)]) -> Vec<(Duration, u64)> {
    let mut last = None;
    let mut changes = Vec::new();
    for &(at, steps) in progress {
        if last.replace(steps) != Some(steps) {
            changes.push((started + at, steps));
        }
    }
    changes
}
