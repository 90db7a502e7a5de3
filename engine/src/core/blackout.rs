//! Where the blackout goes: its parts, on the source's clock.
//!
//! ```text
//! STOP     drained   known        copied and saved        loading      Ready      Go       Running
//!   │ flush   │  stop  │  state_save, or  │ scan and pages │ state_load │  other  │  resume,   │
//!   │         │        │  scan and pages  │                │            │         │   other    │
//! ```
//!
//! What the guest left dirty is collected and sent while its device state is saved. That span counts
//! to whichever ended last: the other cost nothing. Pages are sent while the scan goes on, so the scan
//! cost no more than the lanes' wait for it, and all the rest of the span is the pages'. The device state travels with the pages and is
//! received before it is loaded. What the two VMMs did at the target is told by the target, as
//! durations, for the clocks differ; the way there and back, the journals and waking up are `other`.

use std::time::Duration;

use crate::core::message::Moment;

/// The parts of a blackout. They add up to [`Report::downtime`](crate::core::meter::Report::downtime).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Blackout {
    /// From the end of the VMM's drain until the engine had heard of it.
    pub stop: Duration,
    /// The VMM's drain and flush of the guest's disks, which a stop ends with.
    pub flush: Duration,
    /// Looking for dirty pages, as far as something waited for it.
    pub scan: Duration,
    /// Sending dirty pages until they were in place, as far as something waited for it. Without
    /// `--live`, the whole copy.
    pub pages: Duration,
    /// Saving the device state, as far as something waited for it.
    pub state_save: Duration,
    /// Loading the device state at the target, by the target's clock.
    pub state_load: Duration,
    /// Letting the guest run at the target, by the target's clock.
    pub resume: Duration,
    /// All the rest: journals, messages on their way, waking up.
    pub other: Duration,
}

impl Blackout {
    /// All parts together.
    pub fn total(&self) -> Duration {
        self.parts().into_iter().map(|(_, part)| part).sum()
    }

    /// The parts with their names, in the order in which they happen.
    pub fn parts(&self) -> [(&'static str, Duration); 8] {
        [
            ("flush", self.flush),
            ("stop", self.stop),
            ("state save", self.state_save),
            ("scan", self.scan),
            ("pages", self.pages),
            ("state load", self.state_load),
            ("resume", self.resume),
            ("other", self.other),
        ]
    }
}

/// Charges the time since the guest stopped to the parts, each up to some moment.
#[derive(Debug)]
pub(crate) struct Stopwatch {
    parts: Blackout,
    mark: Mark,
    /// How long the lanes of the open round waited for the scan.
    starved: Duration,
    placed: Moment,
}

impl Stopwatch {
    pub(crate) fn started(at: Moment) -> Self {
        Self {
            parts: Blackout::default(),
            mark: Mark(at),
            starved: Duration::ZERO,
            placed: at,
        }
    }

    /// The switchover begins, with a guest that was paused for the whole copy.
    pub(crate) fn copied(&mut self, now: Moment) {
        self.parts.pages += self.mark.lap(now);
    }

    pub(crate) fn paused(&mut self, drained: Moment, now: Moment) {
        self.parts.flush += self.mark.lap(drained);
        self.parts.stop += self.mark.lap(now);
    }

    /// A scan has ended, for which the lanes waited so long.
    pub(crate) fn scanned(&mut self, starved: Duration) {
        self.starved = starved;
    }

    /// What the guest left dirty is in place.
    pub(crate) fn placed(&mut self, now: Moment) {
        self.placed = now;
    }

    /// Both are done: the copy of what the guest left dirty, and the save, at `saved`.
    pub(crate) fn copied_and_saved(&mut self, saved: Moment, now: Moment) {
        if saved >= self.placed {
            self.parts.state_save += self.mark.lap(now);
        } else {
            let span = self.mark.lap(now);
            self.charge_pages(span);
        }
        self.starved = Duration::ZERO;
    }

    /// Charges a span in which pages were sent.
    fn charge_pages(&mut self, span: Duration) {
        let scan = self.starved.min(span);
        self.parts.scan += scan;
        self.parts.pages += span.saturating_sub(scan);
    }

    /// The target has loaded, which by its own clock took `load`.
    pub(crate) fn ready(&mut self, now: Moment, load: Duration) {
        let span = self.mark.lap(now);
        let load = load.min(span);
        self.parts.state_load += load;
        self.charge_pages(span.saturating_sub(load));
    }

    pub(crate) fn given(&mut self, now: Moment) {
        self.parts.other += self.mark.lap(now);
    }

    /// The guest runs, and by the target's clock it took `resume` to let it.
    pub(crate) fn runs(&mut self, now: Moment, resume: Duration) {
        let span = self.mark.lap(now);
        let resume = resume.min(span);
        self.parts.resume += resume;
        self.parts.other += span.saturating_sub(resume);
    }

    pub(crate) fn parts(&self) -> Blackout {
        self.parts
    }
}

/// Up to here all time is charged.
#[derive(Debug)]
struct Mark(Moment);

impl Mark {
    /// The time from here to `until`, which is charged with it.
    fn lap(&mut self, until: Moment) -> Duration {
        let span = until.since(self.0);
        self.0 = self.0.max(until);
        span
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Moment {
        Moment(Duration::from_millis(ms))
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn every_moment_is_charged_once() {
        let mut watch = Stopwatch::started(at(100));
        watch.paused(at(103), at(104));
        watch.scanned(ms(1));
        watch.placed(at(107));
        watch.copied_and_saved(at(109), at(110));
        watch.scanned(ms(2));
        watch.ready(at(120), ms(5));
        watch.given(at(121));
        watch.runs(at(125), ms(1));
        let expected = Blackout {
            flush: ms(3),
            stop: ms(1),
            state_save: ms(6),
            scan: ms(2),
            pages: ms(3),
            state_load: ms(5),
            resume: ms(1),
            other: ms(4),
        };
        assert_eq!(watch.parts(), expected);
        assert_eq!(watch.parts().total(), ms(25));
    }

    #[test]
    fn a_copy_that_outlasts_the_save_is_what_was_waited_for() {
        let mut watch = Stopwatch::started(at(0));
        watch.paused(at(1), at(1));
        watch.scanned(ms(2));
        watch.placed(at(9));
        watch.copied_and_saved(at(5), at(9));
        assert_eq!(watch.parts().state_save, ms(0));
        assert_eq!((watch.parts().scan, watch.parts().pages), (ms(2), ms(6)));
    }

    #[test]
    fn a_scan_costs_what_was_waited_for_it_and_never_more_than_went_by() {
        let mut watch = Stopwatch::started(at(0));
        watch.scanned(ms(100));
        watch.placed(at(9));
        watch.copied_and_saved(at(5), at(9));
        assert_eq!((watch.parts().scan, watch.parts().pages), (ms(9), ms(0)));
        // The last scan has nobody wait.
        watch.scanned(ms(0));
        watch.ready(at(20), ms(7));
        assert_eq!((watch.parts().scan, watch.parts().pages), (ms(9), ms(4)));
        assert_eq!(watch.parts().total(), ms(20));
    }

    #[test]
    fn a_target_cannot_claim_more_time_than_went_by() {
        let mut watch = Stopwatch::started(at(0));
        watch.ready(at(4), ms(1000));
        watch.runs(at(6), Duration::MAX);
        assert_eq!(watch.parts().total(), ms(6));
    }
}
