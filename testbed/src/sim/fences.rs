//! Lanes that are opened, die, hang, are fenced and reclaimed.

use std::ops::RangeInclusive;

use ferry_engine::core::message::{Failure, Input, LaneSeen, Reclaimed, Step};
use ferry_engine::core::pageset::PageSet;
use ferry_stream::message::LaneId;

use super::event::Event;
use super::flaw::Flaw;
use super::guest::{Content, add};
use super::link::{Frame, Lane, Told};
use super::plan::Side;
use super::worker::Thread;
use super::world::World;

/// One frame in so many is half in place when its lane ends in the middle of it.
const HALF_PLACED: u64 = 2;

/// How late frames are with [`Flaw::FencedInName`], in microseconds.
const LATE_US: RangeInclusive<u64> = 50..=20_000;

impl World {
    /// The source opens a connection and says hello on it.
    pub(super) fn open_lane(&mut self, id: LaneId) {
        let mut lane = Lane::new(id);
        if self.lanes_cut {
            lane.pipe.cut(self.now, &mut self.rng);
        }
        let wire = self.plan.wire_us.clone();
        let arrives = lane.pipe.send(self.now, &mut self.rng, &wire);
        self.lanes.push(lane);
        let at = self.lanes.len() - 1;
        let arrives = arrives.unwrap_or(self.now + self.rng.micros(wire));
        self.schedule(arrives, Event::LaneHello(at));
    }

    /// A hello arrives. The answer may be lost though the lane was let in.
    pub(super) fn lane_hello(&mut self, at: usize) {
        let arrives = self.lanes[at].pipe.delivers(self.now);
        let serves = !self.lanes_cut && self.at(Side::Target).outcome.is_none();
        let id = self.lanes[at].id;
        let welcome = arrives && serves && self.target.enlist(id).is_ok();
        self.note(|| format!("hello of {id}: welcome {welcome}"));
        self.lanes[at].receiver.over = !welcome;
        let wire = self.rng.micros(self.plan.wire_us.clone());
        let answered = welcome && !self.fails();
        self.after(wire, Event::LaneAnswered(at, answered));
    }

    pub(super) fn lane_answered(&mut self, at: usize, welcome: bool) {
        let (id, cut) = (self.lanes[at].id, self.lanes[at].sender.cut);
        let stands = welcome && self.lanes[at].pipe.stands();
        let fact = match stands {
            _ if cut => return,
            true => Input::LaneOpen(id),
            false => Input::LaneUnopened {
                lane: id,
                failure: Failure::new(Step::OpenLanes, "so the seed has it"),
            },
        };
        self.report(Side::Source, Thread::Opener, fact);
    }

    fn lane_of(&self, id: LaneId) -> Option<usize> {
        self.lanes.iter().position(|lane| lane.id == id)
    }

    pub(super) fn join_lane(&mut self, id: LaneId) {
        if let Some(at) = self.lane_of(id) {
            self.lanes[at].sender.joined = true;
            self.work(at);
        }
    }

    /// The source closes a lane. What is on its way may arrive, or not.
    pub(super) fn cut_lane(&mut self, id: LaneId) {
        let Some(at) = self.lane_of(id) else { return };
        self.lanes[at].sender.cut = true;
        let ends = self.lanes[at].pipe.cut(self.now, &mut self.rng);
        let notice = self.rng.micros(self.plan.notice_us.clone());
        self.schedule(ends + notice, Event::LaneNotices(Side::Target, at));
    }

    /// What is in place of what a dead lane took, by the log of its worker.
    pub(super) fn reclaim(&mut self, id: LaneId, frames: u64, mut into: PageSet) {
        let mut from = Reclaimed::nothing(PageSet::clone(&into));
        if let Some(at) = self.lane_of(id) {
            let sender = &self.lanes[at].sender;
            let came = usize::try_from(frames.saturating_sub(sender.first)).unwrap_or(usize::MAX);
            let (placed, missing) = sender.log.split_at(came.min(sender.log.len()));
            let skipped = usize::from(self.flaw == Some(Flaw::ForgottenChunk));
            for logged in missing.iter().skip(skipped) {
                let range = logged.chunk.range;
                for page in range.first.0..range.end().0 {
                    add(&mut into, logged.chunk.region, page);
                }
            }
            from.round = sender.round;
            from.placed = placed.iter().map(|logged| logged.told).sum();
            let ended = sender.ended && frames == sender.frames;
            from.since_end = if ended { 0 } else { from.placed };
            from.found = into;
        }
        let fact = Input::Reclaimed { lane: id, from };
        self.report(Side::Source, Thread::Lanes, fact);
    }

