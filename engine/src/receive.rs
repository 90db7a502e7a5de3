//! The target's driver: takes connections, feeds the core, carries out its orders.

mod arrivals;
mod fetch;

use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use ferry_stream::lane::ControlLane;
use ferry_stream::link::Acceptor;
use ferry_stream::message::LaneId;
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::sleep_until;

use crate::control::{BoxedConnection, Control, Silence};
use crate::core::message::{
    Action, Command, Failure, Input, Inquirer, MayHaveRun, Moment, Notice, Outcome, Phase, Record,
    Step,
};
use crate::core::meter::Report;
use crate::core::outcome::in_full;
use crate::core::target::Target;
use crate::device_state::Inbox;
use crate::greeting::{Arrival, MAX_GREETINGS, accept};
use crate::job::Finished;
use crate::journal::Journal;
use crate::lanes::ahead::Ahead;
use crate::lanes::receive::{Place, Receivers, ReceivingLane, Tally};
use crate::postcopy::fetcher::Fetcher;
use crate::send::{PARTING, VmSide, order_journal};
use crate::vmm::{Faults, Ram, RamWindow, VmmError};
use crate::worker::{Clock, Facts, Worker};

/// What the driver is made of.
pub(crate) struct Parts {
    pub(crate) machine: Target,
    pub(crate) vm: VmSide,
    pub(crate) ram: Arc<dyn Ram>,
    pub(crate) faults: Option<Box<dyn Faults>>,
    pub(crate) acceptor: Box<dyn Acceptor>,
    pub(crate) journal: Journal,
    pub(crate) silence: Silence,
    pub(crate) clock: Clock,
    pub(crate) facts: Facts,
    pub(crate) inbox: mpsc::UnboundedReceiver<(Moment, Input)>,
    pub(crate) commands: mpsc::UnboundedReceiver<Command>,
    pub(crate) phase: watch::Sender<Phase>,
    pub(crate) notices: mpsc::UnboundedSender<Notice>,
}

/// The running driver.
pub(crate) struct Driver {
    machine: Target,
    clock: Clock,
    facts: Facts,
    inbox: mpsc::UnboundedReceiver<(Moment, Input)>,
    commands: mpsc::UnboundedReceiver<Command>,
    arrivals: mpsc::Receiver<Arrival>,
    accepting: JoinHandle<()>,
    phase: watch::Sender<Phase>,
    notices: mpsc::UnboundedSender<Notice>,
    silence: Silence,
    control: Option<Control>,
    place: Place,
    /// The source's RAM, where it has lent it: held until the end, for others give it back in a hurry.
    lent: Option<Arc<[RamWindow]>>,
    /// Where the lanes go that a source on this host passes.
    passed: mpsc::Sender<BoxedConnection>,
    receivers: Receivers,
    ahead: Ahead,
    /// Lanes whose end is waited for.
    ending: JoinSet<()>,
    state: Inbox,
    inquirers: HashMap<Inquirer, ControlLane<BoxedConnection>>,
    asking: mpsc::UnboundedSender<ControlLane<BoxedConnection>>,
    asked: mpsc::UnboundedReceiver<ControlLane<BoxedConnection>>,
    /// What is said to connections besides the control lane; nobody waits for a peer to take it.
    talks: JoinSet<()>,
    inquiries: u64,
    vm: Worker<VmSide>,
    /// None where the VMM cannot wait for pages.
    faults: Option<Worker<Box<dyn Faults>>>,
    fetcher: Fetcher,
    journal: Worker<Journal>,
}

/// What the driver waits for.
enum Event {
    Fact(Moment, Input),
    Arrival(Box<Arrival>),
    Asked(Box<ControlLane<BoxedConnection>>),
    Command(Command),
    Deadline,
}

