//! The checks at work: what is overheard on the way, what is compared at every step and at the end.

use ferry_engine::core::message::{Command, GuestLeft, Input, Moment, Outcome, Phase, Record};
use ferry_engine::vmm::{GuestEvent, RunState};
use ferry_stream::message::{Message, Verdict};

use super::checks::{Ending, Violation, agree, same_pages};
use super::guest::{Power, RunBy};
use super::plan::{Reach, Side};
use super::world::World;

impl World {
    /// Notes what a machine is about to learn.
    pub(super) fn overhear(&mut self, side: Side, input: &Input) {
        match (side, input) {
            (_, Input::Guest(event)) => self.hear_event(side, event),
            (Side::Source, Input::Command(Command::SetDowntimeLimit(limit)))
                if self.source.phase() != Phase::Ended =>
            {
                self.truth.downtime_limit = Some(*limit);
            }
            (Side::Target, Input::Received(Message::Go { .. })) => {
                self.truth.go_heard |= self.truth.given.is_some();
                self.truth.spoilt |= self.unheard[Side::Target as usize] > 0;
            }
            (
                Side::Source,
                Input::Received(Message::Returned { .. })
                | Input::Answered(Some(Verdict::Refused | Verdict::Returned)),
            ) => {
                self.truth.given_back = true;
            }
            _ => {}
        }
    }

    fn hear_event(&mut self, side: Side, event: &GuestEvent) {
        let unheard = &mut self.unheard[side as usize];
        *unheard = unheard.saturating_sub(1);
        if side == Side::Target {
            return;
        }
        let given_away = self.truth.given.is_some() && !self.truth.given_back;
        match event {
            GuestEvent::Reset => {}
            // A second owner is paused again, whatever the stranger wanted.
            GuestEvent::ForeignResume if given_away => {}
            GuestEvent::ForeignResume => self.truth.wanted = Some(RunState::Running),
            _ => self.truth.wanted = Some(RunState::Paused),
        }
    }

    /// One owner, at every step, and none that is slow while it is handed over.
    pub(super) fn check_owners(&self) -> Result<(), Violation> {
        let runs = |side: Side| {
            let vm = &self.at(side).vm;
            vm.runs() && vm.run_by == RunBy::Engine
        };
        if runs(Side::Source) && runs(Side::Target) {
            return Err(Violation::TwoRun);
        }
        if self.truth.paused_slow {
            return Err(Violation::PausedSlow);
        }
        if runs(Side::Source) && self.truth.given.is_some() && !self.truth.given_back {
            return Err(Violation::SourceRanAfterGo);
        }
        if runs(Side::Target) {
            if !self.truth.go_heard {
                return Err(Violation::RanWithoutGo);
            }
            let journal = self.at(Side::Target).journal;
            if journal != Some(Record::Taken) {
                return Err(Violation::RanBeforeTaken { journal });
            }
        }
        Ok(())
    }

    /// Loading the device state may read any page: RAM must be complete by then.
    pub(super) fn check_load(&self) -> Result<(), Violation> {
        let undisturbed = self.source.phase() == Phase::Offering
            && self.unheard[Side::Source as usize] == 0
            && !self.truth.spoilt;
        if !undisturbed {
            return Ok(());
        }
        let (source, target) = (&self.at(Side::Source).vm, &self.at(Side::Target).vm);
        same_pages("loaded", &source.ram, &target.ram)
    }

    pub(super) fn check_end(&self) -> Result<(), Violation> {
        let outcomes = (
            &self.at(Side::Source).outcome,
            &self.at(Side::Target).outcome,
        );
        let (Some(source), Some(target)) = outcomes else {
            return Ok(());
        };
        if !agree(Ending::of(source), Ending::of(target)) {
            return Err(Violation::Contradiction {
                source_end: format!("{source:?}"),
                target_end: format!("{target:?}"),
            });
        }
        let can_ask = self.plan.reach == Reach::Always && !self.truth.silenced;
        if can_ask && Ending::of(source) == Ending::InDoubt {
            return Err(Violation::NeedlessDoubt);
        }
        if let Outcome::Kept { guest, .. } = source {
            self.check_kept(guest)?;
        }
        self.check_told()?;
        self.check_left_behind(source, target)
    }

    /// What somebody who steers the source is told.
    fn check_told(&self) -> Result<(), Violation> {
        let told = self.source.progress(Moment(self.now));
        let (wanted, holds) = (self.truth.downtime_limit, told.downtime_limit);
        if let Some(wanted) = wanted.filter(|wanted| *wanted != holds) {
            return Err(Violation::Disobeyed { wanted, holds });
        }
        let source = self.at(Side::Source).outcome.as_ref();
        let kept = source.is_some_and(|outcome| Ending::of(outcome) == Ending::Kept);
        if kept == told.given_away {
            let told = told.given_away;
            return Err(Violation::GivenAwayWrongly { told });
        }
        Ok(())
    }

    fn check_kept(&self, left: &GuestLeft) -> Result<(), Violation> {
        let vm = &self.at(Side::Source).vm;
        if vm.alive && vm.slowed > 0 && !self.truth.excused {
            let percent = vm.slowed;
            return Err(Violation::LeftSlow { percent });
        }
        if self.truth.late_fate || vm.power == Power::Off || matches!(left, GuestLeft::Damaged(_)) {
            return Ok(());
        }
        let state = if vm.runs() {
            RunState::Running
        } else {
            RunState::Paused
        };
        let told = match left {
            GuestLeft::As(told) => *told,
            _ => state,
        };
        if self.truth.wanted == Some(state) && told == state {
            return Ok(());
        }
        Err(Violation::NotAsWanted {
            left: format!("{state:?}, said to be {left:?}"),
            wanted: format!("{:?}", self.truth.wanted),
        })
    }

    fn check_left_behind(&self, source: &Outcome, target: &Outcome) -> Result<(), Violation> {
        let (here, there) = (self.at(Side::Source), self.at(Side::Target));
        let ended = matches!(
            target,
            Outcome::Kept {
                guest: GuestLeft::Ended,
                ..
            }
        );
        let moved = matches!(source, Outcome::Moved);
        let leftovers = [
            (self.tracker.watches(), "tracking"),
            (!self.lanes.is_empty() && !here.lanes_closed, "page lanes"),
            (moved && here.vm.alive, "the source's VMM"),
            (ended && there.vm.alive, "the target's VMM"),
        ];
        match leftovers
            .iter()
            .find(|(left, _)| *left && !self.truth.excused)
        {
            Some((_, what)) => Err(Violation::LeftBehind { what }),
            None => Ok(()),
        }
    }
}
