//! The figures that Ferry must hold, each against what was measured.

use std::fmt::Write as _;

use crate::figures::{CaseFigures, Figures, Move, Series, number};
use crate::peer::Peer;

/// Engine memory besides guest RAM, in MiB.
const ENGINE_MEMORY_MIB: f64 = 64.0;

/// One figure.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Its case.
    pub case: &'static str,
    /// What is measured, with its unit.
    pub what: &'static str,
    /// What it may be at most.
    pub limit: f64,
    /// What it is; nothing where the case or one of the two sides was not measured.
    pub measured: Option<f64>,
    /// What it comes from.
    pub from: String,
}

impl Row {
    /// Whether it holds; nothing when it was not measured.
    pub fn holds(&self) -> Option<bool> {
        self.measured.map(|measured| measured <= self.limit)
    }
}

/// All of them.
pub fn rows(figures: &Figures) -> Vec<Row> {
    let book = Book { figures };
    vec![
        book.ratio("idle", TOTAL, 0.30),
        book.ratio("idle-cold", TOTAL, 0.50),
        book.median_blackout("writes", 12.0),
        book.longest_blackout("writes"),
        book.ratio("writes", TOTAL, 0.50),
        book.longest_blackout("link"),
        book.ratio("link", TOTAL, 0.95),
        book.ratio("link-text", TOTAL, 0.80),
        book.ratio("link-text", WIRE, 0.95),
        book.lost("writes"),
        book.ratio("large", TOTAL, 0.25),
        book.over_switchover("blackout", 1.25),
        book.engine_memory("large"),
        book.clean_round("large", 1.0),
    ]
}

/// What is missed, a line each: a figure above its limit, a page that the guest found bad, a move that
/// failed. A quick run has other guests than those that the limits are for.
pub fn missed(figures: &Figures) -> Vec<String> {
    let above = |row: &Row| {
        let measured = row.measured.filter(|_| row.holds() == Some(false))?;
        let Row {
            case, what, limit, ..
        } = row;
        Some(format!("{case}: {what}: {measured:.2}, at most {limit:.2}"))
    };
    let mut missed: Vec<String> = Vec::new();
    if !figures.quick {
        missed.extend(rows(figures).iter().filter_map(above));
    }
    for case in &figures.cases {
        for series in case.series.iter().filter(|series| series.peer.is_ferry()) {
            let bad: u64 = series.moves.iter().map(Move::bad).sum();
            if bad > 0 {
                missed.push(format!("{}: {}: {bad} bad pages", case.name, series.peer));
            }
            for failure in &series.failures {
                missed.push(format!("{}: {}: {failure}", case.name, series.peer));
            }
        }
    }
    missed
}

/// The rows as a table.
pub fn table(rows: &[Row]) -> String {
    let mut text = format!(
        "\n{:<11}{:<48}{:>10}{:>10}  {:<8}\n",
        "must hold", "", "measured", "at most", ""
    );
    for row in rows {
        let number = |value: f64| {
            if value.is_finite() {
                format!("{value:.2}")
            } else {
                "-".into()
            }
        };
        let measured = number(row.measured.unwrap_or(f64::NAN));
        let limit = number(row.limit);
        let verdict = verdict(row);
        _ = writeln!(
            text,
            "{:<11}{:<48}{measured:>10}{limit:>10}  {verdict:<8}{}",
            row.case, row.what, row.from
        );
    }
    text
}

/// In a word.
pub fn verdict(row: &Row) -> &'static str {
    match row.holds() {
        Some(true) => "holds",
        Some(false) => "MISSED",
        None => "unknown",
    }
}

/// A figure that is compared with QEMU's best.
#[derive(Clone, Copy)]
pub struct Measure {
    /// Its name in the baseline.
    pub name: &'static str,
    /// What stands in the table.
    pub what: &'static str,
    /// Of a move.
    pub of: fn(&Move) -> f64,
    /// What decides which of QEMU's ways is its best: the total, or the figure itself.
    pub best_by: fn(&Move) -> f64,
}

/// The time that a move takes.
pub const TOTAL: Measure = Measure {
    name: "total",
    what: "total, ratio to QEMU's best",
    of: |run| run.total_ms,
    best_by: |run| run.total_ms,
};

/// The bytes that it needs, against those of QEMU's fastest way.
pub const WIRE: Measure = Measure {
    name: "wire",
    what: "bytes on the wire, ratio to QEMU's fastest",
    of: |run| number(run.wire_bytes),
    best_by: |run| run.total_ms,
};