impl Driver {
    /// Starts the threads and the taking of connections.
    pub(crate) fn start(parts: Parts) -> io::Result<Self> {
        let Parts { vm, facts, .. } = parts;
        let (greeted, arrivals) = mpsc::channel(MAX_GREETINGS);
        let (passed, passing) = mpsc::channel(MAX_GREETINGS);
        let accepting = accept(parts.acceptor, passing, greeted, parts.notices.clone());
        let (asking, asked) = mpsc::unbounded_channel();
        let ahead = Ahead::new(&parts.ram, &facts);
        let faults = parts.faults;
        let faults = faults.map(|faults| Worker::start("ferry-faults", faults, facts.clone()));
        let fetcher = Fetcher::new(
            parts.ram.layout().clone(),
            parts.clock,
            facts.clone(),
            parts.notices.clone(),
        );
        Ok(Self {
            machine: parts.machine,
            clock: parts.clock,
            inbox: parts.inbox,
            commands: parts.commands,
            arrivals,
            accepting: tokio::spawn(accepting),
            phase: parts.phase,
            notices: parts.notices,
            silence: parts.silence,
            control: None,
            place: Place {
                front: Arc::clone(ahead.front()),
                ram: parts.ram,
                windows: None,
            },
            lent: None,
            passed,
            ahead,
            receivers: Receivers::default(),
            ending: JoinSet::new(),
            state: Inbox::default(),
            inquirers: HashMap::new(),
            inquiries: 0,
            asking,
            asked,
            talks: JoinSet::new(),
            faults: faults.transpose()?,
            fetcher,
            vm: Worker::start("ferry-vm", vm, facts.clone())?,
            journal: Worker::start("ferry-journal", parts.journal, facts.clone())?,
            facts,
        })
    }

    /// Serves one migration to its end.
    pub(crate) async fn run(mut self) -> Finished {
        loop {
            while let Some(action) = self.machine.poll_action() {
                if let Action::Finish(outcome) = action {
                    return self.finish(outcome).await;
                }
                self.carry_out(action).await;
            }
            let event = self.wait().await;
            self.take(event).await;
            self.phase.send_replace(self.machine.phase());
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
            Some(arrival) = self.arrivals.recv() => Event::Arrival(Box::new(arrival)),
            Some(lane) = self.asked.recv() => Event::Asked(Box::new(lane)),
            Some(command) = self.commands.recv() => Event::Command(command),
            () = sleep_until(deadline.unwrap_or_else(tokio::time::Instant::now)),
                if deadline.is_some() => Event::Deadline,
            else => Event::Fact(self.clock.now(), Input::LinkLost {
                what: "no connection can be taken any more".to_owned(),
            }),
        }
    }

    async fn take(&mut self, event: Event) {
        match event {
            Event::Fact(at, input) => {
                tracing::debug!(at = ?at.0, ?input, phase = ?self.machine.phase(), "fact");
                self.machine.handle(at, input);
            }
            Event::Arrival(arrival) => self.arrived(*arrival).await,
            Event::Asked(lane) => self.inquired(*lane),
            Event::Command(command) => {
                self.machine
                    .handle(self.clock.now(), Input::Command(command));
            }
            Event::Deadline => self.machine.handle_timeout(self.clock.now()),
        }
    }

    async fn carry_out(&mut self, action: Action) {
        tracing::debug!(?action, phase = ?self.machine.phase(), "order");
        match action {
            Action::Send(message) => {
                if let Some(control) = &self.control {
                    control.send(message);
                }
            }
            Action::Prepare => self.prepare(),
            Action::Allocate(room) => self.ahead.allocate(&room),
            Action::EndAllocating => self.ahead.close(),
            Action::BeginLoad => {
                let mut reader = self.state.reader();
                self.vm.order(Step::Load, move |vm| {
                    vm.state.load(&mut reader).map(|()| Input::Loaded)
                });
            }
            Action::Discard { pages } => self.discard(pages),
            Action::Arm { missing } => self.arm(missing),
            Action::Disarm => self.disarm(),
            Action::ReleaseLoad { bytes, crc } => self.release(bytes, crc),
            Action::Resume => self.vm.order(Step::Resume, |vm| {
                Ok::<_, VmmError>(
                    vm.guest
                        .resume()
                        .map_or_else(not_resumed, |()| Input::Resumed),
                )
            }),
            Action::Restore => {
                self.vm.order(Step::Undo, |vm| {
                    vm.guest.restore().map(|()| Input::Restored)
                });
            }
            Action::Quit => {
                self.ahead.close();
                // Whoever waits for a page there waits until the VMM has ended.
                let fetcher = self.fetcher.clone();
                self.ending.spawn_blocking(move || fetcher.end());
                // A load that waits for state would keep the VM thread for ever.
                self.state.close("the migration was given up");
                self.vm
                    .order(Step::Retire, |vm| vm.guest.quit().map(|()| Input::Quit));
            }
            Action::EndLane(lane) => self.end_lane(lane),
            Action::LookAtLanes => self.facts.tell(Input::LanesSeen(self.receivers.seen())),
            Action::CloseLanes => self.close_lanes().await,
            Action::Answer { to, verdict } => self.answer(to, verdict).await,
            Action::Journal(record) => self.write_journal(record),
            Action::Tell(notice) => drop(self.notices.send(notice)),
            // The other orders are a source's; the target's machine never gives them.
            other => tracing::error!(?other, "an order that no target has"),
        }
    }

