//! What a migration has cost so far: rounds, rates, the report.

use std::collections::VecDeque;
use std::time::Duration;

use ferry_stream::message::Round;

use crate::core::blackout::{Blackout, Stopwatch};
use crate::core::converge::{Spread, written_bytes_per_s};
use crate::core::encoding::EncodingTotals;
use crate::core::layout::PAGE_SIZE;
use crate::core::message::{HandedOn, LaneTotals, Moment, Phase};
use crate::core::postcopy::{FetchFigures, Way};

/// Rounds shorter than this in bytes measure latency and not the link; they do not count as a rate.
const RATE_SAMPLE_BYTES: u64 = 1 << 20;

/// What is assumed of a link before anything was measured, in bytes a second: 1 Gbit/s.
const ASSUMED_RATE: u64 = 125_000_000;

/// A look at what was written in less time says little.
const LEAST_LOOK: Duration = Duration::from_millis(150);

/// How many of the latest scans and short rounds are looked at for the slowest: what comes next may be
/// as slow.
const OF_LATE: usize = 3;

/// What a round is taken to need besides its pages before a short one was measured.
const ASSUMED_LATENCY: Duration = Duration::from_millis(1);

/// One round, as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoundReport {
    /// Which.
    pub round: Round,
    /// Pages to send.
    pub dirty_pages: u64,
    /// Pages told to the target.
    pub pages: u64,
    /// Pages found to be zero.
    pub zero_pages: u64,
    /// Bytes on the wire.
    pub bytes: u64,
    /// From its first page to the target's word that all are in place.
    pub took: Duration,
    /// What the guest wrote while it lasted, in bytes a second; known after the next collection.
    pub dirty_bytes_per_s: u64,
}

/// The figures of a migration, in the source's view.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// From the start to the end.
    pub total: Duration,
    /// From the start to the first round.
    pub setup: Duration,
    /// From the guest's last instruction here to the target's word that it runs: an upper bound of
    /// the blackout. `None` when it did not move.
    pub downtime: Option<Duration>,
    /// Where that time went. `None` when it did not move.
    pub blackout: Option<Blackout>,
    /// Bytes on the page lanes, and of device state.
    pub bytes_wire: u64,
    /// Pages found to be zero.
    pub zero_pages: u64,
    /// Pages that were not sent in a round because the guest rewrites them all the time; each counts
    /// once for every round that it was kept out of.
    pub held_pages: u64,
    /// Pages left out of a round because the guest had written them again before their turn came.
    pub fresh_pages: u64,
    /// Every round.
    pub rounds: Vec<RoundReport>,
    /// Pages that the target took from the source's own RAM, on the same host; zero pages are among
    /// them, and nowhere else: who does not read pages does not find them.
    pub shared_pages: u64,
    /// How the bytes of pages were packed.
    pub encoding: EncodingTotals,
    /// The most page lanes that stood at one time.
    pub lanes: u16,
    /// Page lanes that died, or could not be opened.
    pub lanes_lost: u32,
    /// By how much the guest is slowed, in percent of its time: 0, unless that could not be undone.
    pub throttled_percent: u8,
    /// The most that it was slowed by.
    pub throttled_percent_max: u8,
    /// What came after the guest. `None` when it was not handed over before its pages.
    pub postcopy: Option<PostcopyReport>,
    /// Target: how faults were served. `None` when there was nothing to wait for.
    pub fetched: Option<FetchFigures>,
}

/// What came after a guest that was handed over before its pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PostcopyReport {
    /// Pages that it was handed over without.
    pub missing_pages: u64,
    /// From the target's word that it runs to its word that every page is there; zero when all had come
    /// before. `None` when that was never said.
    pub last_page: Option<Duration>,
    /// Bytes on the fetch lanes.
    pub bytes_wire: u64,
    /// Pages that the target asked for because somebody waited for them.
    pub asked_pages: u64,
}

impl Report {
    /// Bytes a second over all rounds, as they lasted: those on the wire, and those of shared pages.
    pub fn throughput_bytes_per_s(&self) -> u64 {
        let took: Duration = self.rounds.iter().map(|round| round.took).sum();
        let bytes: u64 = self.rounds.iter().map(|round| round.bytes).sum();
        per_second(bytes + self.shared_bytes(), took).unwrap_or(0)
    }

    /// Bytes of the pages that the target took from the source's own RAM.
    pub fn shared_bytes(&self) -> u64 {
        self.shared_pages * PAGE_SIZE as u64
    }

