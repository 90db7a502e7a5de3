//! Medians with minimum and maximum, for people and as JSON.

use std::fmt::Write as _;

use serde::Serialize;

use crate::course::{Conditions, Measured};
use crate::peer::Peer;

/// All runs of one way.
#[derive(Clone, Debug, Serialize)]
pub struct Series {
    /// The way.
    pub peer: String,
    /// Its runs, in order.
    pub runs: Vec<Measured>,
}

/// A whole comparison.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// What all ways were given.
    pub conditions: Conditions,
    /// The ways.
    pub series: Vec<Series>,
}

/// Median, minimum and maximum.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// The median.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The most.
    pub max: f64,
}

impl Spread {
    /// Of some values; nothing of none.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().collect();
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
}

impl Comparison {
    /// Why ferry is not good enough, if it is not: a page lost, a median total above the best of the
    /// others', or a median blackout above `blackout_limit_ms`.
    pub fn falls_short(&self, blackout_limit_ms: f64) -> Option<String> {
        let median = |series: &Series, of: fn(&Measured) -> f64| {
            Spread::of(series.runs.iter().map(of)).map_or(f64::INFINITY, |spread| spread.median)
        };
        let (ours, others): (Vec<_>, Vec<_>) = self
            .series
            .iter()
            .partition(|series| series.peer == Peer::Ferry.to_string());
        let best = others
            .iter()
            .map(|series| median(series, |run| run.total_ms));
        let best = best.fold(f64::INFINITY, f64::min);
        ours.iter().find_map(|series| {
            let bad: u64 = series.runs.iter().map(|run| run.bad).sum();
            let total = median(series, |run| run.total_ms);
            let blackout = median(series, |run| run.blackout_ms);
            if bad > 0 {
                Some(format!("{bad} bad pages"))
            } else if total > best {
                Some(format!(
                    "total {total:.1} ms, the best of the others {best:.1} ms"
                ))
            } else if blackout > blackout_limit_ms {
                Some(format!(
                    "blackout {blackout:.1} ms, allowed {blackout_limit_ms:.1} ms"
                ))
            } else {
                None
            }
        })
    }

    /// The table for people: medians, with minimum and maximum in brackets.
    pub fn table(&self) -> String {
        let mut text = String::new();
        let row = |text: &mut String, cells: [String; 5]| {
            let [peer, total, blackout, brownout, bad] = cells;
            _ = writeln!(
                text,
                "{peer:<16} {total:>24} {blackout:>24} {brownout:>24} {bad:>5}"
            );
        };
        let names = ["", "total ms", "blackout ms", "brown-out ms", "bad"];
        row(&mut text, names.map(str::to_owned));
        for series in &self.series {
            let spread = |of: fn(&Measured) -> f64| {
                Spread::of(series.runs.iter().map(of)).map_or_else(String::new, |spread| {
                    format!(
                        "{:.1} ({:.1} – {:.1})",
                        spread.median, spread.min, spread.max
                    )
                })
            };
            let bad: u64 = series.runs.iter().map(|run| run.bad).sum();
            let figures = [
                series.peer.clone(),
                spread(|run| run.total_ms),
                spread(|run| run.blackout_ms),
                spread(|run| run.brownout_ms),
                bad.to_string(),
            ];
            row(&mut text, figures);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::course::Equipment;

    fn series(peer: Peer, total_ms: f64, blackout_ms: f64, bad: u64) -> Series {
        let run = Measured {
            total_ms,
            blackout_ms,
            brownout_ms: 0.0,
            bad,
        };
        Series {
            peer: peer.to_string(),
            runs: vec![run],
        }
    }

    #[test]
    fn tells_what_falls_short() {
        let conditions = Conditions {
            guest_mib: 1,
            data_mib: 1,
            writes_per_s: 0,
            downtime_limit_ms: 1,
            preallocated: true,
            cpus: 1,
            equipment: Equipment::Bare,
        };
        let verdict = |total, blackout, bad| {
            let ours = series(Peer::Ferry, total, blackout, bad);
            let theirs = series(Peer::QemuPrecopy, 10.0, 1.0, 0);
            let series = vec![ours, theirs];
            Comparison { conditions, series }.falls_short(5.0)
        };
        assert_eq!(verdict(10.0, 5.0, 0), None);
        assert!(verdict(10.1, 5.0, 0).unwrap().contains("total"));
        assert!(verdict(10.0, 5.1, 0).unwrap().contains("blackout"));
        assert!(verdict(1.0, 1.0, 1).unwrap().contains("bad"));
    }

    #[test]
    fn spreads() {
        assert_eq!(Spread::of([]), None);
        let odd = Spread::of([3.0, 1.0, 2.0]).unwrap();
        assert_eq!(
            odd,
            Spread {
                median: 2.0,
                min: 1.0,
                max: 3.0
            }
        );
        let even = Spread::of([4.0, 1.0, 2.0, 3.0]).unwrap();
        assert_eq!(
            even,
            Spread {
                median: 2.5,
                min: 1.0,
                max: 4.0
            }
        );
    }
}