/// The guest's progress that it costs, against QEMU's way that costs least.
pub const LOST: Measure = Measure {
    name: "lost",
    what: "progress lost, ratio to QEMU's best",
    of: Move::lost_s,
    best_by: Move::lost_s,
};

/// The blackout, against QEMU's shortest.
pub const BLACKOUT: Measure = Measure {
    name: "blackout",
    what: "blackout, ratio to QEMU's shortest",
    of: |run| run.blackout_ms,
    best_by: |run| run.blackout_ms,
};

impl Measure {
    /// Plain `ferry`'s moves, and QEMU's best way, where both were measured.
    pub fn sides(self, case: &CaseFigures) -> Option<(&Series, &Series)> {
        let ours = case.series_of(Peer::Ferry)?;
        Some((ours, case.best_of_qemu(self.best_by)?))
    }
}

/// Where rows are made.
struct Book<'a> {
    figures: &'a Figures,
}

impl Book<'_> {
    fn row<const N: usize>(
        &self,
        name: &'static str,
        what: &'static str,
        limit: f64,
        measure: impl FnOnce(&CaseFigures) -> Option<(f64, [String; N])>,
    ) -> Row {
        let found = self.figures.case(name).and_then(measure);
        let (measured, from) = match found {
            Some((measured, from)) => (Some(measured), from.join(" / ")),
            None => (None, String::new()),
        };
        Row {
            case: name,
            what,
            limit,
            measured,
            from,
        }
    }

    fn ratio(&self, name: &'static str, measure: Measure, limit: f64) -> Row {
        self.row(name, measure.what, limit, |case| {
            let (ours, theirs) = measure.sides(case)?;
            let (mine, best) = (ours.median(measure.of)?, theirs.median(measure.of)?);
            let from = [(ours, mine), (theirs, best)]
                .map(|(series, figure)| format!("{} {figure:.2}", series.label()));
            Some((mine / best, from))
        })
    }

    /// In seconds, against QEMU's best: where that has lost next to nothing a ratio says nothing.
    fn lost(&self, name: &'static str) -> Row {
        let sides = |case| {
            let (ours, theirs) = LOST.sides(case)?;
            let best = theirs.median(LOST.of)?;
            Some((ours.median(LOST.of)?, best.max(0.0), theirs.label()))
        };
        let found = self.figures.case(name).and_then(sides);
        let limit = found.as_ref().map_or(f64::NAN, |(_, best, _)| *best);
        self.row(name, "progress lost, s, QEMU's best at most", limit, |_| {
            found.map(|(mine, _, label)| (mine.max(0.0), [format!("the limit is {label}")]))
        })
    }

    fn median_blackout(&self, name: &'static str, limit_ms: f64) -> Row {
        self.row(name, "blackout, median, ms", limit_ms, |case| {
            let ours = case.series_of(Peer::Ferry)?;
            Some((ours.median(BLACKOUT.of)?, [moves(ours)]))
        })
    }

    fn longest_blackout(&self, name: &'static str) -> Row {
        let limit_ms = self
            .figures
            .case(name)
            .map_or(f64::NAN, |case| number(case.conditions.downtime_limit_ms));
        self.row(name, "blackout, the longest, ms", limit_ms, |case| {
            let ours = case.series_of(Peer::Ferry)?;
            Some((ours.spread(BLACKOUT.of)?.max, [moves(ours)]))
        })
    }

    fn over_switchover(&self, name: &'static str, limit: f64) -> Row {
        let what = "blackout, ratio to an empty switchover";
        self.row(name, what, limit, |case| {
            let median = |peer| case.series_of(peer)?.median(BLACKOUT.of);
            let (ours, empty) = (median(Peer::Ferry)?, median(Peer::Switchover)?);
            let from = [("ferry", ours), ("switchover", empty)]
                .map(|(name, ms)| format!("{name} {ms:.2}"));
            Some((ours / empty, from))
        })
    }

    fn engine_memory(&self, name: &'static str) -> Row {
        let what = "engine memory, the greater side, MiB";
        self.row(name, what, ENGINE_MEMORY_MIB, |case| {
            let ours = case.series_of(Peer::Ferry)?;
            let peak = ours.spread(|run| {
                let engine = run.engine.as_ref();
                let kib = engine.map_or(0, |it| it.source_peak_kib.max(it.target_peak_kib));
                number(kib) / 1024.0
            });
            Some((peak?.max, [moves(ours)]))
        })
    }

    fn clean_round(&self, name: &'static str, limit: f64) -> Row {
        let what = "a round with nothing dirty, ms/GiB";
        self.row(name, what, limit, |case| {
            Some((case.clean_round_ms_per_gib?, []))
        })
    }
}

