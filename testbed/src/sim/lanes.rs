//! Page workers at both ends. Contents are copied here, while the guest writes, and never by the
//! machines.

use ferry_engine::core::layout::{PageRange, RegionIndex};
use ferry_engine::core::message::{Input, ZeroPages};

use super::checks::Violation;
use super::event::Event;
use super::flaw::Flaw;
use super::guest::Content;
use super::link::{Frame, LaneJob};
use super::plan::Side;
use super::worker::Thread;
use super::world::World;

/// How late pages are with [`Flaw::EndBeforePages`].
const LATE: std::time::Duration = std::time::Duration::from_millis(3);

impl World {
    /// A worker turns to its next job: reading begins now, and ends later.
    pub(super) fn read_next(&mut self, lane: usize) {
        if self.lanes[lane].current.is_some() {
            return;
        }
        let Some(job) = self.lanes[lane].jobs.pop_front() else {
            return;
        };
        let before = match &job {
            LaneJob::Copy(region, range, _) => self.contents(*region, *range),
            LaneJob::End(_) => Vec::new(),
        };
        self.lanes[lane].current = Some((job, before));
        let takes = self.rng.micros(1..=self.plan.work_us.start() * 4);
        self.after(takes, Event::LaneSent(lane));
    }

    fn contents(&self, region: RegionIndex, range: PageRange) -> Vec<Content> {
        let ram = &self.at(Side::Source).vm.ram;
        (range.first.0..range.end().0)
            .map(|page| ram.page(region, page))
            .collect()
    }

    pub(super) fn lane_sent(&mut self, lane: usize) {
        let Some((job, before)) = self.lanes[lane].current.take() else {
            return;
        };
        let frame = match job {
            LaneJob::Copy(region, range, zeros) => {
                Some(self.pages_frame(lane, region, range, zeros, &before))
            }
            LaneJob::End(round) => {
                let pages = std::mem::take(&mut self.lanes[lane].told);
                Some(Frame::End { round, pages })
            }
        };
        if let Some(frame) = frame {
            self.put_on_lane(lane, frame);
        }
        self.read_next(lane);
    }

    /// What a copy holds that was begun with `before` and ends now.
    fn pages_frame(
        &mut self,
        lane: usize,
        region: RegionIndex,
        range: PageRange,
        zeros: ZeroPages,
        before: &[Content],
    ) -> Frame {
        let after = self.contents(region, range);
        let mut told = Vec::new();
        for (page, (before, after)) in (range.first.0..).zip(before.iter().zip(after)) {
            let content = if *before == after {
                after
            } else {
                after.torn()
            };
            let zero = content == Content::ZERO;
            self.totals.zero_pages += u64::from(zero);
            if zero && zeros == ZeroPages::Skip {
                self.totals.skipped_pages += 1;
            } else {
                told.push((page, content));
            }
        }
        let count = told.len() as u64;
        self.totals.pages += count;
        self.totals.bytes += count * self.plan.page_bytes;
        self.lanes[lane].told += count;
        if self.rng.once_in(4) {
            let totals = self.totals;
            // Read off a counter by somebody else than the lanes: it may come late.
            self.report(Side::Source, Thread::Reader, Input::Sent(totals));
        }
        Frame::Pages { region, told }
    }

    fn put_on_lane(&mut self, lane: usize, frame: Frame) {
        let end = match &frame {
            Frame::End { round, .. } => Some(*round),
            Frame::Pages { .. } => None,
        };
        let wire = self.plan.wire_us.clone();
        let arrives = self.lanes[lane].pipe.send(self.now, &mut self.rng, &wire);
        if let Some(at) = arrives {
            self.schedule(at, Event::LaneArrives(lane, frame));
        }
        let Some(round) = end else { return };
        self.lanes_ended += 1;
        if self.lanes_ended == self.lanes.len() {
            let totals = self.totals;
            self.report(
                Side::Source,
                Thread::Lanes,
                Input::RoundSent { round, totals },
            );
        }
    }

    pub(super) fn lane_arrives(&mut self, lane: usize, frame: Frame) {
        if !self.lanes[lane].pipe.delivers(self.now) || self.at(Side::Target).lanes_closed {
            return;
        }
        let takes = self.rng.micros(1..=self.plan.work_us.start() * 4);
        let placed = self.lanes[lane].placed.max(self.now) + takes;
        self.lanes[lane].placed = placed;
        let late = self.flaw == Some(Flaw::EndBeforePages) && matches!(frame, Frame::Pages { .. });
        let at = if late { placed + LATE } else { placed };
        self.schedule(at, Event::LanePlaces(lane, frame));
    }

    pub(super) fn lane_places(&mut self, lane: usize, frame: &Frame) -> Result<(), Violation> {
        let end = self.end(Side::Target);
        if end.lanes_closed || !end.vm.alive {
            return Ok(());
        }
        match frame {
            Frame::Pages { region, told } => {
                if end.vm.has_run && end.vm.run_by == super::guest::RunBy::Engine {
                    return Err(Violation::PlacedAfterRun);
                }
                for (page, content) in told {
                    end.vm.ram.fill(*region, *page, *content);
                }
            }
            Frame::End { round, pages } => {
                let (round, pages) = (*round, *pages);
                self.note(|| format!("lane {lane} placed its end of {round}"));
                let fact = Input::RoundEnded { round, pages };
                self.report(Side::Target, Thread::Lanes, fact);
            }
        }
        Ok(())
    }

    /// A side closes its page lanes; the other finds out.
    pub(super) fn close_lanes(&mut self, side: Side) {
        self.end(side).lanes_closed = true;
        let mut last = self.now;
        for lane in &mut self.lanes {
            if side == Side::Source {
                lane.jobs.clear();
            }
            last = last.max(lane.pipe.close(self.now));
        }
        if !self.lanes.is_empty() {
            let notice = self.rng.micros(self.plan.wire_us.clone());
            self.schedule(
                last + notice,
                Event::Notices(side.other(), super::net::PAGE_LANES),
            );
        }
        if side == Side::Target {
            self.unpark();
        }
    }
}
