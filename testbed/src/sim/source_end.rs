//! The source's driver: carries out orders on the simulated VM, tracker, journal and lanes.

use bytes::Bytes;
use ferry_engine::core::layout::RegionIndex;
use ferry_engine::core::message::{Action, Failure, Input, Moment, Record, Step};
use ferry_engine::vmm::{Inventory, RunState};
use ferry_stream::message::Message;

use super::checks::Violation;
use super::flaw::Flaw;
use super::guest::{Content, Power, RunBy};
use super::link::Feed;
use super::plan::Side;
use super::worker::{Job, Thread};
use super::world::World;

const HERE: Side = Side::Source;

impl World {
    pub(super) fn source_action(&mut self, action: Action) -> Result<(), Violation> {
        match action {
            Action::Send(message) => self.source_says(message)?,
            Action::OpenLane(lane) => self.open_lane(lane),
            Action::JoinLane(lane) => self.join_lane(lane),
            Action::CutLane(lane) => self.cut_lane(lane),
            Action::Reclaim { lane, frames, into } => self.reclaim(lane, frames, into),
            Action::StartTracking { .. } => {
                self.scanned = Some(Feed::open());
                self.order(HERE, Job::StartTracking);
            }
            Action::OpenState => self.order(HERE, Job::OpenState),
            Action::Collect { into } => self.order(HERE, Job::Collect(Some(into))),
            Action::Scan { rearm, with } => {
                self.scanned = Some(Feed::open());
                self.order(HERE, Job::Scan(rearm, with));
            }
            Action::Copy {
                round,
                pages,
                zeros,
                rewritten,
                deltas,
                ..
            } => self.copy(round, &pages, zeros, rewritten, deltas),
            Action::Flush => self.order(HERE, Job::Flush),
            Action::Throttle(percent) => self.order(HERE, Job::Throttle(percent)),
            Action::Pause(_) => self.order(HERE, Job::Pause),
            Action::Inventory => self.order(HERE, Job::Inventory),
            Action::Save => self.order(HERE, Job::Save),
            Action::Ask => self.ask(),
            Action::Undo { guest } => {
                self.truth.undoing = true;
                self.truth.late_fate |= self.unheard[HERE as usize] > 0;
                self.order(HERE, Job::Undo(guest));
            }
            Action::Retire => self.order(HERE, Job::Retire),
            Action::StopTracking => self.order(HERE, Job::StopTracking),
            Action::CloseLanes => self.close_lanes(HERE),
            Action::Journal(record) => self.write_journal(HERE, record)?,
            Action::Tell(_) | Action::Unpace | Action::Pace => {}
            Action::Finish(outcome) => self.finish(HERE, outcome)?,
            other => unreachable!("no order for a source: {other:?}"),
        }
        Ok(())
    }

    fn source_says(&mut self, message: Message) -> Result<(), Violation> {
        if matches!(message, Message::Complete { .. }) {
            self.check_last_round()?;
        }
        if matches!(message, Message::Go { .. }) {
            let journal = self.at(HERE).journal;
            if journal != Some(Record::Given) {
                return Err(Violation::GoBeforeGiven { journal });
            }
            let vm = &self.at(HERE).vm;
            self.truth.given = Some((vm.ram.clone(), vm.device));
            self.truth.spoilt |= self.unheard[HERE as usize] > 0;
        }
        self.send(HERE, message);
        Ok(())
    }

    /// What happens as soon as a thread turns to its next job.
    pub(super) fn source_begins(&mut self, thread: Thread) {
        let in_name = self.flaw == Some(Flaw::GivenInName);
        let worker = &mut self.end(HERE).workers[thread as usize];
        match worker.queue.front_mut() {
            Some(Job::Collect(into)) => {
                if let Some(into) = into.take() {
                    self.tracker.begin_collection(&mut self.rng, into);
                }
            }
            Some(Job::StartTracking | Job::Scan(..)) => self.begin_scan(),
            Some(Job::Save) => self.device_writes(1),
            Some(Job::Journal(Record::Given)) if in_name => {
                self.report(HERE, thread, Input::Journaled(Record::Given));
            }
            _ => {}
        }
    }