    /// What the guest wrote, at the last measurement, in bytes a second.
    pub fn dirty_bytes_per_s(&self) -> u64 {
        self.rounds
            .iter()
            .rev()
            .map(|round| round.dirty_bytes_per_s)
            .find(|rate| *rate > 0)
            .unwrap_or(0)
    }
}

/// A look at a running migration.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// What is going on.
    pub phase: Phase,
    /// The round at work; 0 before the first.
    pub round: u32,
    /// Time since the start.
    pub elapsed: Duration,
    /// Bytes of guest RAM dealt with in this round.
    pub done_bytes: u64,
    /// Bytes of guest RAM still to send in this round.
    pub remaining_bytes: u64,
    /// Bytes on the wire so far.
    pub bytes_wire: u64,
    /// What the lanes bring over, in bytes of pages a second.
    pub rate_bytes_per_s: u64,
    /// What the guest writes, in bytes a second.
    pub dirty_bytes_per_s: u64,
    /// The blackout if the guest were stopped now; `None` before the first round is over.
    pub predicted_blackout: Option<Duration>,
    /// Time to the end of this round at the present rate.
    pub left: Option<Duration>,
    /// Page lanes that stand.
    pub lanes: u16,
    /// Page lanes that died, or could not be opened, so far.
    pub lanes_lost: u32,
    /// The downtime limit that holds.
    pub downtime_limit: Duration,
    /// By how much the guest is slowed, in percent of its time.
    pub throttled_percent: u8,
    /// The most that it was slowed by so far.
    pub throttled_percent_max: u8,
    /// How the bytes of pages were packed so far.
    pub encoding: EncodingTotals,
    /// The guest was given away: it is too late to give up.
    pub given_away: bool,
    /// Whether it is, or can be, handed over before its pages.
    pub postcopy: Way,
}

/// The first round is nearly everything; what comes after it is the last percent.
const FIRST_ROUND_PERCENT: u8 = 98;

impl Progress {
    /// How much of the whole move is done, 0 to 100, as far as that can be told of something whose
    /// number of rounds nobody knows.
    pub fn percent_of_move(&self) -> u8 {
        match self.round {
            // What was copied before says little of what is left.
            _ if self.phase == Phase::Serving => self.percent().min(FIRST_ROUND_PERCENT + 1),
            0 => 0,
            1 => {
                let percent = u16::from(self.percent()) * u16::from(FIRST_ROUND_PERCENT) / 100;
                u8::try_from(percent).unwrap_or(FIRST_ROUND_PERCENT)
            }
            _ => FIRST_ROUND_PERCENT + 1,
        }
    }

    /// How much of this round is done, 0 to 100.
    pub fn percent(&self) -> u8 {
        let all = self.done_bytes + self.remaining_bytes;
        let percent = self
            .done_bytes
            .saturating_mul(100)
            .checked_div(all)
            .unwrap_or(100);
        u8::try_from(percent).unwrap_or(100)
    }
}

/// Counts rounds and keeps rates.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    rounds: Vec<RoundReport>,
    open: Option<OpenRound>,
    totals: LaneTotals,
    rate: Option<u64>,
    collecting: Option<Moment>,
    scans: OfLate,
    latencies: OfLate,
    collected_at: Option<Moment>,
    tracking_ordered: Option<Moment>,
    first_page: Option<Moment>,
    stopped: Option<Moment>,
    blackout: Option<Stopwatch>,
    runs: Option<Moment>,
    state_bytes: u64,
    held_pages: u64,
    /// Pages that the guest was handed over without.
    missing: Option<u64>,
    whole: Option<Moment>,
}

#[derive(Debug)]
struct OpenRound {
    round: Round,
    /// Pages to send; what is expected, as long as a scan hands on more.
    dirty_pages: u64,
    /// How long its lanes waited for a scan.
    starved: Duration,
    began: Moment,
    before: LaneTotals,
}

impl Meter {
    /// A round begins, of so many pages as far as is known.
    pub(crate) fn begin_round(&mut self, now: Moment, round: Round, dirty_pages: u64) {
        self.first_page.get_or_insert(now);
        self.open = Some(OpenRound {
            round,
            dirty_pages,
            starved: Duration::ZERO,
            began: now,
            before: self.totals,
        });
    }

    /// The scan has ended that handed on the pages of the open round.
    pub(crate) fn scanned(&mut self, handed_on: HandedOn) {
        if let Some(open) = &mut self.open {
            open.dirty_pages = handed_on.pages;
            open.starved = handed_on.starved;
        }
    }

    /// Notes what the lanes have done. Totals that were read earlier and come later are nothing new.
    pub(crate) fn sent(&mut self, totals: LaneTotals) {
        let newer = totals.dealt() >= self.totals.dealt() && totals.bytes >= self.totals.bytes;
        if newer {
            self.totals = totals;
        }
    }