    /// Closes the page lanes once the words before it have left: the source would see them end and
    /// not read why.
    async fn close_lanes(&mut self) {
        if let Some(control) = &self.control {
            control.flushed(PARTING).await;
        }
        self.receivers.close();
    }

    /// Waits, on a thread that may block, until the lane's own has ended: it may be in the middle of
    /// a page.
    fn end_lane(&mut self, id: LaneId) {
        let (lane, facts) = (self.receivers.remove(id), self.facts.clone());
        self.ending.spawn_blocking(move || {
            // One that was enlisted and could not be started has brought nothing.
            let tally = lane.map_or_else(|| Some(Tally::default()), ReceivingLane::end);
            if let Some(Tally { frames, pages }) = tally {
                facts.tell(Input::LaneEnded {
                    lane: id,
                    frames,
                    pages,
                });
            }
        });
    }

    fn prepare(&self) {
        self.vm.order(Step::Prepare, |vm| {
            vm.state.prepare().map(|()| Input::Prepared)
        });
    }

    /// RAM is complete. Every lane has ended before the load begins, and nobody allocates any more:
    /// nothing that a source still sends writes the RAM of a guest that is loaded, or runs.
    fn release(&mut self, bytes: u64, crc: u32) {
        // No lane comes any more. The windows are taken down later: that takes a while, and a guest is
        // waiting.
        self.place.windows = None;
        let (mut receivers, state) = (std::mem::take(&mut self.receivers), self.state.clone());
        let quiet = self.ahead.quiet();
        tokio::task::spawn_blocking(move || {
            receivers.join();
            quiet();
            state.release(bytes, crc);
        });
    }

    fn write_journal(&self, record: Record) {
        order_journal(&self.journal, record);
    }

    /// Lets every thread finish what it was ordered, then tells the end.
    async fn finish(mut self, outcome: Outcome) -> Finished {
        self.accepting.abort();
        self.talks.shutdown().await;
        while self.ending.join_next().await.is_some() {}
        self.state.close("the migration is over");
        if let Some(control) = self.control.take() {
            control.finish(PARTING).await;
        }
        let keeps_journal = matches!(outcome, Outcome::InDoubt { .. });
        let (mut receivers, vm, journal) = (self.receivers, self.vm, self.journal);
        let (ahead, lent) = (self.ahead, self.lent);
        let (faults, fetcher) = (self.faults, self.fetcher.clone());
        let ended = tokio::task::spawn_blocking(move || {
            receivers.join();
            fetcher.end();
            drop(faults.map(Worker::finish));
            ahead.join();
            drop(lent);
            drop(vm.finish());
            match journal.finish() {
                Some(journal) if !keeps_journal => journal.remove(),
                _ => Ok(()),
            }
        });
        if let Ok(Err(error)) = ended.await {
            drop(self.notices.send(Notice::Leftover(in_full(&error))));
        }
        let report = Report {
            total: self.clock.now().0,
            fetched: self.fetcher.figures(),
            ..Report::default()
        };
        Finished { outcome, report }
    }
}

/// A VMM that answered "no" has not run the guest; one that did not answer perhaps has.
fn not_resumed(error: VmmError) -> Input {
    let ran = match &error {
        VmmError::Failed { .. } | VmmError::Unfit { .. } => MayHaveRun::No,
        _ => MayHaveRun::Perhaps,
    };
    Input::NotResumed {
        ran,
        failure: Failure::new(Step::Resume, error),
    }
}
