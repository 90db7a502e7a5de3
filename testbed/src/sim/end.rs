//! One end of the world, and the jobs its threads are given.

use std::mem;
use std::time::Duration;

use ferry_engine::core::message::{Failure, Input, Outcome, Phase, Record, Step};

use super::checks::Violation;
use super::event::Event;
use super::guest::Vm;
use super::link::Pipe;
use super::plan::Side;
use super::worker::{Job, THREADS, Thread, Worker};
use super::world::World;

/// One end: a VM, and a driver with its threads.
pub(super) struct End {
    pub(super) vm: Vm,
    pub(super) workers: [Worker; THREADS],
    /// What the journal would say after a crash.
    pub(super) journal: Option<Record>,
    /// What it was last told to say.
    pub(super) journal_told: Option<Record>,
    /// What this end sends on the control lane.
    pub(super) pipe: Pipe,
    /// False once its control lane is known to be gone.
    pub(super) reading: bool,
    pub(super) lanes_closed: bool,
    pub(super) outcome: Option<Outcome>,
    /// Added to what it does next.
    pub(super) frozen: Duration,
    pub(super) ticking: bool,
    /// When its machine is woken next.
    pub(super) wake: Option<Duration>,
    /// What its machine was last seen doing.
    pub(super) phase: Option<Phase>,
}

impl End {
    pub(super) fn new(vm: Vm) -> Self {
        Self {
            vm,
            workers: Default::default(),
            journal: None,
            journal_told: None,
            pipe: Pipe::default(),
            reading: true,
            lanes_closed: false,
            outcome: None,
            frozen: Duration::ZERO,
            ticking: false,
            wake: None,
            phase: None,
        }
    }
}

impl World {
    /// Begins a job, or queues it behind the others of its thread.
    pub(super) fn order(&mut self, side: Side, job: Job) {
        let thread = job.thread();
        self.end(side).workers[thread as usize].queue.push_back(job);
        self.begin_next(side, thread);
    }

    pub(super) fn begin_next(&mut self, side: Side, thread: Thread) {
        let worker = &mut self.end(side).workers[thread as usize];
        if worker.busy || worker.queue.is_empty() {
            return;
        }
        worker.busy = true;
        if side == Side::Source {
            self.source_begins(thread);
        }
        let frozen = mem::take(&mut self.end(side).frozen);
        let takes = self.rng.micros(self.plan.work_us.clone()) + frozen;
        self.after(takes, Event::Done(side, thread));
    }

    pub(super) fn job_done(&mut self, side: Side, thread: Thread) -> Result<(), Violation> {
        let worker = &mut self.end(side).workers[thread as usize];
        if worker
            .queue
            .front()
            .is_some_and(|job| matches!(job, Job::Load))
            && !self.load_can_end()
        {
            self.end(side).workers[thread as usize].parked = true;
            return Ok(());
        }
        let worker = &mut self.end(side).workers[thread as usize];
        worker.busy = false;
        worker.parked = false;
        let Some(job) = worker.queue.pop_front() else {
            return Ok(());
        };
        match side {
            Side::Source => self.source_does(job),
            Side::Target => self.target_does(job)?,
        }
        self.begin_next(side, thread);
        Ok(())
    }

    /// Tells a machine something that a thread has found out, in the order of that thread.
    pub(super) fn report(&mut self, side: Side, thread: Thread, input: Input) {
        let delay = self.rng.micros(1..=20);
        let now = self.now;
        let told = &mut self.end(side).workers[thread as usize].told;
        *told = (*told).max(now + delay);
        let at = *told;
        if self.plan.repeating > 0
            && self.rng.once_in(self.plan.repeating)
            && let Some(twin) = Event::twin(side, &input)
        {
            let late = self.rng.micros(1..=5000);
            self.schedule(at + late, twin);
        }
        self.schedule(at, Event::Fact(side, input));
    }

    pub(super) fn failed(&mut self, side: Side, thread: Thread, step: Step) {
        let failure = Failure::new(step, "so the seed has it");
        self.report(side, thread, Input::Failed(failure));
    }

    /// True when chance has this job fail.
    pub(super) fn fails(&mut self) -> bool {
        self.plan.failing > 0 && self.rng.once_in(self.plan.failing)
    }
}
