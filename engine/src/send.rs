//! The source's driver: waits for one thing, feeds the core, carries out its orders.
//!
//! Whatever blocks runs on a thread of its own (see [`crate::worker`]): the VM's calls, the tracker,
//! the flusher, the journal, each page lane. So this loop never waits for anything but facts.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ferry_stream::lane::ControlLane;
use ferry_stream::link::Connector;
use ferry_stream::message::SessionId;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Interval, MissedTickBehavior, interval, sleep_until, timeout};

use crate::control::{BoxedConnection, Control, Silence};
use crate::core::encoding::Compression;
use crate::core::layout::Layout;
use crate::core::message::{
    Action, Command, Failure, GuestLeft, Input, Moment, Notice, Outcome, Record, Step,
};
use crate::core::meter::{Progress, Report};
use crate::core::pageset::PageSet;
use crate::core::source::Source;
use crate::device_state::{Sink, SinkWatch};
use crate::dial::{inquire, open_lanes};
use crate::job::{Finished, Retire};
use crate::journal::{Journal, JournalError};
use crate::lanes::encode::Encoder;
use crate::lanes::send::{Counters, Outfit, Senders, chain};
use crate::pacer::Pacer;
use crate::vmm::{DeviceState, Guest, PauseFor, Ram, Rearm, RunState, Tracker, VmmError};
use crate::worker::{Clock, Facts, Worker, guarded};

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
    control: Control,
    senders: Arc<Mutex<Senders>>,
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
        let outfit = Outfit {
            ram: Arc::clone(&ram),
            pacer: parts.pacer,
            encoder: Arc::new(Encoder::new(parts.compression, clock)),
            counters: Arc::new(Counters::default()),
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
            control,
            senders: Arc::default(),
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
            self.progress
                .send_replace(self.machine.progress(self.clock.now()));
        }
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
                self.machine.handle(at, input);
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

    fn carry_out(&mut self, action: Action) {
        tracing::debug!(?action, phase = ?self.machine.phase(), "order");
        match action {
            Action::Send(message) => self.control.send(message),
            Action::OpenLanes { lanes } => self.open_lanes(lanes),
            Action::StartTracking { into } => self.start_tracking(into),
            Action::OpenState => self.open_state(),
            Action::Collect { rearm, into } => self.collect(rearm, into),
            Action::Copy {
                round,
                pages,
                zeros,
            } => {
                lock(&self.senders).copy(round, pages, zeros);
            }
            Action::Flush => {
                self.flusher
                    .order(Step::Flush, |flush| flush().map(|()| Input::Flushed));
            }
            Action::Pause(why) => {
                if why == PauseFor::Switchover {
                    self.outfit.encoder.hurry();
                }
                let clock = self.clock;
                self.vm.order(Step::Pause, move |vm| {
                    vm.guest.pause(why).map(|stopped| Input::Paused {
                        at: clock.moment(stopped.at),
                        drained: clock.moment(stopped.drained_at),
                    })
                });
            }
            Action::Inventory => self.vm.order(Step::Inventory, |vm| {
                vm.guest
                    .inventory()
                    .map(|now| Input::Inventoried(Box::new(now)))
            }),
            Action::Save => self.save(),
            Action::Ask => self.ask(),
            Action::Undo { guest } => {
                self.sink.close();
                self.vm.order(Step::Undo, move |vm| {
                    Ok::<_, VmmError>(Input::Undone(undo(vm, guest)))
                });
            }
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

    /// Closes the page lanes once the words before it have left: the target would see them end and
    /// not read why.
    fn close_lanes(&self) {
        self.outfit.pacer.close();
        let flushed = self.control.flushed(PARTING);
        let senders = Arc::clone(&self.senders);
        tokio::spawn(async move {
            flushed.await;
            lock(&senders).close();
        });
    }

    fn open_lanes(&mut self, lanes: u16) {
        self.outfit.encoder.agree(self.machine.features());
        let (connector, session) = (Arc::clone(&self.connector), self.session);
        let (outfit, senders) = (self.outfit.clone(), Arc::clone(&self.senders));
        self.opening.spawn(async move {
            let facts = outfit.facts.clone();
            let opened = timeout(GREETING_LIMIT, open_lanes(&*connector, session, lanes)).await;
            let started = match opened {
                Ok(Ok(lanes)) => Senders::start(lanes, &outfit).map_err(Into::into),
                Ok(Err(error)) => Err(error),
                Err(elapsed) => Err(io::Error::from(elapsed).into()),
            };
            match started {
                Ok(started) => {
                    *lock(&senders) = started;
                    facts.tell(Input::LanesOpen);
                }
                Err(error) => facts.tell(Input::Failed(Failure::new(Step::OpenLanes, error))),
            }
        });
    }

    fn start_tracking(&self, into: PageSet) {
        self.tracker.order(Step::StartTracking, move |side| {
            side.tracker.start()?;
            populated(&*side.ram, into)
        });
    }

    fn collect(&self, rearm: Rearm, mut into: PageSet) {
        self.tracker.order(Step::Collect, move |side| {
            let mut outside = None;
            side.tracker.collect(rearm, &mut |region, range| {
                outside = into.insert(region, range).err().or(outside);
            })?;
            match outside {
                Some(outside) => Err(VmmError::failed("a tracker reported", outside)),
                None => Ok(Input::Collected { found: into }),
            }
        });
    }

    fn open_state(&mut self) {
        let (sink, watch) = Sink::new(self.control.outgoing());
        self.sink = watch;
        self.vm.order(Step::OpenState, move |vm| {
            vm.state.open(Box::new(sink)).map(|()| Input::StateOpen)
        });
    }

    fn save(&self) {
        let sink = self.sink.clone();
        self.vm.order(Step::Save, move |vm| {
            vm.state.save()?;
            let tally = sink.tally();
            Ok::<_, VmmError>(Input::Saved {
                bytes: tally.bytes,
                crc: tally.crc(),
            })
        });
    }

    fn order_retire(&self) {
        let retire = self.retire;
        self.vm.order(Step::Retire, move |vm| {
            match retire {
                Retire::Quit => vm.guest.quit()?,
                Retire::LeaveStopped => vm.guest.restore()?,
            }
            Ok::<_, VmmError>(Input::Retired)
        });
    }

    /// Asks the target over a connection of its own, which is fenced by the session alone.
    fn ask(&mut self) {
        let (connector, session) = (Arc::clone(&self.connector), self.session);
        let facts = self.facts.clone();
        self.opening.spawn(async move {
            let verdict = match timeout(GREETING_LIMIT, inquire(&*connector, session)).await {
                Ok(Ok(verdict)) => Some(verdict),
                Ok(Err(error)) => {
                    tracing::debug!(error = chain(&error), "the target could not be asked");
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
            ..self.machine.report(self.clock.now())
        };
        self.opening.shutdown().await;
        self.sink.close();
        self.control.finish(PARTING).await;
        let senders = std::mem::take(&mut *lock(&self.senders));
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
            senders.join();
            drop((vm.finish(), tracker.finish()));
            let journal = journal.finish();
            if !keeps_journal && let Some(journal) = journal {
                return journal.remove();
            }
            Ok(())
        });
        if let Ok(Err(error)) = ended.await {
            drop(self.notices.send(Notice::Leftover(chain(&error))));
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

/// Every page that may hold anything but zeros.
fn populated(ram: &dyn Ram, mut into: PageSet) -> Result<Input, VmmError> {
    let layout: &Layout = ram.layout();
    for (region, _) in layout.iter() {
        let mut outside = None;
        ram.populated(region, &mut |range| {
            outside = into.insert(region, range).err().or(outside);
        })?;
        if let Some(outside) = outside {
            return Err(VmmError::failed("guest RAM reported", outside));
        }
    }
    Ok(Input::Tracking { populated: into })
}

/// Puts the VM back. Every step is tried, whatever became of the one before; the first failure is
/// told.
fn undo(vm: &mut VmSide, wanted: RunState) -> Result<RunState, Failure> {
    let abandoned = guarded(Step::Undo, || vm.state.abandon());
    let resumed = guarded(Step::Undo, || {
        let state = vm.guest.run_state()?;
        if wanted == RunState::Running && state == RunState::Paused {
            vm.guest.resume()?;
        }
        vm.guest.run_state()
    });
    let restored = guarded(Step::Undo, || vm.guest.restore());
    abandoned.and(restored).and(resumed)
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
