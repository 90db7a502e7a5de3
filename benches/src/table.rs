//! The figures for people, on a terminal: medians, with minimum and maximum in brackets.

use std::fmt::Write as _;

use crate::figures::{CaseFigures, Figures, Move, Series, mib};

/// A figure of a move, with its heading.
struct Column {
    name: &'static str,
    digits: usize,
    of: fn(&Move) -> f64,
}

const COLUMNS: [Column; 7] = [
    Column {
        name: "total ms",
        digits: 0,
        of: Move::to_the_end_ms,
    },
    Column {
        name: "blackout ms",
        digits: 1,
        of: |run| run.blackout_ms,
    },
    Column {
        name: "brown-out ms",
        digits: 0,
        of: |run| run.of_guest(|guest| guest.brownout_ms),
    },
    Column {
        name: "lost s",
        digits: 2,
        of: Move::lost_s,
    },
    Column {
        name: "wire MiB",
        digits: 0,
        of: |run| mib(run.wire_bytes),
    },
    Column {
        name: "CPU source s",
        digits: 2,
        of: |run| run.source.migration_s,
    },
    Column {
        name: "CPU target s",
        digits: 2,
        of: |run| run.target.migration_s,
    },
];

/// All cases.
pub fn of(figures: &Figures) -> String {
    let mut text = String::new();
    for case in &figures.cases {
        add_case(&mut text, case);
    }
    for what in &figures.left_out {
        _ = writeln!(text, "left out: {what}");
    }
    text
}

fn add_case(text: &mut String, case: &CaseFigures) {
    _ = writeln!(text, "\n{}: {}", case.name, case.what);
    _ = write!(text, "{:<22}", "");
    for column in COLUMNS {
        _ = write!(text, "{:>23}", column.name);
    }
    _ = writeln!(text, "{:>5}{:>7}", "bad", "failed");
    for series in &case.series {
        add_series(text, series);
    }
    for series in &case.series {
        for failure in &series.failures {
            _ = writeln!(text, "FAILED: {}: {failure}", series.label());
        }
    }
    for problem in &case.problems {
        _ = writeln!(text, "NOT MEASURED: {problem}");
    }
    if let Some(ms) = case.clean_round_ms_per_gib {
        _ = writeln!(text, "a round with nothing dirty: {ms:.2} ms/GiB");
    }
}

fn add_series(text: &mut String, series: &Series) {
    _ = write!(text, "{:<22}", series.label());
    for Column { digits, of, .. } in COLUMNS {
        let cell = series.spread(of).map_or_else(
            || "-".into(),
            |spread| {
                let number = |value: f64| format!("{value:.digits$}");
                let [median, min, max] = [spread.median, spread.min, spread.max].map(number);
                format!("{median} ({min} – {max})")
            },
        );
        _ = write!(text, "{cell:>23}");
    }
    let bad: u64 = series.moves.iter().map(Move::bad).sum();
    _ = writeln!(text, "{bad:>5}{:>7}", series.failures.len());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{hold, html};

    #[test]
    fn each_side_has_its_cpu_time() {
        let mut figures = hold::tests::figures(&[100.0]);
        for series in &mut figures.cases[0].series {
            for run in &mut series.moves {
                (run.source.migration_s, run.target.migration_s) = (1.25, 2.75);
            }
        }
        let text = of(&figures);
        let page = html::page(&figures);
        for side in ["1.25 (1.25 – 1.25)", "2.75 (2.75 – 2.75)"] {
            assert_eq!(text.matches(side).count(), 3, "{text}");
            assert_eq!(page.matches(side).count(), 3, "{side}");
        }
    }
}