    pub(super) fn source_does(&mut self, job: Job) {
        let thread = job.thread();
        let dead = !self.at(HERE).vm.alive && thread == Thread::Vm;
        if let Job::Journal(record) = job {
            self.journal_lands(HERE, record);
            return;
        }
        if dead || self.fails() {
            self.source_fails(&job);
            return;
        }
        let fact = match job {
            Job::OpenState => Input::StateOpen,
            Job::Throttle(percent) => self.throttle(percent),
            Job::Pause => self.pause_source(),
            Job::Inventory => Input::Inventoried(Box::new(self.inventory_now())),
            Job::Save => self.save(),
            Job::Undo(guest) => self.undo(guest),
            Job::Retire => {
                self.end(HERE).vm.die();
                Input::Retired
            }
            Job::StartTracking => {
                let handed_on = self.end_scan(&job);
                self.report(HERE, thread, Input::Populated(self.populated()));
                Input::Tracking(handed_on)
            }
            Job::Scan(..) => Input::Scanned(self.end_scan(&job)),
            Job::Collect(_) => self.collected(),
            Job::StopTracking => {
                if self.flaw != Some(Flaw::LeftBehind) {
                    self.tracker.stop();
                }
                Input::TrackingStopped
            }
            Job::Flush => Input::Flushed,
            other => unreachable!("no job of a source: {:?}", other.step()),
        };
        self.report(HERE, thread, fact);
    }

    /// A job that fails may have had its effect all the same.
    fn source_fails(&mut self, job: &Job) {
        let (thread, step) = (job.thread(), job.step());
        match job {
            Job::Undo(_) => {
                let failure = Failure::new(step, "so the seed has it");
                self.truth.excused = true;
                self.report(HERE, thread, Input::Undone(Err(failure)));
                return;
            }
            Job::Throttle(percent) => {
                if self.rng.percent(50) {
                    self.end(HERE).vm.slowed = *percent;
                }
                // It says so, and nobody can do more before everything is put back.
                self.truth.lift_failed = *percent == 0;
            }
            Job::Pause if self.rng.percent(50) => self.end(HERE).vm.pause(),
            Job::Save => self.device_writes(1),
            // What it has handed on is on its way.
            Job::StartTracking | Job::Scan(..) => self.parts.clear(),
            Job::Retire | Job::StopTracking => self.truth.excused = true,
            Job::Collect(_) => drop(self.tracker.end_collection()),
            _ => {}
        }
        self.failed(HERE, thread, step);
    }

    fn throttle(&mut self, percent: u8) -> Input {
        let in_name = match self.flaw {
            Some(Flaw::LiftInName) => percent == 0,
            Some(Flaw::LeftSlow) => percent == 0 && self.truth.undoing,
            _ => false,
        };
        if !in_name {
            self.end(HERE).vm.slowed = percent;
        }
        self.truth.lift_failed = false;
        Input::Throttled(percent)
    }

    fn pause_source(&mut self) -> Input {
        self.truth.paused_slow |= self.at(HERE).vm.slowed > 0 && !self.truth.lift_failed;
        if self.flaw != Some(Flaw::PauseInName) {
            self.end(HERE).vm.pause();
        }
        // I/O that was under way lands before the pause is over.
        let landing = self.rng.below(3);
        self.device_writes(landing);
        Input::Paused {
            at: Moment(self.now),
            drained: Moment(self.now),
        }
    }

    fn inventory_now(&self) -> Inventory {
        let mut inventory = self.inventory.clone();
        if self.plugged {
            inventory.devices.push("another counter".into());
        }
        inventory
    }