    /// What the lanes have done, as far as is known.
    pub(crate) fn totals(&self) -> LaneTotals {
        self.totals
    }

    pub(crate) fn end_round(&mut self, now: Moment) {
        let totals = self.totals;
        let Some(open) = self.open.take() else { return };
        let took = now.since(open.began);
        let bytes = totals.bytes - open.before.bytes;
        let data_bytes = self.data_bytes_since(open.before);
        // A wait for the scan is no fault of the link.
        let sent_for = took.saturating_sub(open.starved);
        if data_bytes >= RATE_SAMPLE_BYTES {
            self.rate = per_second(data_bytes, sent_for);
        } else {
            let nanos = data_bytes.saturating_mul(1_000_000_000) / self.rate(now);
            self.latencies
                .push(sent_for.saturating_sub(Duration::from_nanos(nanos)));
        }
        self.rounds.push(RoundReport {
            round: open.round,
            dirty_pages: open.dirty_pages,
            pages: totals.pages - open.before.pages,
            zero_pages: totals.zero_pages - open.before.zero_pages,
            bytes,
            took,
            dirty_bytes_per_s: 0,
        });
    }

    /// Notes the order to collect.
    pub(crate) fn collecting(&mut self, now: Moment) {
        self.collecting = Some(now);
    }

    /// Notes a collection that found `pages`, written since the one before.
    pub(crate) fn collected(&mut self, now: Moment, pages: u64) {
        if let Some(ordered) = self.collecting.take() {
            self.scans.push(now.since(ordered));
        }
        let since = self.collected_at.replace(now).map(|at| now.since(at));
        let rate = since.and_then(|since| per_second(pages * PAGE_SIZE as u64, since));
        if let (Some(rate), Some(round)) = (rate, self.rounds.last_mut()) {
            round.dirty_bytes_per_s = rate;
        }
    }

    /// Notes the order to begin tracking.
    pub(crate) fn tracking_ordered(&mut self, now: Moment) {
        self.tracking_ordered = Some(now);
    }

    /// All is tracked: the first collection counts from here. Or rather from the middle of the start,
    /// for what was tracked first was written for longest: a first round may last no longer than that
    /// takes, and what was written meanwhile would seem to have been written in no time.
    pub(crate) fn tracking(&mut self, now: Moment) {
        let ordered = self.tracking_ordered.unwrap_or(now);
        self.collected_at = Some(ordered.after(now.since(ordered) / 2));
    }

    pub(crate) fn stopped(&mut self, at: Moment) {
        self.stopped.get_or_insert(at);
        self.blackout.get_or_insert_with(|| Stopwatch::started(at));
    }

    pub(crate) fn went_on(&mut self) {
        self.stopped = None;
        self.blackout = None;
    }

    /// Lets `charge` split the blackout further, if it has begun.
    pub(crate) fn blackout(&mut self, charge: impl FnOnce(&mut Stopwatch)) {
        self.blackout.as_mut().map(charge);
    }

    pub(crate) fn runs(&mut self, at: Moment, resume: Duration) {
        if self.runs.is_none() {
            self.runs = Some(at);
            self.blackout(|watch| watch.runs(at, resume));
        }
    }

    /// The guest is handed over without so many pages.
    pub(crate) fn handed_over_without(&mut self, now: Moment, pages: u64) {
        self.missing = Some(pages);
        self.first_page.get_or_insert(now);
        if pages == 0 {
            self.whole = Some(Moment::default());
        }
    }

    pub(crate) fn missing_pages(&self) -> u64 {
        self.missing.unwrap_or(0)
    }

    /// The target has every page.
    pub(crate) fn whole(&mut self, now: Moment) {
        self.whole = Some(now);
    }

    fn postcopy(&self) -> Option<PostcopyReport> {
        Some(PostcopyReport {
            missing_pages: self.missing?,
            last_page: self
                .whole
                .zip(self.runs)
                .map(|(whole, runs)| whole.since(runs)),
            ..PostcopyReport::default()
        })
    }

    pub(crate) fn state(&mut self, bytes: u64) {
        self.state_bytes = bytes;
    }

    pub(crate) fn rounds(&self) -> &[RoundReport] {
        &self.rounds
    }

    /// Bytes of pages that the lanes have sent since. Lanes count zeros as they find them and pages as
    /// they are sent, so within a round this may come out too small, never too large.
    fn data_bytes_since(&self, before: LaneTotals) -> u64 {
        self.totals.data_bytes().saturating_sub(before.data_bytes())
    }

