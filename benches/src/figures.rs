//! What is known of a move, of many moves, and of the machine that they ran on.

use std::time::Duration;

use ferry_testbed::Seen;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::case::Conditions;
use crate::cost::Cpu;
use crate::peer::{Memory, Peer};

/// The least width of a step of the curve.
const CURVE_STEP: Duration = Duration::from_millis(10);

/// How many steps a curve has at most: a longer move has wider ones.
const CURVE_STEPS: u32 = 600;

/// How long before the move the curve begins.
const CURVE_LEAD: Duration = Duration::from_millis(200);

/// One move, as the guest and the kernel saw it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Move {
    /// From the client's start to the first progress at the target, in ms.
    pub total_ms: f64,
    /// From the client's start to the last page at the target, in ms, where pages come after the guest: by
    /// QEMU's event, or by Ferry's account, for no counter shows it.
    #[serde(default)]
    pub last_page_ms: Option<f64>,
    /// From the last progress at the source to the first at the target, in ms.
    pub blackout_ms: f64,
    /// By how much the two may be wrong because two hosts have two clocks, in ms.
    pub clock_error_ms: f64,
    /// Bytes on the wire, both directions, by the interface's counters.
    pub wire_bytes: u64,
    /// CPU time at the source.
    pub source: Cpu,
    /// CPU time at the target.
    pub target: Cpu,
    /// What only Ferry's engines have.
    pub engine: Option<EngineFigures>,
    /// What only a guest that counts and verifies can tell.
    pub guest: Option<GuestFigures>,
}

/// What the testbed's own guest tells of a move.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct GuestFigures {
    /// The longest time without progress while the guest was watched, in ms.
    pub stall_ms: f64,
    /// Time with less than half of the normal progress, in ms.
    pub brownout_ms: f64,
    /// Seconds of normal running that the guest lost, from the client's start to a second after its
    /// first progress at the target.
    pub lost_s: f64,
    /// The longest pause of the probe itself, in ms.
    pub resolution_ms: f64,
    /// Pages and disk blocks that the guest found bad.
    pub bad: u64,
    /// The guest's progress through the move.
    pub curve: Curve,
}

impl Move {
    /// To the end of the move: the guest's first progress at the target, or its last page.
    pub fn to_the_end_ms(&self) -> f64 {
        self.last_page_ms.unwrap_or(0.0).max(self.total_ms)
    }

    /// A figure of the guest's; not a number where it has none to tell.
    pub fn of_guest(&self, of: impl FnOnce(&GuestFigures) -> f64) -> f64 {
        self.guest.as_ref().map_or(f64::NAN, of)
    }

    /// Seconds of normal running lost.
    pub fn lost_s(&self) -> f64 {
        self.of_guest(|guest| guest.lost_s)
    }

    /// Pages and disk blocks found bad.
    pub fn bad(&self) -> u64 {
        self.guest.as_ref().map_or(0, |guest| guest.bad)
    }
}

/// What is known of Ferry's two processes.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct EngineFigures {
    /// The most memory besides guest RAM at the source, in KiB: `VmRSS` less `RssShmem`.
    pub source_peak_kib: u64,
    /// The same at the target.
    pub target_peak_kib: u64,
    /// Its own account of the move: to look for causes, never for the figures.
    pub told: Value,
    /// The target's.
    #[serde(default)]
    pub told_at_target: Value,
}

/// The guest's progress: seconds of normal running at equal steps of time.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Curve {
    /// When the first step begins, in ms from the client's start.
    pub from_ms: f64,
    /// The width of a step in ms.
    pub step_ms: f64,
    /// What the guest had done at each step. Never falls.
    pub done_s: Vec<f64>,
}

impl Curve {
    /// The curve of a move that began and ended at these moments of the watch.
    pub fn of(seen: &Seen, began: Duration, end: Duration) -> Self {
        let from = began.saturating_sub(CURVE_LEAD);
        let step = ((end.saturating_sub(from)) / CURVE_STEPS).max(CURVE_STEP);
        let normal_per_s = seen.rate_before(began);
        let first = seen.steps_at(from);
        let mut done_s = Vec::new();
        let mut at = from;
        while at <= end {
            let done = (seen.steps_at(at) - first) / normal_per_s;
            done_s.push((done * 1e5).round() / 1e5);
            at += step;
        }
        Self {
            from_ms: -began.saturating_sub(from).as_secs_f64() * 1e3,
            step_ms: step.as_secs_f64() * 1e3,
            done_s,
        }
    }
}

