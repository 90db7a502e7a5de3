//! The event loop: simulated time, both machines, and everything that happens to them in order.

use std::collections::VecDeque;
use std::mem;
use std::time::Duration;

use ferry_engine::core::layout::{Layout, PageRange, RegionIndex};
use ferry_engine::core::message::{Action, Input, LaneTotals, Moment};
use ferry_engine::core::pageset::PageSet;
use ferry_engine::core::source::Source;
use ferry_engine::core::target::Target;
use ferry_engine::vmm::{Inventory, RunState};

use super::Summary;
use super::checks::{Ending, Truth, Violation, reason};
use super::deltas::Bases;
use super::end::End;
use super::event::{Agenda, Event};
use super::flaw::Flaw;
use super::guest::{Content, Memory, RunBy, Tracker, Vm, layout};
use super::link::{Feed, Lane, Queue};
use super::plan::{Mischief, Plan, Side, When};
use super::rng::Rng;

/// A world that has not come to its end by then never will: bounds are milliseconds here.
const END_OF_TIME: Duration = Duration::from_secs(5);

/// Writes of a guest at the target before it has proved its point.
const WRITES_AT_TARGET: u64 = 64;

/// The simulated world of one seed.
pub(super) struct World {
    pub(super) now: Duration,
    agenda: Agenda,
    pub(super) steps: u64,
    pub(super) rng: Rng,
    pub(super) plan: Plan,
    pub(super) flaw: Option<Flaw>,
    pub(super) source: Source,
    pub(super) target: Target,
    ends: [End; 2],
    pub(super) tracker: Tracker,
    pub(super) inventory: Inventory,
    pub(super) plugged: bool,
    /// The target's VMM has loaded the guest.
    pub(super) loaded: bool,
    /// What happened to a guest and its machine has not heard of.
    pub(super) unheard: [u32; 2],
    pub(super) lanes_cut: bool,
    pub(super) lanes: Vec<Lane>,
    pub(super) queue: Option<Queue>,
    pub(super) bases: Bases,
    /// Pages that the target took from the source's RAM.
    pub(super) shared: u64,
    /// What the latest scan has handed on, until its round is ordered.
    pub(super) scanned: Option<Feed>,
    /// Parts of guest RAM that the scan under way has still to get through.
    pub(super) parts: VecDeque<(RegionIndex, PageRange)>,
    pub(super) totals: LaneTotals,
    pub(super) state_at_target: Option<u64>,
    pub(super) room: Room,
    pub(super) load_released: Option<(u64, u32)>,
    pub(super) asking: Option<u64>,
    pub(super) asked: u64,
    pub(super) reachable_from: Option<Duration>,
    pub(super) truth: Truth,
    pub(super) writes: u64,
    writes_at_target: u64,
    waiting: Vec<(When, Mischief)>,
    trace: Option<Vec<String>>,
}

/// Room at the target that was ordered ahead of pages.
pub(super) struct Room {
    pub(super) pages: PageSet,
    pub(super) in_the_making: bool,
}

/// Whether a world writes down what happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tracing {
    /// Every step.
    On,
    /// Nothing; much faster.
    Off,
}

impl World {
    /// The world of `seed`, with a flaw if one is wanted.
    pub(super) fn new(seed: u64, flaw: Option<Flaw>, tracing: Tracing) -> Self {
        let mut rng = Rng::new(seed);
        let plan = Plan::draw(&mut rng);
        let layout = layout(&mut rng);
        let inventory = inventory(layout.clone());
        let source = Source::new(
            plan.source.clone(),
            inventory.clone(),
            plan.guest,
            plan.rule.boxed(),
        );
        let target = Target::new(plan.target.clone(), inventory.clone());
        let ends = [Side::Source, Side::Target].map(|_| End::new(Vm::new(&layout, plan.pattern)));
        let mut world = Self {
            now: Duration::ZERO,
            agenda: Agenda::default(),
            steps: 0,
            rng,
            flaw,
            source,
            target,
            ends,
            tracker: Tracker::new(&layout),
            inventory,
            plugged: false,
            loaded: false,
            unheard: [0; 2],
            lanes_cut: false,
            lanes: Vec::new(),
            queue: None,
            bases: Bases::default(),
            shared: 0,
            scanned: None,
            parts: VecDeque::new(),
            totals: LaneTotals::default(),
            state_at_target: None,
            room: Room {
                pages: PageSet::empty(&layout),
                in_the_making: false,
            },
            load_released: None,
            asking: None,
            asked: 0,
            reachable_from: None,
            truth: Truth::default(),
            writes: 0,
            writes_at_target: 0,
            waiting: Vec::new(),
            trace: (tracing == Tracing::On).then(Vec::new),
            plan,
        };
        world.populate(&layout);
        world
    }