    /// What the lanes bring over, in bytes of pages a second: measured over the last round that was
    /// long enough, within a first round over what has been sent of it. Packed pages count in full,
    /// since what is left to send is counted in pages too.
    pub(crate) fn rate(&self, now: Moment) -> u64 {
        let within = self.open.as_ref().and_then(|open| {
            let bytes = self.data_bytes_since(open.before);
            let sent_for = now.since(open.began).saturating_sub(open.starved);
            (bytes >= RATE_SAMPLE_BYTES).then(|| per_second(bytes, sent_for))?
        });
        within.or(self.rate).unwrap_or(ASSUMED_RATE).max(1)
    }

    /// What a scan takes.
    pub(crate) fn scan(&self) -> Spread {
        self.scans.spread().unwrap_or_default()
    }

    /// What a round takes besides sending its pages.
    pub(crate) fn latency(&self) -> Spread {
        self.latencies.spread().unwrap_or(Spread {
            best: ASSUMED_LATENCY,
            slowest: ASSUMED_LATENCY,
        })
    }

    /// Notes that `pages` wait for a later round than the next.
    pub(crate) fn held(&mut self, pages: u64) {
        self.held_pages += pages;
    }

    pub(crate) fn dirty_rate(&self) -> u64 {
        self.rounds
            .last()
            .map_or(0, |round| round.dirty_bytes_per_s)
    }

    /// What the guest writes, with every write counted, in bytes a second.
    pub(crate) fn written(&self) -> u64 {
        let (Some(first), Some(last)) = (self.rounds.first(), self.rounds.last()) else {
            return 0;
        };
        let dirty = u128::from(last.dirty_bytes_per_s) * last.took.as_nanos()
            / (1_000_000_000 * PAGE_SIZE as u128);
        let dirty = u64::try_from(dirty).unwrap_or(u64::MAX);
        let rate = written_bytes_per_s(dirty, first.dirty_pages, last.took);
        rate.max(last.dirty_bytes_per_s)
    }

    /// The same within a round, in which `dirty` pages were written so far: none when that says nothing
    /// yet.
    pub(crate) fn written_so_far(&self, now: Moment, dirty: u64) -> Option<u64> {
        let span = now.since(self.collected_at?);
        let open = self.open.as_ref()?;
        let all = self
            .rounds
            .first()
            .map_or(open.dirty_pages, |first| first.dirty_pages);
        (span >= LEAST_LOOK).then(|| written_bytes_per_s(dirty, all, span))
    }

    /// Pages of the open round that were dealt with, and all pages of it.
    pub(crate) fn open_pages(&self) -> (u64, u64) {
        self.open.as_ref().map_or((0, 0), |open| {
            let dealt = self.totals.dealt() - open.before.dealt();
            (dealt, open.dirty_pages)
        })
    }

    pub(crate) fn bytes_wire(&self) -> u64 {
        self.totals.bytes + self.state_bytes
    }

    pub(crate) fn report(&self, now: Moment) -> Report {
        Report {
            total: now.0,
            setup: self.first_page.unwrap_or(now).0,
            downtime: self
                .stopped
                .zip(self.runs)
                .map(|(stopped, runs)| runs.since(stopped)),
            blackout: self.runs.and(self.blackout.as_ref()).map(Stopwatch::parts),
            bytes_wire: self.bytes_wire(),
            zero_pages: self.totals.zero_pages,
            held_pages: self.held_pages,
            fresh_pages: self.totals.fresh_pages,
            rounds: self.rounds.clone(),
            shared_pages: 0,
            encoding: EncodingTotals::default(),
            lanes: 0,
            lanes_lost: 0,
            postcopy: self.postcopy(),
            fetched: None,
            throttled_percent: 0,
            throttled_percent_max: 0,
        }
    }
}

/// The latest of some durations, and the shortest of all.
#[derive(Debug, Default)]
struct OfLate {
    best: Option<Duration>,
    latest: VecDeque<Duration>,
}

impl OfLate {
    fn push(&mut self, span: Duration) {
        self.best = Some(self.best.map_or(span, |best| best.min(span)));
        if self.latest.len() == OF_LATE {
            self.latest.pop_front();
        }
        self.latest.push_back(span);
    }

    fn spread(&self) -> Option<Spread> {
        let slowest = self.latest.iter().max().copied();
        let (best, slowest) = self.best.zip(slowest)?;
        Some(Spread { best, slowest })
    }
}

