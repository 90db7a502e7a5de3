//! Medians with minimum and maximum, for people and as JSON.

use std::fmt::Write as _;

use serde::Serialize;

use crate::course::{Conditions, Measured};

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
