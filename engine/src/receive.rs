//! The target's driver: takes connections, feeds the core, carries out its orders.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use ferry_stream::lane::ControlLane;
use ferry_stream::link::Acceptor;
use ferry_stream::message::{
    AbortCode, Features, LaneIndex, Message, Purpose, Verdict, Versions, Welcome,
};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{sleep_until, timeout};

use crate::control::{BoxedConnection, Control, Silence};
use crate::core::message::{
    Action, Command, Failure, Input, Inquirer, MayHaveRun, Moment, Notice, Outcome, Phase, Record,
    Step,
};
use crate::core::meter::Report;
use crate::core::target::Target;
use crate::device_state::Inbox;
use crate::greeting::{Arrival, MAX_GREETINGS, accept};
use crate::job::Finished;
use crate::journal::Journal;
use crate::lanes::receive::Receivers;
use crate::lanes::send::chain;
use crate::send::{GREETING_LIMIT, PARTING, VmSide, order_journal};
use crate::vmm::{Ram, VmmError};
use crate::worker::{Clock, Facts, Worker};

/// What the driver is made of.
pub(crate) struct Parts {
    pub(crate) machine: Target,
    pub(crate) vm: VmSide,
    pub(crate) ram: Arc<dyn Ram>,
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
    ram: Arc<dyn Ram>,
    receivers: Receivers,
    /// Page lanes that have come; the receivers themselves end when RAM is complete.
    lanes_came: u16,
    state: Inbox,
    inquirers: HashMap<Inquirer, ControlLane<BoxedConnection>>,
    asking: mpsc::UnboundedSender<ControlLane<BoxedConnection>>,
    asked: mpsc::UnboundedReceiver<ControlLane<BoxedConnection>>,
    /// What is said to connections besides the control lane; nobody waits for a peer to take it.
    talks: JoinSet<()>,
    inquiries: u64,
    vm: Worker<VmSide>,
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
        let (asking, asked) = mpsc::unbounded_channel();
        Ok(Self {
            machine: parts.machine,
            clock: parts.clock,
            inbox: parts.inbox,
            commands: parts.commands,
            arrivals,
            accepting: tokio::spawn(accept(parts.acceptor, greeted, parts.notices.clone())),
            phase: parts.phase,
            notices: parts.notices,
            silence: parts.silence,
            control: None,
            ram: parts.ram,
            receivers: Receivers::default(),
            lanes_came: 0,
            state: Inbox::default(),
            inquirers: HashMap::new(),
            inquiries: 0,
            asking,
            asked,
            talks: JoinSet::new(),
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
            Action::BeginLoad => {
                let mut reader = self.state.reader();
                self.vm.order(Step::Load, move |vm| {
                    vm.state.load(&mut reader).map(|()| Input::Loaded)
                });
            }
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
                // A load that waits for state would keep the VM thread for ever.
                self.state.close("the migration was given up");
                self.vm
                    .order(Step::Retire, |vm| vm.guest.quit().map(|()| Input::Quit));
            }
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

    fn prepare(&self) {
        self.vm.order(Step::Prepare, |vm| {
            vm.state.prepare().map(|()| Input::Prepared)
        });
    }

    /// RAM is complete. Every lane has ended before the load begins: nothing that a source still sends
    /// writes the RAM of a guest that is loaded, or runs.
    fn release(&mut self, bytes: u64, crc: u32) {
        let (mut receivers, state) = (std::mem::take(&mut self.receivers), self.state.clone());
        tokio::task::spawn_blocking(move || {
            receivers.join();
            state.release(bytes, crc);
        });
    }

    fn write_journal(&self, record: Record) {
        order_journal(&self.journal, record);
    }

    /// A connection has said what it is for.
    async fn arrived(&mut self, arrival: Arrival) {
        let known = self.machine.session() == Some(arrival.hello.session);
        match arrival.hello.purpose {
            Purpose::Migrate if self.machine.session().is_none() => self.adopt(arrival),
            Purpose::Migrate => {
                self.turn_away(arrival, AbortCode::Busy, "another migration is under way");
            }
            Purpose::Lane(lane) if known => self.add_lane(arrival, lane.index).await,
            Purpose::Inquire if known => self.add_inquirer(arrival),
            Purpose::Lane(_) | Purpose::Inquire => {
                self.turn_away(
                    arrival,
                    AbortCode::Session,
                    "that session is not at work here",
                );
            }
        }
    }

    /// This is the migration that is served.
    fn adopt(&mut self, arrival: Arrival) {
        let Arrival { lane, hello, peer } = arrival;
        let session = hello.session;
        let inbox = Some(self.state.clone());
        let control = Control::start(lane.reader, lane.writer, inbox, self.silence, &self.facts);
        self.control = Some(control);
        self.journal.order(Step::Journal, move |journal| {
            journal.set_session(session, &peer);
            // No fact is due: the first record that is written carries the session.
            Ok::<_, VmmError>(Input::Received(Message::Ping))
        });
        self.machine
            .handle(self.clock.now(), Input::Received(Message::Hello(hello)));
    }

    async fn add_lane(&mut self, arrival: Arrival, index: LaneIndex) {
        if index.0 != self.lanes_came + 1 || index.0 > self.machine.lanes() {
            self.turn_away(arrival, AbortCode::Protocol, "that page lane is not due");
            return;
        }
        self.lanes_came = index.0;
        let lanes = self.machine.lanes();
        if let Err(error) = self.start_lane(arrival.lane, index, lanes).await {
            let what = format!("page {index}: {}", chain(&error));
            self.facts.tell(Input::LinkLost { what });
        }
    }

    async fn start_lane(
        &mut self,
        mut lane: ControlLane<BoxedConnection>,
        index: LaneIndex,
        lanes: u16,
    ) -> Result<(), ferry_stream::Error> {
        lane.writer.send(&Message::Welcome(welcome(lanes))).await?;
        let lane = lane.into_inner()?.into_lane()?;
        self.receivers.start(index, lane, &self.ram, &self.facts)?;
        if index.0 == lanes {
            self.facts.tell(Input::LanesOpen);
        }
        Ok(())
    }

    /// Somebody wants to ask who owns the guest. The question is waited for elsewhere: a link that
    /// stands still must not hold up the hand-over. Whoever asked and went away is not missed.
    fn add_inquirer(&mut self, arrival: Arrival) {
        let (mut lane, asking) = (arrival.lane, self.asking.clone());
        self.talks.spawn(async move {
            let welcomed = lane.writer.send(&Message::Welcome(welcome(0))).await;
            let asked = timeout(GREETING_LIMIT, lane.reader.next()).await;
            if let (Ok(()), Ok(Ok(Some(Message::Inquire)))) = (welcomed, asked) {
                drop(asking.send(lane));
            }
        });
    }

    fn inquired(&mut self, lane: ControlLane<BoxedConnection>) {
        self.inquiries += 1;
        let inquirer = Inquirer(self.inquiries);
        self.inquirers.insert(inquirer, lane);
        self.machine
            .handle(self.clock.now(), Input::Inquired(inquirer));
    }

    /// Tells a connection, in a task of its own, that it is not wanted.
    fn turn_away(&mut self, arrival: Arrival, code: AbortCode, text: &'static str) {
        self.talks.spawn(async move {
            let mut lane = arrival.lane;
            let abort = Message::Abort {
                code,
                text: text.to_owned(),
            };
            drop(timeout(PARTING, lane.writer.send(&abort)).await);
        });
    }

    async fn answer(&mut self, to: Inquirer, verdict: Verdict) {
        if let Some(mut lane) = self.inquirers.remove(&to) {
            // An answer that is lost is asked for again.
            drop(lane.writer.send(&Message::Answer(verdict)).await);
        }
    }

    /// Lets every thread finish what it was ordered, then tells the end.
    async fn finish(mut self, outcome: Outcome) -> Finished {
        self.accepting.abort();
        self.talks.shutdown().await;
        self.state.close("the migration is over");
        if let Some(control) = self.control.take() {
            control.finish(PARTING).await;
        }
        let keeps_journal = matches!(outcome, Outcome::InDoubt { .. });
        let (mut receivers, vm, journal) = (self.receivers, self.vm, self.journal);
        let ended = tokio::task::spawn_blocking(move || {
            receivers.join();
            drop(vm.finish());
            match journal.finish() {
                Some(journal) if !keeps_journal => journal.remove(),
                _ => Ok(()),
            }
        });
        if let Ok(Err(error)) = ended.await {
            drop(self.notices.send(Notice::Leftover(chain(&error))));
        }
        let report = Report {
            total: self.clock.now().0,
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

fn welcome(lanes: u16) -> Welcome {
    Welcome {
        version: Versions::OURS.highest,
        features: Features::NONE,
        lanes,
    }
}