/// `amount` a second, when it took any time at all.
fn per_second(amount: u64, took: Duration) -> Option<u64> {
    let nanos = took.as_nanos();
    (nanos > 0).then(|| {
        let rate = u128::from(amount) * 1_000_000_000 / nanos;
        u64::try_from(rate).unwrap_or(u64::MAX)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Moment {
        Moment(Duration::from_millis(ms))
    }

    #[test]
    fn a_round_tells_its_own_share() {
        let mut meter = Meter::default();
        meter.tracking(ms(5));
        meter.begin_round(ms(10), Round(1), 1000);
        let first = LaneTotals {
            pages: 900,
            zero_pages: 100,
            skipped_pages: 100,
            fresh_pages: 0,
            bytes: 4 << 20,
            ..LaneTotals::default()
        };
        meter.sent(first);
        meter.end_round(ms(1010));
        meter.collected(ms(1005), 10);
        meter.begin_round(ms(1011), Round(2), 10);
        meter.sent(LaneTotals {
            pages: 910,
            bytes: (4 << 20) + 100,
            ..first
        });
        meter.end_round(ms(1012));
        let report = meter.report(ms(1013));
        assert_eq!(report.rounds[0].pages, 900);
        assert_eq!(report.rounds[0].dirty_bytes_per_s, 40_960);
        assert_eq!(report.rounds[1].pages, 10);
        assert_eq!(report.rounds[1].zero_pages, 0);
        assert_eq!(report.setup, Duration::from_millis(10));
        assert_eq!(
            meter.rate(ms(1013)),
            900 * 4096,
            "a short round does not measure the link"
        );
    }

    #[test]
    fn deltas_do_not_make_the_link_seem_faster() {
        let mut meter = Meter::default();
        meter.begin_round(ms(0), Round(3), 10_000);
        meter.sent(LaneTotals {
            pages: 10_000,
            saved_bytes: 9000 * 4096,
            bytes: 1000 * 4096,
            ..LaneTotals::default()
        });
        meter.end_round(ms(1000));
        assert_eq!(meter.rate(ms(1000)), 1000 * 4096);
    }

    #[test]
    fn the_slowest_of_late_is_what_comes_next() {
        let mut meter = Meter::default();
        for (took, expected) in [(9, 9), (2, 9), (3, 9), (4, 4)] {
            meter.collecting(ms(100));
            meter.collected(ms(100 + took), 0);
            assert_eq!(meter.scan().slowest, Duration::from_millis(expected));
        }
        assert_eq!(meter.scan().best, Duration::from_millis(2));
        assert_eq!(meter.latency().best, ASSUMED_LATENCY);
        meter.begin_round(ms(200), Round(1), 1);
        meter.sent(LaneTotals {
            pages: 31,
            ..LaneTotals::default()
        });
        meter.end_round(ms(203));
        // 31 pages take 1,015,808 ns at the rate that is assumed.
        assert_eq!(meter.latency().slowest, Duration::from_nanos(1_984_192));
    }

    #[test]
    fn a_round_over_what_a_scan_hands_on_is_measured_without_the_wait_for_it() {
        let mut meter = Meter::default();
        meter.begin_round(ms(0), Round(1), 1 << 20);
        assert_eq!(meter.open_pages(), (0, 1 << 20));
        let (pages, starved) = (1000, Duration::from_millis(500));
        meter.scanned(HandedOn { pages, starved });
        assert_eq!(meter.open_pages(), (0, 1000));
        meter.sent(LaneTotals {
            pages,
            ..LaneTotals::default()
        });
        assert_eq!(meter.rate(ms(1500)), 1000 * 4096);
        meter.end_round(ms(1500));
        assert_eq!(meter.rate(ms(1600)), 1000 * 4096);
        let round = meter.rounds()[0];
        assert_eq!((round.dirty_pages, round.took.as_millis()), (1000, 1500));
    }

    /// Whatever is tracked from the beginning of the start on was written during all of it.
    #[test]
    fn what_is_written_while_tracking_starts_is_no_rate_of_the_time_after_it() {
        let mut meter = Meter::default();
        meter.tracking_ordered(ms(10));
        meter.begin_round(ms(12), Round(1), 100);
        meter.tracking(ms(110));
        meter.end_round(ms(111));
        meter.collected(ms(112), 100);
        assert_eq!(meter.dirty_rate(), 100 * 4096 * 1000 / 52);
    }

    #[test]
    fn downtime_needs_both_ends() {
        let mut meter = Meter::default();
        meter.stopped(ms(100));
        assert_eq!(meter.report(ms(200)).downtime, None);
        meter.runs(ms(130), Duration::ZERO);
        assert_eq!(
            meter.report(ms(200)).downtime,
            Some(Duration::from_millis(30))
        );
    }
}
