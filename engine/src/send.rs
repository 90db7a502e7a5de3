//! The source's driver: waits for one thing, feeds the core, carries out its orders.
//!
//! Whatever blocks runs on a thread of its own (see [`crate::worker`]): the VM's calls, the tracker,
//! the flusher, the journal, each page lane. So this loop never waits for anything but facts.

mod fetch;
mod lanes;
mod scan;
mod vm;

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ferry_stream::lane::ControlLane;
use ferry_stream::link::Connector;
use ferry_stream::message::{Features, Message, SessionId};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Interval, MissedTickBehavior, interval, sleep_until, timeout};

use crate::control::{BoxedConnection, Control, Silence};
use crate::core::encoding::Compression;
use crate::core::message::{
    Action, Command, Deltas, GuestLeft, Input, Moment, Notice, Outcome, Pages, Record, Step,
};
use crate::core::meter::{Progress, Report};
use crate::core::outcome::in_full;
use crate::core::source::Source;
use crate::device_state::SinkWatch;
use crate::dial::inquire;
use crate::job::{Finished, Retire};
use crate::journal::{Journal, JournalError};
use crate::lanes::encode::Encoder;
use crate::lanes::feed::Feed;
use crate::lanes::send::{Counters, Outfit, RoundOrder, Senders, chunk_pages};
use crate::near::lender::Lender;
use crate::pacer::Pacer;
use crate::postcopy::server::Server;
use crate::vmm::{DeviceState, Guest, Ram, Tracker, VmmError};
use crate::worker::{Clock, Facts, Worker};

/// How often progress is looked at.
const TICK: Duration = Duration::from_millis(100);

/// How long a connection may take to be opened and greeted.
pub(crate) const GREETING_LIMIT: Duration = Duration::from_secs(10);

/// How long the last message may take to leave.
pub(crate) const PARTING: Duration = Duration::from_secs(2);

/// A guest and its device state, as the VM thread owns them.
pub(crate) struct VmSide {
    pub(crate) guest: Box<dyn Guest>,
    pub(crate) state: Box<dyn DeviceState>,
}

/// The tracker thread's belongings.
struct TrackSide {
    tracker: Box<dyn Tracker>,
    ram: Arc<dyn Ram>,
}

pub(crate) use fetch::keep;

pub(crate) type Flush = Box<dyn FnMut() -> Result<(), VmmError> + Send>;

/// What the driver is made of.
pub(crate) struct Parts {
    pub(crate) machine: Source,
    pub(crate) session: SessionId,
    pub(crate) vm: VmSide,
    pub(crate) flush: Flush,
    pub(crate) tracker: Box<dyn Tracker>,
    pub(crate) ram: Arc<dyn Ram>,
    pub(crate) connector: Arc<dyn Connector>,
    pub(crate) lender: Option<Lender>,
    pub(crate) journal: Journal,
    pub(crate) pacer: Arc<Pacer>,
    pub(crate) compression: Compression,
    pub(crate) retire: Retire,
    pub(crate) silence: Silence,
    pub(crate) clock: Clock,
    pub(crate) facts: Facts,
    pub(crate) inbox: mpsc::UnboundedReceiver<(Moment, Input)>,
    pub(crate) commands: mpsc::UnboundedReceiver<Command>,
    pub(crate) progress: watch::Sender<Progress>,
    pub(crate) notices: mpsc::UnboundedSender<Notice>,
}

/// The running driver.
pub(crate) struct Driver {
    machine: Source,
    session: SessionId,
    clock: Clock,
    facts: Facts,
    inbox: mpsc::UnboundedReceiver<(Moment, Input)>,
    commands: mpsc::UnboundedReceiver<Command>,
    progress: watch::Sender<Progress>,
    notices: mpsc::UnboundedSender<Notice>,
    connector: Arc<dyn Connector>,
    /// Of a target that may be, or is, on this host.
    lender: Option<Arc<Lender>>,
    control: Control,
    senders: Arc<Mutex<Senders>>,
    /// What the latest scan hands on.
    scanned: Arc<Feed>,
    /// The pages of the open round, or of the last.
    feed: Arc<Feed>,
    server: Server,
    outfit: Outfit,
    sink: SinkWatch,
    ticks: Interval,
    /// Connections that are being opened; they end with the driver.
    opening: JoinSet<()>,
    retire: Retire,
    left: Left,
    vm: Worker<VmSide>,
    tracker: Worker<TrackSide>,
    flusher: Worker<Flush>,
    journal: Worker<Journal>,
}

/// What the VMM here can still do with a guest that has moved.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Left {
    /// It may be there, and could be resumed or moved again: its journal must forbid that.
    Perhaps,
    /// It is known to have ended.
    Ended,
}

/// What the driver waits for.
enum Event {
    Fact(Moment, Input),
    Command(Command),
    Deadline,
    Tick,
}

