//! How many page lanes: one more as long as the last one paid.
//!
//! One connection carries what its window, its losses and the core behind it let through; several
//! carry more until the link is full, or the cores are. Where that is cannot be read off anything, so
//! it is tried: a lane is added, and stays the last one when it did not raise the rate. Nothing is
//! taken back; a lane too many costs next to nothing.

use std::num::NonZeroU16;
use std::time::Duration;

use crate::core::message::{LaneTotals, Moment};

/// How much more all lanes together must carry for the last one to have paid, in percent of what each
/// of the others carried.
const GAIN_PERCENT: u64 = 40;

/// Fewer bytes than this in a window measure a guest that has little to send, and not the link.
const LEAST_BYTES: u64 = 4 << 20;

/// What a lane carries when it is bound by a core and not by the link, in bytes a second. More lanes
/// than cores are of no use then.
const CORE_BOUND: u64 = 300_000_000;

/// What a lane is, to a migration that may open more of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Lanes that there may be.
    pub most: NonZeroU16,
    /// Lanes for which there are cores.
    pub cores: NonZeroU16,
}

/// The rule. Fed with what the lanes have done while a round is on its way.
#[derive(Debug)]
pub(crate) struct Growth {
    room: Room,
    /// How long a rate is measured; half as long a new lane has to gather speed.
    span: Duration,
    window: Option<Window>,
    /// Bytes a second before the last lane was added.
    before: Option<u64>,
    over: bool,
}

/// What is being measured.
#[derive(Clone, Copy, Debug)]
struct Window {
    began: Moment,
    at_first: Option<LaneTotals>,
    lanes: u16,
}

/// What the rule says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Advice {
    /// It is well as it is, or not known yet.
    Stay,
    /// Add a lane.
    Grow,
}

impl Growth {
    pub(crate) fn new(room: Room, span: Duration) -> Self {
        Self {
            room,
            span,
            window: None,
            before: None,
            over: false,
        }
    }

    /// A round has ended: what is measured across its end is no rate.
    pub(crate) fn interrupted(&mut self) {
        self.window = None;
    }

    /// So much was sent by now, over so many lanes.
    pub(crate) fn sent(&mut self, now: Moment, totals: LaneTotals, lanes: u16) -> Advice {
        if self.over || lanes >= self.room.most.get() {
            return Advice::Stay;
        }
        let Some(window) = self.window.filter(|window| window.lanes == lanes) else {
            self.window = Some(Window {
                began: now.after(self.span / 2),
                at_first: None,
                lanes,
            });
            return Advice::Stay;
        };
        if now < window.began {
            return Advice::Stay;
        }
        let Some(first) = window.at_first else {
            self.begin(now, totals, lanes);
            return Advice::Stay;
        };
        let (took, bytes) = (now.since(window.began), totals.bytes - first.bytes);
        if took < self.span || bytes < LEAST_BYTES {
            return Advice::Stay;
        }
        self.begin(now, totals, lanes);
        // Who waits for the bandwidth that was asked for would wait with more lanes as well.
        if totals.waited > first.waited {
            return Advice::Stay;
        }
        let rate = u128::from(bytes) * 1_000_000_000 / took.as_nanos().max(1);
        self.judge(u64::try_from(rate).unwrap_or(u64::MAX), lanes)
    }

    fn begin(&mut self, now: Moment, totals: LaneTotals, lanes: u16) {
        self.window = Some(Window {
            began: now,
            at_first: Some(totals),
            lanes,
        });
    }

    fn judge(&mut self, rate: u64, lanes: u16) -> Advice {
        let others = u64::from(lanes).saturating_sub(1).max(1);
        let paid = self.before.is_none_or(|before| {
            let share = before / others;
            rate > before + share / 100 * GAIN_PERCENT
        });
        let needs_cores = rate / u64::from(lanes.max(1)) > CORE_BOUND;
        if !paid || (needs_cores && lanes >= self.room.cores.get()) {
            self.over = true;
            return Advice::Stay;
        }
        self.before = Some(rate);
        Advice::Grow
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPAN: Duration = Duration::from_millis(300);
    const TICK: Duration = Duration::from_millis(100);

    fn few(lanes: u16) -> NonZeroU16 {
        NonZeroU16::new(lanes).unwrap()
    }

    /// Lanes that a migration ends up with, over a link that carries `rate` over so many lanes; with
    /// `waits`, lanes wait for the bandwidth asked for.
    fn grown(cores: u16, waits: Duration, rate: fn(u16) -> u64) -> u16 {
        let (most, cores) = (few(16), few(cores));
        let mut growth = Growth::new(Room { most, cores }, SPAN);
        let (mut lanes, mut totals, mut now) = (2, LaneTotals::default(), Moment::default());
        for _ in 0..300 {
            now = now.after(TICK);
            totals.bytes += rate(lanes) / 10;
            totals.waited += waits;
            if growth.sent(now, totals, lanes) == Advice::Grow {
                lanes += 1;
            }
        }
        lanes
    }

    #[test]
    fn grows_while_it_pays_and_then_no_more() {
        let windows = |lanes: u16| u64::from(lanes).min(5) * 20_000_000;
        assert_eq!(grown(2, Duration::ZERO, windows), 6, "5 pay, 6 does not");
        let full = |_| 117_000_000;
        assert_eq!(grown(2, Duration::ZERO, full), 3);
        let endless = |lanes: u16| u64::from(lanes) * 20_000_000;
        assert_eq!(grown(2, Duration::ZERO, endless), 16);
    }

    #[test]
    fn lanes_that_are_bound_by_cores_need_cores() {
        let loopback = |lanes: u16| u64::from(lanes) * 1_000_000_000;
        assert_eq!(grown(2, Duration::ZERO, loopback), 2);
        assert_eq!(grown(8, Duration::ZERO, loopback), 8);
    }

    #[test]
    fn a_bandwidth_that_was_asked_for_is_no_reason() {
        let held = |_| 50_000_000;
        assert_eq!(grown(2, Duration::from_millis(1), held), 2);
    }

    #[test]
    fn a_guest_that_sends_little_measures_nothing() {
        let idle = |_| 1000;
        assert_eq!(grown(2, Duration::ZERO, idle), 2);
    }
}