    /// RAM that a guest has worked in, and RAM that was blanked.
    fn populate(&mut self, layout: &Layout) {
        let mut ram = Memory::new(layout);
        let (rng, writes) = (&mut self.rng, &mut self.writes);
        ram.fill_all(|| {
            *writes += 1;
            if rng.percent(60) {
                Content(*writes)
            } else {
                Content::ZERO
            }
        });
        self.ends[0].vm.ram = ram;
        if self.flaw == Some(Flaw::TargetNotBlank) {
            self.ends[1].vm.ram.fill_all(|| Content(u64::MAX >> 1));
        }
        self.truth.wanted = Some(self.plan.guest);
        if self.plan.guest == RunState::Running {
            self.let_run(Side::Source, RunBy::Engine);
        }
        for (when, mischief) in mem::take(&mut self.plan.mischief) {
            match when {
                When::After(span) => self.after(span, Event::Mischief(mischief)),
                when @ When::In(..) => self.waiting.push((when, mischief)),
            }
        }
    }

    pub(super) fn end(&mut self, side: Side) -> &mut End {
        &mut self.ends[side as usize]
    }

    pub(super) fn at(&self, side: Side) -> &End {
        &self.ends[side as usize]
    }

    /// Lets the world happen until both machines have ended.
    pub(super) fn run(&mut self) -> Result<(), Violation> {
        self.settle(Side::Source)?;
        self.settle(Side::Target)?;
        while !self.is_over() {
            let next = (self.now < END_OF_TIME).then(|| self.agenda.next());
            let Some((at, event)) = next.flatten() else {
                return Err(self.stuck());
            };
            self.now = at;
            self.steps += 1;
            self.happen(event)?;
            self.check_owners()?;
        }
        self.check_end()
    }

    /// Both have ended, and their threads with them.
    fn is_over(&self) -> bool {
        let over = |end: &End| {
            let idle = end
                .workers
                .iter()
                .all(|worker| worker.queue.is_empty() || worker.parked);
            end.outcome.is_some() && idle
        };
        self.ends.iter().all(over)
    }

    fn stuck(&self) -> Violation {
        Violation::Stuck {
            source_phase: self.source.phase(),
            target_phase: self.target.phase(),
        }
    }

    fn happen(&mut self, event: Event) -> Result<(), Violation> {
        match event {
            Event::Fact(side, input) => return self.tell(side, input),
            Event::Done(side, thread) => return self.job_done(side, thread),
            Event::ScansOn => self.scans_on(),
            Event::LaneSent(lane) => self.lane_sent(lane),
            Event::LaneArrives(lane, frame) => self.lane_arrives(lane, frame),
            Event::LanePlaces(lane, late) => return self.lane_places(lane, late),
            Event::LaneHello(lane) => self.lane_hello(lane),
            Event::LaneAnswered(lane, welcome) => self.lane_answered(lane, welcome),
            Event::LaneNotices(side, lane) => self.lane_notices(side, lane),
            Event::LaneEnds(lane) => self.lane_ends(lane),
            Event::Arrives(side, message) => return self.arrives(side, message),
            Event::Notices(side, what) => return self.notices(side, what),
            Event::Tick(side) => self.tick(side),
            Event::Wake(side) => return self.wake(side),
            Event::Mischief(mischief) => self.mischief(mischief),
            Event::AskArrives(id) => self.ask_arrives(id),
            Event::AskEnds(id, verdict) => return self.ask_ends(id, verdict),
        }
        Ok(())
    }

    /// Schedules an event.
    pub(super) fn after(&mut self, span: Duration, event: Event) {
        self.schedule(self.now + span, event);
    }

    pub(super) fn schedule(&mut self, at: Duration, event: Event) {
        self.agenda.schedule(at.max(self.now), event);
    }

    /// A machine takes a fact in, and what it orders is begun.
    pub(super) fn tell(&mut self, side: Side, input: Input) -> Result<(), Violation> {
        self.note(|| format!("{side:?} <- {}", super::trace::fact(&input)));
        self.overhear(side, &input);
        let now = Moment(self.now);
        match side {
            Side::Source => self.source.handle(now, input),
            Side::Target => self.target.handle(now, input),
        }
        self.settle(side)
    }

    fn wake(&mut self, side: Side) -> Result<(), Violation> {
        self.end(side).wake = None;
        let now = Moment(self.now);
        if self.deadline(side).is_some_and(|at| at <= now) {
            self.note(|| format!("{side:?} <- time"));
            match side {
                Side::Source => self.source.handle_timeout(now),
                Side::Target => self.target.handle_timeout(now),
            }
        }
        self.settle(side)
    }

