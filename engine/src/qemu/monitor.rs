//! The QMP connection as the adapter uses it: commands with errors that say what was being done, and
//! one task that reads every event.
//!
//! That task does two things with an event. It keeps what a wait needs to know in [`Seen`], a small
//! value that is always whole, so that no queue can grow and no wake-up be missed. And it tells the
//! engine what happened to the guest without its doing.
//!
//! QEMU does not say who gave a `stop` or `cont`. So our own are announced before they are sent
//! ([`Monitor::expect`]), and an event that nobody announced is foreign. QEMU tells the event before
//! it answers the command, but the two come to us by different ways: [`Monitor::catch_up`] waits
//! until every event has been looked at that came before an answer. QEMU refuses `cont` while it
//! switches over; what remains is a foreign `stop` in the very moment of ours, taken for ours.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ferry_qmp::{
    Client, Command, Event, EventKind, Events, IoErrorAction, MigrationStatus, PanicAction,
};
use serde_json::json;
use tokio::sync::{mpsc, oneshot, watch};

use super::limits;
use crate::vmm::{EventSink, GuestEvent, VmmError};

/// What the events have told so far.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen {
    /// Whether the vCPUs run; unknown before the first event that tells.
    pub(super) running: Option<bool>,
    /// When the last `STOP` arrived.
    pub(super) stopped_at: Option<Instant>,
    /// When QEMU's own migration last changed its state.
    pub(super) migration_at: Option<Instant>,
    /// The state of QEMU's own migration, once an event has told it.
    pub(super) migration: Option<MigrationStatus>,
    /// The guest put itself to sleep (S3).
    pub(super) asleep: bool,
    /// How the connection ended.
    pub(super) gone: Option<String>,
}

/// An event that needs no answer, because its cause is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Own {
    /// `STOP`, by our `stop` or `migrate`.
    Stop,
    /// `STOP`, by QEMU itself, which has told why: an I/O error, a panic, a shutdown.
    ExplainedStop,
    /// `RESUME`, by our `cont` or the end of our `migrate`.
    Resume,
    /// `SHUTDOWN` and the end of the connection, by our `quit`.
    End,
}

struct Shared {
    seen: watch::Sender<Seen>,
    expected: Mutex<HashSet<Own>>,
    sink: Mutex<Option<EventSink>>,
}

/// One QMP connection.
pub(super) struct Monitor {
    client: Client,
    shared: Arc<Shared>,
    marks: mpsc::UnboundedSender<Mark>,
}

/// Answered when no event waits to be looked at.
struct Mark(oneshot::Sender<()>);

impl Monitor {
    /// Takes over a connection. The task that reads its events ends with the connection.
    pub(super) fn new(client: Client, events: Events) -> Self {
        let shared = Arc::new(Shared {
            seen: watch::Sender::new(Seen::default()),
            expected: Mutex::default(),
            sink: Mutex::default(),
        });
        let (marks, marked) = mpsc::unbounded_channel();
        tokio::spawn(read_events(events, marked, Arc::clone(&shared)));
        Self {
            client,
            shared,
            marks,
        }
    }

    /// Runs a command. `limit` bounds the wait for its answer.
    pub(super) async fn run<C: Command>(
        &self,
        command: C,
        limit: Duration,
    ) -> Result<C::Reply, VmmError> {
        let answer = self.client.execute_within(command, limit).await;
        answer.map_err(|error| failure(C::NAME, error))
    }

    /// Runs a command that QEMU answers at once.
    pub(super) async fn ask<C: Command>(&self, command: C) -> Result<C::Reply, VmmError> {
        self.run(command, limits::COMMAND).await
    }

    /// Runs a command of the human monitor, and gives its text.
    pub(super) async fn human(&self, line: &str) -> Result<String, VmmError> {
        const COMMAND: &str = "human-monitor-command";
        let arguments = json!({ "command-line": line });
        let answer = self
            .client
            .execute_raw_within(COMMAND, arguments, limits::COMMAND);
        let text = answer.await.map_err(|error| failure(COMMAND, error))?;
        Ok(text.as_str().unwrap_or_default().to_owned())
    }

    /// What the events have told so far.
    pub(super) fn seen(&self) -> Seen {
        self.shared.seen.borrow().clone()
    }

    /// Forgets the state of an earlier migration, whoever started it.
    pub(super) fn forget_migration(&self) {
        self.shared.seen.send_modify(|seen| seen.migration = None);
    }

    /// Waits until `done` has an answer. Ends at once when QEMU is gone.
    pub(super) async fn wait<T>(
        &self,
        what: &str,
        limit: Duration,
        mut done: impl FnMut(&Seen) -> Option<T>,
    ) -> Result<T, VmmError> {
        let mut seen = self.shared.seen.subscribe();
        let answer = async {
            loop {
                {
                    let now = seen.borrow_and_update();
                    if let Some(answer) = done(&now) {
                        return Ok(answer);
                    }
                    if let Some(what) = &now.gone {
                        return Err(VmmError::Gone { what: what.clone() });
                    }
                }
                // The sender lives in `self`, so this cannot fail.
                let _ = seen.changed().await;
            }
        };
        match tokio::time::timeout(limit, answer).await {
            Ok(result) => result,
            Err(_) => Err(VmmError::TimedOut {
                what: what.to_owned(),
                limit_ms: millis(limit),
            }),
        }
    }

    /// Announces an event of our own doing. It counts for one event, or until it is taken back.
    pub(super) fn expect(&self, own: Own) {
        lock(&self.shared.expected).insert(own);
    }

