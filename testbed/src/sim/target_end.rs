//! The target's driver: carries out orders on the simulated VM and journal.

use ferry_engine::core::layout::{PageRange, RegionIndex};
use ferry_engine::core::message::{Action, Failure, Input, MayHaveRun, Outcome, Record, Step};
use ferry_stream::message::{Message, Run};

use super::checks::{Ending, Violation, record_of, same_pages};
use super::event::Event;
use super::flaw::Flaw;
use super::guest::{Power, RunBy};
use super::plan::Side;
use super::source_end::check_sum;
use super::worker::{Job, Thread};
use super::world::World;

const HERE: Side = Side::Target;

impl World {
    pub(super) fn target_action(&mut self, action: Action) -> Result<(), Violation> {
        match action {
            Action::Send(message) => self.target_says(message)?,
            Action::Prepare => self.order(HERE, Job::Prepare),
            Action::Allocate(room) => self.make_room(&room)?,
            Action::EndAllocating => self.room.in_the_making = false,
            Action::BeginLoad => self.order(HERE, Job::Load),
            Action::ReleaseLoad { bytes, crc } => {
                if self.room.in_the_making {
                    return Err(Violation::RoomInLoad);
                }
                self.load_released = Some((bytes, crc));
                self.unpark();
            }
            Action::Resume => self.order(HERE, Job::Resume),
            Action::Restore => self.order(HERE, Job::Restore),
            Action::Quit => self.order(HERE, Job::Quit),
            Action::Answer { to, verdict } => {
                self.must_say("an answer", record_of(verdict))?;
                self.answer(to.0, verdict);
            }
            Action::EndLane(lane) => self.end_lane(lane),
            Action::LookAtLanes => self.look_at_lanes(),
            Action::CloseLanes => self.close_lanes(HERE),
            Action::Journal(record) => {
                self.write_journal(HERE, record)?;
                if record == Record::Taken && self.flaw == Some(Flaw::TakenInName) {
                    self.report(HERE, Thread::Journal, Input::Journaled(record));
                }
            }
            Action::Tell(_) => {}
            Action::Finish(outcome) => self.finish(HERE, outcome)?,
            other => unreachable!("no order for a target: {other:?}"),
        }
        Ok(())
    }

    fn target_says(&mut self, message: Message) -> Result<(), Violation> {
        match message {
            Message::Running { .. } => {
                self.must_say("Running", Record::Taken)?;
                self.check_guest("said to run")?;
            }
            Message::Returned { .. } => self.must_say("Returned", Record::Returned)?,
            _ => {}
        }
        self.send(HERE, message);
        Ok(())
    }

    fn must_say(&self, said: &'static str, record: Record) -> Result<(), Violation> {
        let journal = self.at(HERE).journal;
        if journal == Some(record) {
            Ok(())
        } else {
            Err(Violation::SaidBeforeWritten { said, journal })
        }
    }

    /// Room is made for pages of guest RAM, each once, and only as long as the guest is not loaded. Now
    /// and then there is none.
    fn make_room(&mut self, room: &[(RegionIndex, PageRange)]) -> Result<(), Violation> {
        self.room.in_the_making = true;
        for &(region, range) in room {
            let new = self.room.pages.insert(region, range);
            let fits = new == Ok(range.count) && !range.is_empty();
            if !fits || self.load_released.is_some() {
                return Err(Violation::WildRoom { region, range });
            }
        }
        if self.fails() {
            self.failed(HERE, Thread::Lanes, Step::Pages);
        }
        Ok(())
    }

    pub(super) fn load_can_end(&self) -> bool {
        self.load_released.is_some() || self.at(HERE).lanes_closed || !self.at(HERE).vm.alive
    }

    /// A load that waited for RAM, or for its own end, goes on.
    pub(super) fn unpark(&mut self) {
        let worker = &mut self.end(HERE).workers[Thread::Vm as usize];
        if std::mem::take(&mut worker.parked) {
            let takes = self.rng.micros(self.plan.work_us.clone());
            self.after(takes, Event::Done(HERE, Thread::Vm));
        }
    }

