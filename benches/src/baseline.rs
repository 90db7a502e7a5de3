//! What an earlier run has shown, and whether a later one is worse.
//!
//! Machines differ, so a baseline holds ratios: each of Ferry's moves over the median of QEMU's best way
//! in the same run. A figure has got worse when its median is above the baseline's by more than its
//! tolerance *and* above the most that the baseline has seen: one alone is noise, a bad median of few
//! moves in the one case, a baseline that was measured in a quiet hour in the other.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::Path;

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

/// A figure of a baseline, as it is now.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Now {
    /// The ratio.
    Ratio(Spread),
    /// QEMU's best has lost next to nothing: a ratio to that says nothing.
    SaysNothing,
    /// It is not there: no move came through by one of the two sides, or not all of QEMU's did.
    NotMeasured,
}

impl Now {
    fn ratio(self) -> Option<Spread> {
        match self {
            Self::Ratio(spread) => Some(spread),
            Self::SaysNothing | Self::NotMeasured => None,
        }
    }
}

/// One figure, then and now.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// Its case and its name.
    pub what: String,
    /// In the baseline.
    pub then: Spread,
    /// Now.
    pub now: Now,
    /// What its median may be at most.
    pub allowed: f64,
}

/// What the median of a ratio may be at most. Where progress was gained and not lost it is negative, and
/// may be greater all the same.
fn allowed(then: Spread, tolerance: f64) -> f64 {
    then.median + then.median.abs() * tolerance
}

impl Change {
    /// Whether it has got worse beyond the noise, or is no longer measured.
    pub fn is_regression(&self) -> bool {
        match self.now {
            Now::Ratio(now) => now.median > self.allowed && now.median > self.then.max,
            Now::SaysNothing => false,
            Now::NotMeasured => true,
        }
    }

    /// In a word or two; nothing where it is as good as it was.
    pub fn verdict(&self) -> &'static str {
        match self.now {
            Now::NotMeasured => "no longer measured",
            Now::SaysNothing => "QEMU lost nothing",
            Now::Ratio(_) if self.is_regression() => "WORSE",
            Now::Ratio(_) => "",
        }
    }
}