    /// Saves the counter, and writes RAM while it does, as devices may.
    fn save(&mut self) -> Input {
        let writes = self.rng.below(3);
        self.device_writes(writes);
        let device = self.at(HERE).vm.device;
        let bytes = Bytes::copy_from_slice(&device.to_le_bytes());
        let length = bytes.len() as u64;
        self.send(HERE, Message::State { offset: 0, bytes });
        Input::Saved {
            bytes: length,
            crc: check_sum(device),
        }
    }

    fn device_writes(&mut self, count: u64) {
        let saving = self.at(HERE).workers[Thread::Vm as usize]
            .queue
            .front()
            .is_none_or(|job| matches!(job, Job::Save));
        for _ in 0..count {
            if self.at(HERE).vm.power == Power::Off {
                return;
            }
            self.writes += 1;
            let write = Content(self.writes);
            let (region, page) = self.write_at_source(write);
            if !(saving && self.flaw == Some(Flaw::EarlyLastCollection)) {
                self.wrote((region, page));
            }
        }
    }

    /// Puts the source back, and lets the guest run if that is wanted.
    fn undo(&mut self, guest: RunState) -> Input {
        if self.flaw != Some(Flaw::LeftSlow) {
            self.end(HERE).vm.slowed = 0;
        }
        match guest {
            RunState::Running => self.let_run(HERE, RunBy::Engine),
            RunState::Paused => self.end(HERE).vm.pause(),
        }
        Input::Undone(Ok(if self.at(HERE).vm.runs() {
            RunState::Running
        } else {
            RunState::Paused
        }))
    }

    fn collected(&mut self) -> Input {
        let mut found = self
            .tracker
            .end_collection()
            .expect("the collection has begun: a thread does one job after the other");
        let first = found.ranges().next();
        if let (Some(Flaw::ForgottenPage), Some((region, mut range))) = (self.flaw, first) {
            range.count = 1;
            found.remove(region, range).expect("it is in the set");
        }
        // A fact that nobody waits for comes in its place.
        if self.flaw == Some(Flaw::LostFact) {
            return Input::StateOpen;
        }
        Input::Collected { found }
    }

    /// A page of the source's guest was written.
    pub(super) fn wrote(&mut self, (region, page): (RegionIndex, u64)) {
        if self.flaw == Some(Flaw::UnseenWrite) && self.rng.once_in(4) {
            return;
        }
        self.tracker.wrote(region, page);
    }

    pub(super) fn write_journal(&mut self, side: Side, record: Record) -> Result<(), Violation> {
        let before = self.end(side).journal_told.replace(record);
        if !super::checks::journal_may_follow(side, before, record) {
            return Err(Violation::JournalOrder {
                side,
                before,
                next: record,
            });
        }
        self.order(side, Job::Journal(record));
        Ok(())
    }

    /// A record is written, or not, or nobody can say.
    pub(super) fn journal_lands(&mut self, side: Side, record: Record) {
        let fails = self.fails();
        if !fails || self.rng.percent(50) {
            self.end(side).journal = Some(record);
        }
        if fails {
            self.truth.silenced |= side == Side::Target;
            self.failed(side, Thread::Journal, Step::Journal);
        } else if !self.told_already(record) {
            self.report(side, Thread::Journal, Input::Journaled(record));
        }
    }

    fn told_already(&self, record: Record) -> bool {
        matches!(
            (self.flaw, record),
            (Some(Flaw::GivenInName), Record::Given) | (Some(Flaw::TakenInName), Record::Taken)
        )
    }
}

impl World {
    fn write_at_source(&mut self, write: Content) -> (RegionIndex, u64) {
        let mut rng = self.rng.clone();
        let place = self.end(HERE).vm.write(&mut rng, write);
        self.rng = rng;
        place
    }
}

/// Stands for the CRC of the device state.
pub(super) fn check_sum(device: u64) -> u32 {
    u32::try_from(device & 0xffff_ffff).expect("it is masked") ^ 0x5a5a_5a5a
}