impl Driver {
    /// Starts the threads and the control lane over `connection`.
    pub(crate) fn start(parts: Parts, connection: BoxedConnection) -> io::Result<Self> {
        let Parts {
            machine,
            session,
            vm,
            flush,
            tracker,
            ram,
            facts,
            clock,
            ..
        } = parts;
        let lane = ControlLane::new(connection);
        let control = Control::start(lane.reader, lane.writer, None, parts.silence, &facts);
        let server = Server::new(Arc::clone(&ram), Arc::clone(&parts.pacer), facts.clone());
        let outfit = Outfit {
            ram: Arc::clone(&ram),
            pacer: parts.pacer,
            encoder: Arc::new(Encoder::new(parts.compression, clock)),
            bases: Arc::default(),
            counters: Arc::new(Counters::default()),
            fresh: Arc::default(),
            shares: Arc::default(),
            facts: facts.clone(),
        };
        Ok(Self {
            vm: Worker::start("ferry-vm", vm, facts.clone())?,
            tracker: Worker::start("ferry-track", TrackSide { tracker, ram }, facts.clone())?,
            flusher: Worker::start("ferry-flush", flush, facts.clone())?,
            journal: Worker::start("ferry-journal", parts.journal, facts.clone())?,
            machine,
            session,
            clock,
            facts,
            inbox: parts.inbox,
            commands: parts.commands,
            progress: parts.progress,
            notices: parts.notices,
            connector: parts.connector,
            lender: parts.lender.map(Arc::new),
            control,
            senders: Arc::default(),
            scanned: Arc::new(Feed::open(1)),
            feed: Arc::new(Feed::open(1)),
            server,
            outfit,
            sink: SinkWatch::default(),
            ticks: ticks(),
            opening: JoinSet::new(),
            retire: parts.retire,
            left: Left::Perhaps,
        })
    }

    /// Runs the migration to its end.
    pub(crate) async fn run(mut self) -> Finished {
        loop {
            while let Some(action) = self.machine.poll_action() {
                if let Action::Finish(outcome) = action {
                    return self.finish(outcome).await;
                }
                self.carry_out(action);
            }
            let event = self.wait().await;
            self.take(event);
            self.progress.send_replace(self.look());
        }
    }

    fn look(&self) -> Progress {
        let progress = Progress {
            encoding: self.outfit.encoder.totals(),
            ..self.machine.progress(self.clock.now())
        };
        self.with_served(progress)
    }

