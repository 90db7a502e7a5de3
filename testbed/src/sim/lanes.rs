//! Page workers at both ends. Contents are copied here, while the guest writes, and never by the
//! machines.

use std::mem;
use std::time::Duration;

use ferry_engine::core::message::{Deltas, Input, Pages, Rewritten, ZeroPages};
use ferry_stream::message::Round;

use super::checks::Violation;
use super::event::Event;
use super::flaw::Flaw;
use super::guest::Content;
use super::link::{Chunk, Feed, Frame, LaneJob, Logged, Queue, Reading, Told};
use super::plan::Side;
use super::worker::Thread;
use super::world::World;

/// The target's worker is held up in the middle of one frame in so many.
const BLOCKED: u64 = 100;

/// And then takes so many times as long.
const BLOCKED_TIMES: u32 = 50;

/// How late pages are with [`Flaw::EndBeforePages`].
const LATE: Duration = Duration::from_millis(3);

impl World {
    /// Offers the pages of a round to the lanes that take part.
    pub(super) fn copy(
        &mut self,
        round: Round,
        pages: &Pages,
        zeros: ZeroPages,
        rewritten: Rewritten,
        deltas: Deltas,
    ) {
        self.begin_deltas(deltas);
        let zeros = match self.flaw {
            Some(Flaw::ZerosSkipped) => ZeroPages::Skip,
            _ => zeros,
        };
        let mut feed = Feed::open();
        match pages {
            Pages::Known(pages) => {
                for (region, range) in pages.ranges() {
                    feed.add(region, range);
                }
                feed.open = false;
            }
            // What the scan has handed on by now, and where it goes on.
            Pages::Scanned => feed = self.scanned.take().expect("a scan was ordered before"),
        }
        self.queue = Some(Queue {
            round,
            zeros,
            rewritten,
            deltas,
            feed,
        });
        self.work_on();
    }

    /// There may be something to do for every lane.
    pub(super) fn work_on(&mut self) {
        for lane in 0..self.lanes.len() {
            self.work(lane);
        }
    }

    /// A worker turns to its next job: reading begins now, and ends later.
    pub(super) fn work(&mut self, lane: usize) {
        let Some(queue) = &mut self.queue else { return };
        let sender = &mut self.lanes[lane].sender;
        if sender.cut || !sender.joined || sender.job.is_some() {
            return;
        }
        if sender.round < queue.round {
            sender.round = queue.round;
            sender.ended = false;
            sender.first = sender.frames;
            sender.log.clear();
        }
        if sender.ended {
            return;
        }
        let waits = queue.feed.open && self.flaw != Some(Flaw::EndBeforeScan);
        let job = match queue.feed.chunks.pop_front() {
            Some(chunk) => {
                sender.log.push(Logged { chunk, told: 0 });
                let (zeros, rewritten) = (queue.zeros, queue.rewritten);
                LaneJob::Copy(chunk, zeros, self.readings(chunk, rewritten))
            }
            None if waits => return,
            None => LaneJob::End(queue.round),
        };
        self.lanes[lane].sender.job = Some(job);
        let takes = self.rng.micros(1..=self.plan.work_us.start() * 4);
        self.after(takes, Event::LaneSent(lane));
    }

    /// A worker looks which pages were written again, and begins to read the others.
    fn readings(&mut self, chunk: Chunk, rewritten: Rewritten) -> Vec<Reading> {
        // It does not look at every chunk.
        let looks = rewritten == Rewritten::LeaveOut && self.rng.once_in(2);
        let pages = chunk.range.first.0..chunk.range.end().0;
        let mut readings = Vec::new();
        for (page, before) in pages.zip(self.contents(chunk)) {
            let left_out = looks && self.tracker.is_written(chunk.region, page);
            if left_out && self.flaw == Some(Flaw::LeftOutForGood) {
                self.tracker.forget(chunk.region, page);
            }
            readings.push(Reading { before, left_out });
        }
        readings
    }

    fn contents(&self, Chunk { region, range }: Chunk) -> Vec<Content> {
        let ram = &self.at(Side::Source).vm.ram;
        (range.first.0..range.end().0)
            .map(|page| ram.page(region, page))
            .collect()
    }

    pub(super) fn lane_sent(&mut self, lane: usize) {
        if self.lanes[lane].sender.cut {
            return;
        }
        match self.lanes[lane].sender.job.take() {
            Some(LaneJob::Copy(chunk, zeros, reads)) => {
                self.send_pages(lane, chunk, zeros, &reads);
            }
            Some(LaneJob::End(round)) => self.send_end(lane, round),
            None => return,
        }
        self.work(lane);
    }