    fn deadline(&self, side: Side) -> Option<Moment> {
        match side {
            Side::Source => self.source.poll_timeout(),
            Side::Target => self.target.poll_timeout(),
        }
    }

    /// Carries out what a machine orders, and notes when it wants to be woken.
    fn settle(&mut self, side: Side) -> Result<(), Violation> {
        while let Some(action) = self.poll(side) {
            self.note(|| format!("{side:?} -> {}", super::trace::order(&action)));
            if self.at(side).outcome.is_some() {
                return Err(Violation::OrderAfterEnd {
                    side,
                    action: super::trace::order(&action),
                });
            }
            match side {
                Side::Source => self.source_action(action)?,
                Side::Target => self.target_action(action)?,
            }
        }
        if let Some(Moment(at)) = self.deadline(side)
            && self.at(side).wake.is_none_or(|wake| at < wake)
        {
            self.end(side).wake = Some(at);
            self.schedule(at, Event::Wake(side));
        }
        self.reach_phase(side);
        Ok(())
    }

    fn poll(&mut self, side: Side) -> Option<Action> {
        match side {
            Side::Source => self.source.poll_action(),
            Side::Target => self.target.poll_action(),
        }
    }

    /// Sets off the mischief that waits for a phase.
    fn reach_phase(&mut self, side: Side) {
        let phase = match side {
            Side::Source => self.source.phase(),
            Side::Target => self.target.phase(),
        };
        if self.end(side).phase.replace(phase) == Some(phase) {
            return;
        }
        let due = |when: &When| matches!(when, When::In(at, in_phase, _) if (*at, *in_phase) == (side, phase));
        let (now, later) = mem::take(&mut self.waiting)
            .into_iter()
            .partition(|(when, _)| due(when));
        self.waiting = later;
        let now: Vec<(When, Mischief)> = now;
        for (when, mischief) in now {
            if let When::In(_, _, span) = when {
                self.after(span, Event::Mischief(mischief));
            }
        }
    }

    fn tick(&mut self, side: Side) {
        self.end(side).ticking = false;
        let done = side == Side::Target && self.writes_at_target > WRITES_AT_TARGET;
        if !self.at(side).vm.runs() || done {
            return;
        }
        for _ in 0..self.rng.within(1..=self.plan.burst) {
            self.writes += 1;
            let write = Content(self.writes);
            let place = self.ends[side as usize].vm.execute(&mut self.rng, write);
            if side == Side::Source {
                self.wrote(place);
            } else {
                self.writes_at_target += 1;
            }
        }
        self.end(side).ticking = true;
        let span = self.plan.tick / 2 + self.rng.micros(1..=50).min(self.plan.tick);
        let time_percent = 100 - u32::from(self.at(side).vm.slowed);
        self.after(span * 100 / time_percent, Event::Tick(side));
    }

    /// Lets a guest run and keeps it busy.
    pub(super) fn let_run(&mut self, side: Side, by: RunBy) {
        self.end(side).vm.run(by);
        if self.at(side).vm.runs() && !mem::replace(&mut self.end(side).ticking, true) {
            let span = self.rng.micros(1..=50);
            self.after(span, Event::Tick(side));
        }
    }

    pub(super) fn note(&mut self, line: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{:>10.3?} {}", self.now, line()));
        }
    }

    /// How it ended.
    pub(super) fn summary(&self) -> Summary {
        let ending = |side: Side| {
            let outcome = self.at(side).outcome.as_ref();
            outcome.map_or(Ending::InDoubt, Ending::of)
        };
        let report = self.source.report(Moment(self.now));
        Summary {
            source: ending(Side::Source),
            target: ending(Side::Target),
            reason: self.at(Side::Source).outcome.as_ref().and_then(reason),
            lasted: self.now,
            steps: self.steps,
            lanes_lost: report.lanes_lost,
            throttled_percent: report.throttled_percent_max,
            deltas: self.bases.told,
            shared: self.shared,
            mismatches: self.bases.mismatched,
        }
    }

    /// What happened, if it was written down.
    pub(super) fn into_trace(self) -> Vec<String> {
        self.trace.unwrap_or_default()
    }
}

fn inventory(layout: Layout) -> Inventory {
    Inventory {
        arch: "x86_64".into(),
        machine: "sim-1.0".into(),
        vmm: "the simulated world".into(),
        layout,
        devices: vec!["a counter".into()],
    }
}