    pub(super) fn target_does(&mut self, job: Job) -> Result<(), Violation> {
        let (thread, step) = (job.thread(), job.step());
        if let Job::Journal(record) = job {
            self.journal_lands(HERE, record);
            return Ok(());
        }
        let dead = !self.at(HERE).vm.alive;
        let fails = self.fails();
        match job {
            Job::Resume => self.resume(fails),
            Job::Quit if fails => {
                self.truth.excused = true;
                self.truth.silenced = true;
                self.failed(HERE, thread, step);
                Ok(())
            }
            Job::Quit => {
                self.end(HERE).vm.die();
                self.report(HERE, thread, Input::Quit);
                Ok(())
            }
            _ if dead || fails => {
                self.failed(HERE, thread, step);
                Ok(())
            }
            Job::Prepare => {
                self.report(HERE, thread, Input::Prepared);
                Ok(())
            }
            Job::Restore => {
                self.report(HERE, thread, Input::Restored);
                Ok(())
            }
            Job::Load => self.load(),
            other => unreachable!("no job of a target: {:?}", other.step()),
        }
    }

    fn load(&mut self) -> Result<(), Violation> {
        let whole = self.load_released.zip(self.state_at_target);
        let Some(((length, crc), device)) = whole else {
            self.failed(HERE, Thread::Vm, Step::Load);
            return Ok(());
        };
        if length != 8 || crc != check_sum(device) {
            self.failed(HERE, Thread::Vm, Step::Load);
            return Ok(());
        }
        self.check_load()?;
        self.end(HERE).vm.device = device;
        self.loaded = true;
        match self.flaw {
            Some(Flaw::RunUntold) => self.let_run(HERE, RunBy::Engine),
            Some(Flaw::ImaginedGo) => {
                let go = Message::Go { run: Run::Run };
                self.report(HERE, Thread::Vm, Input::Loaded);
                self.report(HERE, Thread::Vm, Input::Received(go));
                return Ok(());
            }
            _ => {}
        }
        self.report(HERE, Thread::Vm, Input::Loaded);
        Ok(())
    }

    fn resume(&mut self, fails: bool) -> Result<(), Violation> {
        let dead = !self.at(HERE).vm.alive;
        if !dead && !fails {
            self.let_run(HERE, RunBy::Engine);
            self.check_owners()?;
            self.check_guest("resumed")?;
            self.report(HERE, Thread::Vm, Input::Resumed);
            return Ok(());
        }
        let has_run = self.at(HERE).vm.has_run;
        let ran = if has_run || self.rng.percent(40) {
            MayHaveRun::Perhaps
        } else {
            MayHaveRun::No
        };
        if ran == MayHaveRun::Perhaps {
            self.truth.silenced = true;
            if !dead && self.rng.percent(50) {
                self.let_run(HERE, RunBy::Engine);
            }
        }
        let failure = Failure::new(Step::Resume, "so the seed has it");
        self.report(HERE, Thread::Vm, Input::NotResumed { ran, failure });
        Ok(())
    }

    /// The guest at the target is the guest that the source gave.
    fn check_guest(&self, when: &'static str) -> Result<(), Violation> {
        let vm = &self.at(HERE).vm;
        let settled =
            self.truth.spoilt || vm.power == Power::Off || when == "said to run" && vm.has_run;
        let Some((ram, device)) = self.truth.given.as_ref().filter(|_| !settled) else {
            return Ok(());
        };
        same_pages(when, ram, &vm.ram)?;
        if *device != vm.device {
            return Err(Violation::Device {
                source_state: *device,
                target: vm.device,
            });
        }
        Ok(())
    }

    /// A driver stops: nothing that the outcome claims may still be going on.
    pub(super) fn finish(&mut self, side: Side, outcome: Outcome) -> Result<(), Violation> {
        let unfinished = self
            .at(side)
            .workers
            .iter()
            .flat_map(|worker| &worker.queue)
            .find(|job| job.binds_the_end());
        if let Some(job) = unfinished {
            return Err(Violation::EndedEarly {
                side,
                job: job.step().to_string(),
            });
        }
        self.truth.late_fate |= side == Side::Source && self.unheard[HERE.other() as usize] > 0;
        self.note(|| format!("{side:?} ends: {:?}", Ending::of(&outcome)));
        self.hang_up(side);
        self.end(side).outcome = Some(outcome);
        Ok(())
    }
}