    /// Sends what a copy holds that was begun with `reads` and ends now.
    fn send_pages(&mut self, lane: usize, chunk: Chunk, zeros: ZeroPages, reads: &[Reading]) {
        let after = self.contents(chunk);
        let mut told = Vec::new();
        for (page, (read, after)) in (chunk.range.first.0..).zip(reads.iter().zip(after)) {
            if read.left_out {
                self.totals.fresh_pages += 1;
                continue;
            }
            if self.plan.shares() {
                told.push((page, Told::Shared));
                continue;
            }
            let content = if read.before == after {
                after
            } else {
                after.torn()
            };
            let zero = content == Content::ZERO;
            self.totals.zero_pages += u64::from(zero);
            let how = self.tell_page(lane, (chunk.region, page), content);
            if zero && zeros == ZeroPages::Skip {
                self.totals.skipped_pages += 1;
            } else {
                told.push((page, how));
            }
        }
        let count = told.len() as u64;
        self.totals.pages += count;
        self.totals.bytes += count * self.plan.page_bytes;
        if self.rng.once_in(4) {
            let totals = self.totals;
            // Read off a counter by somebody else than the lanes: it may come late.
            self.report(Side::Source, Thread::Reader, Input::Sent(totals));
        }
        let log = &mut self.lanes[lane].sender.log;
        match log.last_mut() {
            // Nothing to tell is no frame.
            _ if count == 0 => drop(log.pop()),
            Some(logged) => logged.told = count,
            None => {}
        }
        if count > 0 {
            let pages = Frame::Pages {
                round: self.lanes[lane].sender.round,
                region: chunk.region,
                told,
            };
            self.put_on_lane(lane, pages);
        }
    }

    fn send_end(&mut self, lane: usize, round: Round) {
        let sender = &mut self.lanes[lane].sender;
        sender.ended = true;
        let pages = sender.log.iter().map(|logged| logged.told).sum();
        let id = self.lanes[lane].id;
        self.put_on_lane(lane, Frame::End { round, pages });
        let fact = Input::LaneSent {
            lane: id,
            round,
            pages,
            totals: self.totals,
        };
        self.report(Side::Source, Thread::Lanes, fact);
    }

    fn put_on_lane(&mut self, lane: usize, frame: Frame) {
        self.lanes[lane].sender.frames += 1;
        let wire = self.plan.wire_us.clone();
        let arrives = self.lanes[lane].pipe.send(self.now, &mut self.rng, &wire);
        if let Some(at) = arrives {
            self.schedule(at, Event::LaneArrives(lane, frame));
        }
    }

    pub(super) fn lane_arrives(&mut self, lane: usize, frame: Frame) {
        let taken = self.lanes[lane].pipe.delivers(self.now)
            && !self.at(Side::Target).lanes_closed
            && !self.lanes[lane].receiver.ending;
        if !taken {
            return;
        }
        let mut takes = self.rng.micros(1..=self.plan.work_us.start() * 4);
        if self.rng.once_in(BLOCKED) {
            takes *= BLOCKED_TIMES;
        }
        let late = self.flaw == Some(Flaw::EndBeforePages) && matches!(frame, Frame::Pages { .. });
        let receiver = &mut self.lanes[lane].receiver;
        receiver.seen += 1;
        receiver.placed = receiver.placed.max(self.now) + takes;
        let at = receiver.placed;
        if late {
            self.schedule(at + LATE, Event::LanePlaces(lane, Some(frame)));
        } else {
            receiver.arrived.push_back(frame);
            self.schedule(at, Event::LanePlaces(lane, None));
        }
    }

    /// The target's worker has placed a frame: the oldest that has arrived, or this one, which is late.
    pub(super) fn lane_places(
        &mut self,
        lane: usize,
        late: Option<Frame>,
    ) -> Result<(), Violation> {
        let frame = late.or_else(|| self.lanes[lane].receiver.arrived.pop_front());
        let idle = self.lanes[lane].receiver.over || self.at(Side::Target).lanes_closed;
        let Some(frame) = frame.filter(|_| !idle && self.at(Side::Target).vm.alive) else {
            return Ok(());
        };
        match frame {
            Frame::Pages {
                round,
                region,
                told,
            } => {
                let mismatched = self.place(region, &told)?;
                self.tell_mismatched(lane, round, region, &mismatched);
                let receiver = &mut self.lanes[lane].receiver;
                receiver.frames += 1;
                receiver.pages += told.len() as u64;
            }
            Frame::End { round, pages } => {
                self.note(|| format!("lane {lane} placed its end of {round}"));
                let (id, receiver) = (self.lanes[lane].id, &mut self.lanes[lane].receiver);
                receiver.frames += 1;
                receiver.pages = 0;
                let frames = receiver.frames;
                let fact = Input::RoundEnded {
                    lane: id,
                    round,
                    pages,
                    frames,
                };
                self.report(Side::Target, Thread::Lanes, fact);
            }
        }
        Ok(())
    }

    /// A side closes its page lanes; the other finds out.
    pub(super) fn close_lanes(&mut self, side: Side) {
        self.end(side).lanes_closed = true;
        for at in 0..self.lanes.len() {
            let lane = &mut self.lanes[at];
            let known = match side {
                Side::Source => mem::replace(&mut lane.sender.cut, true),
                Side::Target => mem::replace(&mut lane.receiver.over, true),
            };
            let last = lane.pipe.close(self.now);
            if !known {
                let notice = self.rng.micros(self.plan.wire_us.clone());
                self.schedule(last + notice, Event::LaneNotices(side.other(), at));
            }
        }
        if side == Side::Target {
            self.unpark();
        }
    }
}