    async fn wait(&mut self) -> Event {
        let deadline = self
            .machine
            .poll_timeout()
            .map(|at| self.clock.instant(at).into());
        tokio::select! {
            biased;
            Some((at, input)) = self.inbox.recv() => Event::Fact(at, input),
            Some(command) = self.commands.recv() => Event::Command(command),
            () = sleep_until(deadline.unwrap_or_else(tokio::time::Instant::now)),
                if deadline.is_some() => Event::Deadline,
            _ = self.ticks.tick() => Event::Tick,
        }
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Fact(at, input) => {
                tracing::debug!(at = ?at.0, ?input, phase = ?self.machine.phase(), "fact");
                if matches!(input, Input::Retired) && self.retire == Retire::Quit {
                    self.left = Left::Ended;
                }
                let greeted = matches!(input, Input::Received(Message::Welcome(_)));
                self.machine.handle(at, input);
                if greeted {
                    self.agree();
                }
            }
            Event::Command(command) => {
                self.machine
                    .handle(self.clock.now(), Input::Command(command));
            }
            Event::Deadline => self.machine.handle_timeout(self.clock.now()),
            Event::Tick => {
                let totals = self.outfit.counters.totals();
                self.machine.handle(self.clock.now(), Input::Sent(totals));
            }
        }
    }

    /// Both sides know what they are able to do.
    fn agree(&mut self) {
        let features = self.machine.features();
        self.outfit.encoder.agree(features);
        let is_near = features.contains(Features::NEAR);
        // Nobody else is let in any more.
        self.lender
            .take_if(|lender| !(is_near && lender.has_lent()));
        let shares = self.lender.is_some();
        self.outfit.shares.store(shares, Ordering::Release);
        if features.contains(Features::POSTCOPY) {
            self.open_fetch_lanes();
        }
    }

    fn carry_out(&mut self, action: Action) {
        tracing::debug!(?action, phase = ?self.machine.phase(), "order");
        match action {
            Action::Send(message) => self.control.send(message),
            Action::OpenLane(lane) => self.open_lane(lane),
            Action::JoinLane(lane) => lock(&self.senders).join_in(lane),
            Action::CutLane(lane) => lock(&self.senders).cut(lane, &self.outfit.pacer),
            Action::Reclaim { lane, frames, into } => self.reclaim(lane, frames, into),
            Action::StartTracking { into } => self.start_tracking(into),
            Action::OpenState => self.open_state(),
            Action::Collect { into } => self.collect(into),
            Action::Scan { rearm, with } => self.scan(rearm, with),
            Action::CollectLast { into } => self.collect_last(into),
            Action::Survey { known, into } => self.survey(known, into),
            Action::Peek => self.peek(),
            Action::CutShort => self.feed.cut_short(),
            Action::TakeLeft { into } => self.take_left(into),
            Action::Serve { missing, first } => self.server.serve(missing, &first),
            Action::Copy {
                round,
                pages,
                zeros,
                rewritten,
                deltas,
                pace,
            } => self.copy(RoundOrder {
                round,
                feed: match pages {
                    Pages::Known(pages) => Arc::new(Feed::of(pages, self.chunk_pages())),
                    Pages::Scanned => Arc::clone(&self.scanned),
                },
                zeros,
                rewritten,
                deltas,
                pace,
            }),
            Action::Flush => {
                self.flusher
                    .order(Step::Flush, |flush| flush().map(|()| Input::Flushed));
            }
            Action::Unpace => self.outfit.pacer.lift(),
            Action::Pace => self.outfit.pacer.keep(),
            Action::Throttle(percent) => self.throttle(percent),
            Action::Pause(why) => self.pause(why),
            Action::Inventory => self.inventory(),
            Action::Save => self.save(),
            Action::Ask => self.ask(),
            Action::Undo { guest } => self.undo(guest),
            Action::Retire => self.order_retire(),
            Action::StopTracking => self.tracker.order(Step::StopTracking, |side| {
                side.tracker.stop().map(|()| Input::TrackingStopped)
            }),
            Action::CloseLanes => self.close_lanes(),
            Action::Journal(record) => order_journal(&self.journal, record),
            Action::Tell(notice) => drop(self.notices.send(notice)),
            // The other orders are a target's; the source's machine never gives them.
            other => tracing::error!(?other, "an order that no source has"),
        }
    }

    /// Before a round nobody is at work on one: the lanes have ended the last, and the dead ones have
    /// been waited for.
    fn copy(&mut self, order: RoundOrder) {
        self.feed = Arc::clone(&order.feed);
        if order.deltas != Deltas::On {
            self.outfit.bases.forget();
        }
        lock(&self.senders).copy(order);
    }

    /// Pages that lanes take at a time now. The first may have joined before the others.
    fn chunk_pages(&self) -> u32 {
        let joined = lock(&self.senders).joined();
        chunk_pages(
            self.outfit.pacer.limit(),
            joined.max(self.machine.first_lanes()),
        )
    }

    /// Asks the target over a connection of its own, which is fenced by the session alone.
    fn ask(&mut self) {
        let (connector, session) = (Arc::clone(&self.connector), self.session);
        let facts = self.facts.clone();
        self.opening.spawn(async move {
            let verdict = match timeout(GREETING_LIMIT, inquire(&*connector, session)).await {
                Ok(Ok(verdict)) => Some(verdict),
                Ok(Err(error)) => {
                    tracing::debug!(error = in_full(&error), "the target could not be asked");
                    None
                }
                Err(_) => None,
            };
            facts.tell(Input::Answered(verdict));
        });
    }

    /// Lets every thread finish what it was ordered, then tells the end.
    async fn finish(mut self, outcome: Outcome) -> Finished {
        let report = Report {
            encoding: self.outfit.encoder.totals(),
            shared_pages: self.outfit.counters.shared_pages(),
            ..self.machine.report(self.clock.now())
        };
        let report = self.with_what_followed(report);
        self.server.close();
        self.opening.shutdown().await;
        self.sink.close();
        self.control.finish(PARTING).await;
        let senders = std::mem::take(&mut *lock(&self.senders));
        let pacer = self.outfit.pacer;
        let keeps_journal = match &outcome {
            Outcome::Moved => self.left == Left::Perhaps,
            // What an engine that died has left there is still true.
            Outcome::Kept { guest, .. } => matches!(guest, GuestLeft::Untouched),
            Outcome::InDoubt { .. } => true,
        };
        let (vm, tracker, journal) = (self.vm, self.tracker, self.journal);
        // Nothing depends on a flush, and storage that hangs would keep the end from being told.
        drop(self.flusher);
        let ended = tokio::task::spawn_blocking(move || {
            senders.join(&pacer);
            drop((vm.finish(), tracker.finish()));
            let journal = journal.finish();
            if !keeps_journal && let Some(journal) = journal {
                return journal.remove();
            }
            Ok(())
        });
        if let Ok(Err(error)) = ended.await {
            drop(self.notices.send(Notice::Leftover(in_full(&error))));
        }
        Finished { outcome, report }
    }
}

pub(crate) fn order_journal(journal: &Worker<Journal>, record: Record) {
    journal.order(Step::Journal, move |journal| {
        journal.write(record)?;
        Ok::<_, JournalError>(Input::Journaled(record))
    });
}

/// Beats at which progress is looked at, however much happens between them.
fn ticks() -> Interval {
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