fn moves(series: &Series) -> String {
    format!("{} moves", series.moves.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::case::Case;
    use crate::figures::GuestFigures;
    use crate::host::Host;
    use crate::peer::Memory;

    fn host() -> Host {
        Host {
            cpu: String::new(),
            cpus: 2,
            memory_mib: 0,
            kernel: String::new(),
            qemu: String::new(),
            ferry: String::new(),
            testbed: Vec::new(),
            huge_pages: Default::default(),
        }
    }

    /// Moves of these totals in ms, a tenth of that black, a thousandth of it lost in s.
    fn series(peer: Peer, memory: Memory, totals_ms: &[f64]) -> Series {
        let moved = |&total_ms: &f64| Move {
            total_ms,
            blackout_ms: total_ms / 10.0,
            guest: Some(GuestFigures {
                lost_s: total_ms / 1000.0,
                ..GuestFigures::default()
            }),
            ..Move::default()
        };
        Series {
            peer,
            memory,
            moves: totals_ms.iter().map(moved).collect(),
            failures: Vec::new(),
        }
    }

    fn figures(ours_ms: &[f64]) -> Figures {
        let cases = Case::all();
        let writes = cases.iter().find(|case| case.name == "writes").unwrap();
        let case = CaseFigures {
            name: writes.name.into(),
            what: writes.what.into(),
            conditions: writes.conditions,
            series: vec![
                series(Peer::Ferry, Memory::SharedFile, ours_ms),
                series(Peer::Precopy, Memory::Private, &[200.0, 220.0, 900.0]),
                series(Peer::Precopy, Memory::SharedFile, &[300.0]),
            ],
            clean_round_ms_per_gib: None,
        };
        Figures {
            host: host(),
            target_host: None,
            runs: 3,
            quick: false,
            cases: vec![case],
            left_out: Vec::new(),
        }
    }

    #[test]
    fn the_best_of_the_others_is_the_measure() {
        let rows = rows(&figures(&[100.0, 110.0, 120.0]));
        let row = |what: &str| {
            let is_it = |row: &&Row| row.case == "writes" && row.what == what;
            rows.iter().find(is_it).unwrap()
        };
        assert_eq!(row(TOTAL.what).measured, Some(0.5));
        assert_eq!(row(TOTAL.what).holds(), Some(true));
        let lost = row("progress lost, s, QEMU's best at most");
        assert_eq!((lost.measured, lost.limit), (Some(0.11), 0.22));
        assert_eq!(row("blackout, median, ms").measured, Some(11.0));
        assert_eq!(row("blackout, the longest, ms").measured, Some(12.0));
        let unmeasured = rows.iter().filter(|row| row.case != "writes");
        assert!(unmeasured.clone().count() > 5);
        assert!(unmeasured.clone().all(|row| row.holds().is_none()));
    }

    #[test]
    fn what_is_missed_is_told() {
        assert_eq!(missed(&figures(&[100.0])), Vec::<String>::new());
        // Too slow, and once above the limit of 20 ms.
        let slow = missed(&figures(&[100.0, 115.0, 210.0]));
        assert_eq!(slow.len(), 2, "{slow:?}");
        let mut bad = figures(&[100.0]);
        let run = &mut bad.cases[0].series[0].moves[0];
        run.guest.as_mut().unwrap().bad = 1;
        bad.cases[0].series[0].failures.push("it hung".into());
        // Of a small guest only what no guest may have.
        bad.quick = true;
        assert_eq!(missed(&bad).len(), 2);
    }

    #[test]
    fn nothing_lost_is_never_too_much() {
        let lost = |ours: f64, best: f64| {
            let mut figures = figures(&[ours * 1000.0]);
            figures.cases[0].series[1] = series(Peer::Precopy, Memory::Private, &[best * 1000.0]);
            let found = rows(&figures);
            let row = found
                .iter()
                .find(|row| row.what.starts_with("progress lost"));
            row.unwrap().holds()
        };
        assert_eq!(lost(-0.1, 0.1), Some(true));
        assert_eq!(lost(0.0, -0.1), Some(true));
        assert_eq!(lost(0.2, 0.1), Some(false));
        assert_eq!(lost(0.1, -0.1), Some(false));
    }
}