    /// Takes an announcement back: after [`Monitor::catch_up`] the event can no longer come.
    pub(super) fn expect_no_more(&self, own: Own) {
        lock(&self.shared.expected).remove(&own);
    }

    /// Waits until every event has been looked at that came before the last answer.
    pub(super) async fn catch_up(&self) {
        let (mark, reached) = oneshot::channel();
        // Both fail when the connection has ended: then all events were looked at.
        let _ = self.marks.send(Mark(mark));
        let _ = reached.await;
    }

    /// From now on tells `sink` what happens to the guest.
    pub(super) fn watch(&self, sink: EventSink) {
        *lock(&self.shared.sink) = Some(sink);
        if let Some(what) = self.seen().gone {
            self.shared.tell(GuestEvent::Gone { what });
        }
    }
}

impl Shared {
    /// Whether an event of this kind was announced. The announcement is used up.
    fn announced(&self, own: Own) -> bool {
        lock(&self.expected).remove(&own)
    }

    fn tell(&self, event: GuestEvent) {
        tracing::debug!(?event, "guest event");
        let sink = lock(&self.sink).clone();
        if let Some(sink) = sink {
            sink(event);
        }
    }

    /// Keeps what the event tells, and says what it means to the engine.
    fn take(&self, event: &Event) -> Option<GuestEvent> {
        match event.kind() {
            EventKind::Stop => self.take_stop(event.received_at),
            EventKind::Resume => self.take_resume(),
            EventKind::Migration { status } => {
                self.seen.send_modify(|seen| {
                    seen.migration = Some(status);
                    seen.migration_at = Some(event.received_at);
                });
                None
            }
            EventKind::Reset { .. } => Some(GuestEvent::Reset),
            EventKind::Shutdown { .. } => {
                self.explain_stop();
                (!self.ends_by_us()).then_some(GuestEvent::ShutDown)
            }
            EventKind::GuestPanicked { action } if action != PanicAction::Run => {
                self.explain_stop();
                Some(GuestEvent::Panicked)
            }
            EventKind::BlockIoError {
                device,
                node_name,
                action: IoErrorAction::Stop,
                ..
            } => {
                self.explain_stop();
                let device = if device.is_empty() { node_name } else { device };
                Some(GuestEvent::IoErrorPause { device })
            }
            _ => {
                self.take_sleep(event);
                None
            }
        }
    }

    fn take_stop(&self, at: Instant) -> Option<GuestEvent> {
        self.seen.send_modify(|seen| {
            seen.running = Some(false);
            seen.stopped_at = Some(at);
        });
        let known = [Own::Stop, Own::ExplainedStop].map(|own| self.announced(own));
        (!known.contains(&true)).then_some(GuestEvent::ForeignPause)
    }

    fn take_resume(&self) -> Option<GuestEvent> {
        self.seen.send_modify(|seen| {
            seen.running = Some(true);
            seen.stopped_at = None;
        });
        self.announced(Own::ExplainedStop);
        (!self.announced(Own::Resume)).then_some(GuestEvent::ForeignResume)
    }

    fn take_sleep(&self, event: &Event) {
        let asleep = match event.name.as_str() {
            "SUSPEND" | "SUSPEND_DISK" => true,
            "WAKEUP" => false,
            _ => return,
        };
        self.seen.send_modify(|seen| seen.asleep = asleep);
    }

    fn ends_by_us(&self) -> bool {
        lock(&self.expected).contains(&Own::End)
    }

    /// The next `STOP` is QEMU's own. A guest that stands still already gets none: an explanation
    /// kept for later would hide a foreign one.
    fn explain_stop(&self) {
        if self.seen.borrow().running != Some(false) {
            lock(&self.expected).insert(Own::ExplainedStop);
        }
    }
}

fn failure(command: &'static str, error: ferry_qmp::Error) -> VmmError {
    use ferry_qmp::Error;
    match error {
        Error::TimedOut { after, .. } => VmmError::TimedOut {
            what: format!("QEMU's answer to {command}"),
            limit_ms: millis(after),
        },
        Error::Class { .. }
        | Error::Reply { .. }
        | Error::Arguments { .. }
        | Error::Busy { .. } => VmmError::failed("QEMU did not do what it was asked", error),
        over => VmmError::Gone {
            what: over.to_string(),
        },
    }
}

async fn read_events(
    mut events: Events,
    mut marks: mpsc::UnboundedReceiver<Mark>,
    shared: Arc<Shared>,
) {
    loop {
        let event = tokio::select! {
            // A mark is reached when no event is waiting.
            biased;
            event = events.next() => event,
            Some(Mark(mark)) = marks.recv() => {
                // Whoever set it may have given up.
                let _ = mark.send(());
                continue;
            }
        };
        let Some(event) = event else {
            break;
        };
        tracing::trace!(name = event.name, data = %event.data, "QMP event");
        if let Some(event) = shared.take(&event) {
            shared.tell(event);
        }
    }
    let what = "its QMP connection has ended".to_owned();
    shared
        .seen
        .send_modify(|seen| seen.gone = Some(what.clone()));
    if !shared.ends_by_us() {
        shared.tell(GuestEvent::Gone { what });
    }
}

/// A panic in a caller's sink must not take the others with it: the data is whole between calls.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn millis(limit: Duration) -> u64 {
    u64::try_from(limit.as_millis()).unwrap_or(u64::MAX)
}
