//! What an earlier run has shown, and whether a later one is worse.
//!
//! Machines differ, so a baseline holds ratios: each of Ferry's moves over the median of QEMU's best way
//! in the same run. A figure has got worse when its median is above the baseline's by more than its
//! tolerance *and* above the most that the baseline has seen: one alone is noise, a bad median of few
//! moves in the one case, a baseline that was measured in a quiet hour in the other.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use crate::figures::{CaseFigures, Figures, Spread};
use crate::hold::{BLACKOUT, LOST, Measure, TOTAL, WIRE};
use crate::host::Host;

/// A figure, and by which part its median may be above the baseline's.
const FIGURES: [(Measure, f64); 4] = [(TOTAL, 0.15), (WIRE, 0.05), (BLACKOUT, 0.50), (LOST, 0.50)];

/// A loss of QEMU's that is below this is noise, and no ratio to it says anything.
const LEAST_LOSS_S: f64 = 0.02;

/// The ratios of one run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Baseline {
    /// Where it was measured.
    pub host: Host,
    /// Moves by each way.
    pub runs: usize,
    /// Whether the cases were the small ones: those compare only with each other.
    pub quick: bool,
    /// The ratios by case and figure.
    pub cases: BTreeMap<String, BTreeMap<String, Spread>>,
}

/// One figure, then and now.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// Its case and its name.
    pub what: String,
    /// In the baseline.
    pub then: Spread,
    /// Now.
    pub now: Spread,
    /// What its median may be at most.
    pub allowed: f64,
}

impl Change {
    /// Whether it has got worse beyond the noise.
    pub fn is_regression(&self) -> bool {
        self.now.median > self.allowed && self.now.median > self.then.max
    }
}

impl Baseline {
    /// Of a run.
    pub fn of(figures: &Figures) -> Self {
        let case = |case: &CaseFigures| {
            let ratios = FIGURES.iter().filter_map(|(measure, _)| {
                Some((measure.name.to_owned(), ratios(case, *measure)?))
            });
            (case.name.clone(), ratios.collect())
        };
        Self {
            host: figures.host.clone(),
            runs: figures.runs,
            quick: figures.quick,
            cases: figures.cases.iter().map(case).collect(),
        }
    }

    /// Everything that both have.
    ///
    /// # Errors
    /// When they cannot be compared, or have nothing in common: who compares nothing finds nothing.
    pub fn compare(&self, now: &Self) -> Result<Vec<Change>, Incomparable> {
        if self.quick != now.quick {
            return Err(Incomparable::Sizes);
        }
        let mut changes = Vec::new();
        for (case, figures) in &self.cases {
            for (measure, tolerance) in FIGURES {
                let then = figures.get(measure.name);
                let later = now.cases.get(case).and_then(|it| it.get(measure.name));
                let (Some(&then), Some(&now)) = (then, later) else {
                    continue;
                };
                changes.push(Change {
                    what: format!("{case}: {}", measure.name),
                    then,
                    now,
                    allowed: then.median * (1.0 + tolerance),
                });
            }
        }
        if changes.is_empty() {
            return Err(Incomparable::NothingInCommon);
        }
        Ok(changes)
    }
}

/// Why two runs cannot be compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Incomparable {
    /// One of them is quick.
    #[error("a quick run compares only with a baseline of a quick run")]
    Sizes,
    /// No case, or no way.
    #[error(
        "the baseline and this run have no figure in common: both need ferry and one of QEMU's ways"
    )]
    NothingInCommon,
}

fn ratios(case: &CaseFigures, measure: Measure) -> Option<Spread> {
    let (ours, theirs) = measure.sides(case)?;
    let best = theirs.median(measure.of)?;
    if measure.name == LOST.name && best < LEAST_LOSS_S {
        return None;
    }
    Some(ours.spread(measure.of)?.over(best))
}

/// The comparison for people.
pub fn table(changes: &[Change]) -> String {
    let mut text = format!(
        "\n{:<24}{:>22}{:>22}{:>9}\n",
        "ratio to QEMU's best", "baseline", "now", "allowed"
    );
    for change in changes {
        let cell = |spread: Spread| {
            let Spread { median, min, max } = spread;
            format!("{median:.2} ({min:.2} – {max:.2})")
        };
        let word = if change.is_regression() {
            "  WORSE"
        } else {
            ""
        };
        _ = writeln!(
            text,
            "{:<24}{:>22}{:>22}{:>9.2}{word}",
            change.what,
            cell(change.then),
            cell(change.now),
            change.allowed.max(change.then.max),
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(then: [f64; 3], now: f64, allowed: f64) -> Change {
        let [min, median, max] = then;
        Change {
            what: "case: total".into(),
            then: Spread { median, min, max },
            now: Spread::of([now]).unwrap(),
            allowed,
        }
    }

    #[test]
    fn worse_is_beyond_the_tolerance_and_beyond_the_noise() {
        let then = [0.9, 1.0, 1.3];
        assert!(!change(then, 1.1, 1.15).is_regression());
        assert!(!change(then, 1.25, 1.15).is_regression());
        assert!(change(then, 1.31, 1.15).is_regression());
        assert!(!change([0.99, 1.0, 1.01], 1.1, 1.15).is_regression());
    }
}