/// All moves by one way with one kind of memory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Series {
    /// The way.
    pub peer: Peer,
    /// The guest's memory.
    pub memory: Memory,
    /// The moves, in order.
    pub moves: Vec<Move>,
    /// Moves that came to nothing, and why.
    pub failures: Vec<String>,
}

impl Series {
    /// Median, minimum and maximum of a figure; nothing without moves.
    pub fn spread(&self, of: impl FnMut(&Move) -> f64) -> Option<Spread> {
        Spread::of(self.moves.iter().map(of))
    }

    /// Its median; nothing without moves.
    pub fn median(&self, of: impl FnMut(&Move) -> f64) -> Option<f64> {
        self.spread(of).map(|spread| spread.median)
    }

    /// The way, with the memory where that matters.
    pub fn label(&self) -> String {
        match self.memory {
            Memory::SharedFile if self.peer.is_qemu() => format!("{} (file)", self.peer),
            _ => self.peer.to_string(),
        }
    }
}

/// All series of one case.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CaseFigures {
    /// Its name.
    pub name: String,
    /// What it is.
    pub what: String,
    /// What all ways were given.
    pub conditions: Conditions,
    /// The ways.
    pub series: Vec<Series>,
    /// What a round costs in which nothing is dirty, in ms for each GiB of guest RAM.
    pub clean_round_ms_per_gib: Option<f64>,
    /// What could not be measured besides moves, and why.
    #[serde(default)]
    pub problems: Vec<String>,
}

impl CaseFigures {
    /// The series of a way that has only one.
    pub fn series_of(&self, peer: Peer) -> Option<&Series> {
        let is_it = |series: &&Series| series.peer == peer && !series.moves.is_empty();
        self.series.iter().find(is_it)
    }

    /// QEMU's series with the least median of a figure.
    pub fn best_of_qemu(&self, mut of: impl FnMut(&Move) -> f64) -> Option<&Series> {
        self.series
            .iter()
            .filter(|series| series.peer.is_qemu())
            .filter_map(|series| Some((series.median(&mut of)?, series)))
            .min_by(|(one, _), (other, _)| one.total_cmp(other))
            .map(|(_, series)| series)
    }
}

/// Everything that one run of the comparison has brought.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Figures {
    /// The machine, or the source's.
    pub host: crate::host::Host,
    /// The target's, where that is another.
    pub target_host: Option<crate::host::Host>,
    /// Moves by each way.
    pub runs: usize,
    /// Whether the cases were the small ones.
    pub quick: bool,
    /// The names of the cases that were to be measured: of a run that was cut short, more than are here.
    /// None in figures that know nothing of it, which stand for all.
    #[serde(default)]
    pub planned: Vec<String>,
    /// The cases.
    pub cases: Vec<CaseFigures>,
    /// What was not measured, and why.
    pub left_out: Vec<String>,
}

impl Figures {
    /// A case by its name.
    pub fn case(&self, name: &str) -> Option<&CaseFigures> {
        self.cases.iter().find(|case| case.name == name)
    }

    /// Whether a case was to be measured.
    pub fn is_planned(&self, name: &str) -> bool {
        self.planned.is_empty() || self.planned.iter().any(|case| case == name)
    }
}

/// A count as a number to calculate with.
#[allow(
    clippy::cast_precision_loss,
    reason = "bytes, milliseconds and rows: all far below 2^53"
)]
pub(crate) fn number(count: u64) -> f64 {
    count as f64
}

/// Bytes in MiB.
pub(crate) fn mib(bytes: u64) -> f64 {
    number(bytes) / f64::from(1 << 20)
}

/// Median, minimum and maximum.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// The median.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The most.
    pub max: f64,
}

impl Spread {
    /// Of some values; nothing of none. What is not a number does not count.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().filter(|value| !value.is_nan()).collect();
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            values[middle]
        } else {
            f64::midpoint(values[middle - 1], values[middle])
        };
        Some(Self { median, min, max })
    }

    /// All three divided by the same.
    #[must_use]
    pub fn over(self, divisor: f64) -> Self {
        Self {
            median: self.median / divisor,
            min: self.min / divisor,
            max: self.max / divisor,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spreads() {
        assert_eq!(Spread::of([]), None);
        let spread = |median, min, max| Some(Spread { median, min, max });
        assert_eq!(Spread::of([3.0, 1.0, 2.0]), spread(2.0, 1.0, 3.0));
        assert_eq!(Spread::of([4.0, 1.0, 2.0, 3.0]), spread(2.5, 1.0, 4.0));
    }
}
