//! The control lane, cuts of every kind, and questions on connections of their own.

use std::time::Duration;

use ferry_engine::core::message::{Input, Inquirer};
use ferry_stream::message::{Message, Verdict};

use super::checks::Violation;
use super::event::Event;
use super::flaw::Flaw;
use super::guest::RunBy;
use super::plan::{Reach, Side};
use super::worker::Thread;
use super::world::World;

/// A lost control lane, as a side notices it.
pub(super) const CONTROL_LANE: &str = "the control lane is gone";

/// How long a question waits for its answer.
const ASK_TAKES: Duration = Duration::from_millis(20);

impl World {
    pub(super) fn send(&mut self, from: Side, message: Message) {
        let (now, wire) = (self.now, self.plan.wire_us.clone());
        let mut rng = self.rng.clone();
        let arrives = self.end(from).pipe.send(now, &mut rng, &wire);
        self.rng = rng;
        if let Some(at) = arrives {
            self.schedule(at, Event::Arrives(from.other(), message));
        }
    }

    pub(super) fn arrives(&mut self, side: Side, message: Message) -> Result<(), Violation> {
        let delivered = self.at(side.other()).pipe.delivers(self.now);
        if !delivered || !self.at(side).reading {
            return Ok(());
        }
        if let Message::State { bytes, .. } = &message {
            let device = bytes.as_ref().try_into().map(u64::from_le_bytes);
            self.state_at_target = device.ok();
            return Ok(());
        }
        self.tell(side, Input::Received(message))
    }

    pub(super) fn notices(&mut self, side: Side, what: &'static str) -> Result<(), Violation> {
        let end = self.end(side);
        if end.outcome.is_some() {
            return Ok(());
        }
        if !std::mem::replace(&mut end.reading, false) {
            return Ok(());
        }
        let given_away = self.truth.given.is_some() && !self.truth.given_back;
        if side == Side::Source && given_away && self.flaw == Some(Flaw::RunAgain) {
            self.let_run(side, RunBy::Engine);
        }
        let what = what.to_owned();
        self.tell(side, Input::LinkLost { what })
    }

    pub(super) fn cut_control(&mut self) {
        for side in [Side::Source, Side::Target] {
            let now = self.now;
            let mut rng = self.rng.clone();
            let ends = self.end(side).pipe.cut(now, &mut rng);
            self.rng = rng;
            let noticed = ends.max(now) + self.rng.micros(self.plan.notice_us.clone());
            self.schedule(noticed, Event::Notices(side.other(), CONTROL_LANE));
        }
    }

    pub(super) fn cut_lanes(&mut self) {
        self.lanes_cut = true;
        for at in 0..self.lanes.len() {
            if !self.lanes[at].pipe.stands() {
                continue;
            }
            let ends = self.lanes[at].pipe.cut(self.now, &mut self.rng);
            for side in [Side::Source, Side::Target] {
                let notice = self.rng.micros(self.plan.notice_us.clone());
                self.schedule(ends + notice, Event::LaneNotices(side, at));
            }
        }
    }

    /// A side closes its control lane: what it has said still arrives.
    pub(super) fn hang_up(&mut self, side: Side) {
        let now = self.now;
        let end = self.end(side);
        end.reading = false;
        let last = end.pipe.close(now);
        let wire = self.rng.micros(self.plan.wire_us.clone());
        self.schedule(last + wire, Event::Notices(side.other(), CONTROL_LANE));
        if side == Side::Target
            && let Some(id) = self.asking
        {
            self.after(wire * 2, Event::AskEnds(id, None));
        }
    }

    /// The source connects anew and asks.
    pub(super) fn ask(&mut self) {
        self.asked += 1;
        let id = self.asked;
        self.asking = Some(id);
        let wire = self.rng.micros(self.plan.wire_us.clone());
        if self.reaches() {
            self.after(wire, Event::AskArrives(id));
            self.after(ASK_TAKES, Event::AskEnds(id, None));
        } else {
            self.after(wire, Event::AskEnds(id, None));
        }
    }

    fn reaches(&mut self) -> bool {
        let now = self.now;
        match self.plan.reach {
            Reach::Always => true,
            Reach::Never => false,
            Reach::Later(span) => now >= *self.reachable_from.get_or_insert(now + span),
        }
    }

    pub(super) fn ask_arrives(&mut self, id: u64) {
        if self.at(Side::Target).outcome.is_some() {
            let wire = self.rng.micros(self.plan.wire_us.clone());
            self.after(wire, Event::AskEnds(id, None));
        } else {
            self.report(Side::Target, Thread::Reader, Input::Inquired(Inquirer(id)));
        }
    }

    /// The target answers; on a bad network the answer itself may be lost.
    pub(super) fn answer(&mut self, id: u64, verdict: Verdict) {
        let lost = self.plan.reach != Reach::Always && self.rng.once_in(4);
        if !lost {
            let wire = self.rng.micros(self.plan.wire_us.clone());
            self.after(wire, Event::AskEnds(id, Some(verdict)));
        }
    }

    pub(super) fn ask_ends(&mut self, id: u64, verdict: Option<Verdict>) -> Result<(), Violation> {
        if self.asking != Some(id) {
            return Ok(());
        }
        self.asking = None;
        self.tell(Side::Source, Input::Answered(verdict))
    }
}