impl Baseline {
    /// Of a run.
    pub fn of(figures: &Figures) -> Self {
        let case = |case: &CaseFigures| {
            let ratios = FIGURES.iter().filter_map(|(measure, _)| {
                Some((measure.name.to_owned(), now(case, *measure).ratio()?))
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

    /// Whether a run of cases of this size compares with it.
    ///
    /// # Errors
    /// When it does not.
    pub fn compares_with(&self, is_quick: bool) -> Result<(), Incomparable> {
        if self.quick == is_quick {
            Ok(())
        } else {
            Err(Incomparable::Sizes)
        }
    }

    /// Everything in it, but for the cases that were not to be measured now.
    ///
    /// # Errors
    /// When the two cannot be compared, or have nothing in common: who compares nothing finds nothing.
    pub fn compare(&self, figures: &Figures) -> Result<Vec<Change>, Incomparable> {
        self.compares_with(figures.quick)?;
        let mut changes = Vec::new();
        let planned = |name: &&String| figures.is_planned(name);
        for name in self.cases.keys().filter(planned) {
            let case = figures.case(name);
            for (measure, tolerance) in FIGURES {
                let Some(&then) = self.cases[name].get(measure.name) else {
                    continue;
                };
                changes.push(Change {
                    what: format!("{name}: {}", measure.name),
                    then,
                    now: case.map_or(Now::NotMeasured, |case| now(case, measure)),
                    allowed: allowed(then, tolerance),
                });
            }
        }
        if changes.is_empty() {
            return Err(Incomparable::NothingInCommon);
        }
        Ok(changes)
    }

    /// The cases in it that were not to be measured now.
    pub fn not_asked<'a>(&'a self, figures: &Figures) -> Vec<&'a str> {
        let names = self.cases.keys().map(String::as_str);
        names.filter(|name| !figures.is_planned(name)).collect()
    }

    /// Writes it to a file: all of it, or what was there before stays.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        let text = serde_json::to_string_pretty(self)?;
        // Where a link points to; what is not there yet, or no file at all, has its own name.
        let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        if fs::metadata(&path).is_ok_and(|it| !it.is_file()) {
            return fs::write(&path, text);
        }
        let mut new = path.clone().into_os_string();
        new.push(format!(".{}.new", std::process::id()));
        let written = fs::write(&new, text).and_then(|()| fs::rename(&new, &path));
        if written.is_err() {
            _ = fs::remove_file(&new);
        }
        written
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

fn now(case: &CaseFigures, measure: Measure) -> Now {
    let Ok((ours, theirs)) = measure.sides(case) else {
        return Now::NotMeasured;
    };
    let (ours, best) = (ours.spread(measure.of), theirs.median(measure.of));
    match (ours, best) {
        (Some(_), Some(best)) if measure.name == LOST.name && best < LEAST_LOSS_S => {
            Now::SaysNothing
        }
        (Some(ours), Some(best)) => Now::Ratio(ours.over(best)),
        _ => Now::NotMeasured,
    }
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
        _ = writeln!(
            text,
            "{:<24}{:>22}{:>22}{:>9.2}  {}",
            change.what,
            cell(change.then),
            change.now.ratio().map_or_else(|| "-".into(), cell),
            change.allowed.max(change.then.max),
            change.verdict(),
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hold;

    fn change(then: [f64; 3], now: f64, allowed: f64) -> Change {
        let [min, median, max] = then;
        Change {
            what: "case: total".into(),
            then: Spread { median, min, max },
            now: Now::Ratio(Spread::of([now]).unwrap()),
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

    #[test]
    fn a_gain_may_be_somewhat_less() {
        let then = Spread {
            median: -0.4,
            min: -0.4,
            max: -0.4,
        };
        let allowed = allowed(then, 0.25);
        assert!((allowed - -0.3).abs() < 1e-9, "{allowed}");
        assert!(!change([-0.4; 3], -0.39, allowed).is_regression());
        assert!(change([-0.4; 3], -0.2, allowed).is_regression());
    }

    #[test]
    fn what_is_no_longer_measured_is_a_regression() {
        let then = hold::tests::figures(&[100.0; 10]);
        let base = Baseline::of(&then);
        let regressions = |now: &Figures| {
            let changes = base.compare(now).unwrap();
            let worse = changes.into_iter().filter(Change::is_regression);
            worse.map(|change| change.what).collect::<Vec<_>>()
        };
        assert_eq!(regressions(&then), Vec::<String>::new());
        let mut now = then.clone();
        now.cases[0].series[0].moves.clear();
        assert!(regressions(&now).contains(&"writes: total".into()));
        now = then.clone();
        now.cases[0].series[2].failures.push("no reason".into());
        assert!(regressions(&now).contains(&"writes: total".into()));
        now.cases.clear();
        assert!(regressions(&now).contains(&"writes: total".into()));
        // What was not to be measured is not missing, but nothing else is left to compare.
        now.planned = vec!["idle".into()];
        assert_eq!(base.not_asked(&now), ["writes"]);
        let nothing = base.compare(&now).unwrap_err();
        assert_eq!(nothing, Incomparable::NothingInCommon);
    }

    #[test]
    fn a_loss_too_small_for_a_ratio_is_no_regression() {
        let then = hold::tests::figures(&[100.0; 10]);
        let mut now = then.clone();
        for series in &mut now.cases[0].series[1..] {
            for run in &mut series.moves {
                run.guest.as_mut().unwrap().lost_s = 0.001;
            }
        }
        let changes = Baseline::of(&then).compare(&now).unwrap();
        let lost = changes.iter().find(|it| it.what == "writes: lost").unwrap();
        assert_eq!(lost.now, Now::SaysNothing);
        assert!(!lost.is_regression());
    }

    #[test]
    fn a_baseline_is_written_as_a_whole() {
        let folder = tempfile::TempDir::new().unwrap();
        let path = folder.path().join("base.json");
        fs::write(&path, "what was there").unwrap();
        let before = fs::File::open(&path).unwrap();
        let base = Baseline::of(&hold::tests::figures(&[100.0]));
        base.save(&path).unwrap();
        let after: Baseline = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        assert!(after.cases.keys().eq(base.cases.keys()));
        // Whoever reads the old one has it to the end, and nothing else lies there.
        let old = io::read_to_string(before).unwrap();
        assert_eq!(old, "what was there");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        assert!(base.save(&folder.path().join("none/base.json")).is_err());
    }
}