    /// The target ends a worker, which may be in the middle of a frame.
    pub(super) fn end_lane(&mut self, id: LaneId) {
        let Some(at) = self.lanes.iter().position(|lane| lane.id == id) else {
            return;
        };
        self.lanes[at].receiver.ending = true;
        if self.flaw == Some(Flaw::FencedInName) {
            self.tell_ended(at);
            for frame in std::mem::take(&mut self.lanes[at].receiver.arrived) {
                let late = self.rng.micros(LATE_US);
                self.after(late, Event::LanePlaces(at, Some(frame)));
            }
            return;
        }
        let takes = self.rng.micros(1..=self.plan.work_us.start() * 4);
        self.after(takes, Event::LaneEnds(at));
    }

    pub(super) fn lane_ends(&mut self, at: usize) {
        let receiver = &mut self.lanes[at].receiver;
        if receiver.over {
            return;
        }
        receiver.over = true;
        let half = receiver.arrived.pop_front();
        if let (Some(Flaw::FramesClaimed), Some(Frame::Pages { told, .. })) = (self.flaw, &half) {
            receiver.frames += 1;
            receiver.pages += told.len() as u64;
        }
        if let Some(Frame::Pages { region, told, .. }) = half
            && self.rng.once_in(HALF_PLACED)
            && self.at(Side::Target).vm.alive
        {
            let half: Vec<_> = told
                .iter()
                .map(|(page, told)| match told {
                    Told::Whole(content) => (*page, Told::Whole(content.torn())),
                    Told::Shared => (*page, Told::Whole(Content::ZERO.torn())),
                    // It is checked before it is placed.
                    Told::Delta { .. } => (*page, *told),
                })
                .collect();
            // Before Go nothing has run.
            drop(self.place(region, &half));
        }
        self.tell_ended(at);
    }

    fn tell_ended(&mut self, at: usize) {
        let (lane, receiver) = (self.lanes[at].id, &self.lanes[at].receiver);
        let (frames, pages) = (receiver.frames, receiver.pages);
        let fact = Input::LaneEnded {
            lane,
            frames,
            pages,
        };
        self.report(Side::Target, Thread::Lanes, fact);
    }

    pub(super) fn look_at_lanes(&mut self) {
        let here = self.lanes.iter().filter(|lane| !lane.receiver.over);
        let seen = here.map(|lane| LaneSeen {
            lane: lane.id,
            bytes: lane.receiver.seen,
        });
        let fact = Input::LanesSeen(seen.collect());
        self.report(Side::Target, Thread::Lanes, fact);
    }

    /// One page lane dies. One side notices at least.
    pub(super) fn kill_lane(&mut self) {
        let Some(at) = self.some_lane() else { return };
        let ends = self.lanes[at].pipe.cut(self.now, &mut self.rng);
        let who = self.rng.pick(&[
            &[Side::Source][..],
            &[Side::Target],
            &[Side::Source, Side::Target],
        ]);
        for side in who {
            let notice = self.rng.micros(self.plan.notice_us.clone());
            self.schedule(ends + notice, Event::LaneNotices(*side, at));
        }
    }

    /// One page lane hangs: what is sent on it is lost, and nobody is told.
    pub(super) fn hang_lane(&mut self) {
        if let Some(at) = self.some_lane() {
            self.lanes[at].pipe.cut(self.now, &mut self.rng);
        }
    }

    /// A frame comes with wrong bytes.
    pub(super) fn corrupt_lane(&mut self) {
        if let Some(at) = self.some_lane() {
            self.lanes[at].receiver.over = true;
            self.failed(Side::Target, Thread::Lanes, Step::Pages);
        }
    }

    fn some_lane(&mut self) -> Option<usize> {
        let stands = |at: &usize| self.lanes[*at].pipe.stands();
        let standing: Vec<usize> = (0..self.lanes.len()).filter(stands).collect();
        (!standing.is_empty()).then(|| self.rng.pick(&standing))
    }

    /// A side notices that a lane is gone, if it did not end it itself.
    pub(super) fn lane_notices(&mut self, side: Side, at: usize) {
        let lane = &self.lanes[at];
        let known = match side {
            Side::Source => lane.sender.cut || !lane.sender.joined,
            Side::Target => lane.receiver.over || lane.receiver.ending,
        };
        if known || self.at(side).outcome.is_some() {
            return;
        }
        let fact = Input::LaneLost {
            lane: lane.id,
            what: "so the seed has it".to_owned(),
        };
        self.report(side, Thread::Lanes, fact);
    }
}
