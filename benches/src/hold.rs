//! The figures that Ferry must hold, each against what was measured.

use std::fmt::Write as _;

use crate::figures::{CaseFigures, Figures, Move, Series, number};
use crate::peer::Peer;

/// Engine memory besides guest RAM, in MiB.
const ENGINE_MEMORY_MIB: f64 = 64.0;

/// The longest blackout counts as that of so many moves by plain `ferry`: the longest of fewer says less.
pub const LONGEST_OF: usize = 10;

/// One figure.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Its case.
    pub case: &'static str,
    /// What is measured, with its unit.
    pub what: &'static str,
    /// What it may be at most.
    pub limit: f64,
    /// What it is, or why nobody knows.
    pub measured: Result<f64, Unknown>,
    /// What it comes from.
    pub from: String,
}

/// Why a figure is unknown.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unknown {
    /// Nobody wanted it.
    #[error("the case was not asked for")]
    NotAsked,
    /// The case is not among those measured.
    #[error("the case was not measured")]
    NoCase,
    /// No move came through.
    #[error("no move by {0}")]
    NoMove(Peer),
    /// None by any of QEMU's ways.
    #[error("no move by QEMU's own ways")]
    NoMoveByQemu,
    /// What it is compared with might have been better, had all of it come through.
    #[error("{failed} of {all} moves by {way} failed")]
    Failed {
        /// The way.
        way: String,
        /// Moves that came to nothing.
        failed: usize,
        /// All moves.
        all: usize,
    },
    /// The most of too few.
    #[error("{moves} moves, {LONGEST_OF} are needed")]
    TooFew {
        /// How many there are.
        moves: usize,
    },
    /// The moves tell nothing of it.
    #[error("it was not measured")]
    NotMeasured,
}

impl Row {
    /// Whether it holds; nothing when it was not measured.
    pub fn holds(&self) -> Option<bool> {
        let measured = self.measured.as_ref().ok()?;
        Some(*measured <= self.limit)
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
        // Of the large guest nearly all is empty, and skipped.
        book.clean_round("idle", 1.0),
        book.clean_round("large", 1.0),
    ]
}

/// What is missed, a line each: a figure above its limit or unknown, of the cases that were to be
/// measured, and whatever is [`broken`]. A quick run has other guests than those that the limits are for.
pub fn missed(figures: &Figures) -> Vec<String> {
    let mut missed = broken(figures);
    if figures.quick {
        return missed;
    }
    let rows = rows(figures);
    let judged = || rows.iter().filter(|row| figures.is_planned(row.case));
    if judged().next().is_none() {
        missed.push("none of these cases has a figure that must hold".into());
    }
    missed.extend(judged().filter_map(|row| {
        let Row {
            case, what, limit, ..
        } = row;
        match &row.measured {
            Ok(_) if row.holds() == Some(true) => None,
            Ok(measured) => Some(format!("{case}: {what}: {measured:.2}, at most {limit:.2}")),
            Err(unknown) => Some(format!("{case}: {what}: unknown: {unknown}")),
        }
    }));
    missed
}

/// What no run may have, a line each: a page that the guest found bad, a move of Ferry's that failed, a
/// way by which no move came through, a case without any.
pub fn broken(figures: &Figures) -> Vec<String> {
    let mut broken: Vec<String> = Vec::new();
    for case in &figures.cases {
        if case.series.is_empty() {
            broken.push(format!("{}: nothing was measured", case.name));
        }
        for series in &case.series {
            let mut tell = |what| broken.push(format!("{}: {}: {what}", case.name, series.label()));
            if series.peer.is_ferry() {
                let bad: u64 = series.moves.iter().map(Move::bad).sum();
                if bad > 0 {
                    tell(format!("{bad} bad pages"));
                }
                series.failures.iter().cloned().for_each(&mut tell);
            }
            if series.moves.is_empty() {
                tell("no move came through".into());
            }
        }
    }
    if figures.cases.is_empty() {
        broken.push("nothing was measured".into());
    }
    broken
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
        let measured = number(*row.measured.as_ref().unwrap_or(&f64::NAN));
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
    /// Plain `ferry`'s moves, and QEMU's best way, where both were measured and all of QEMU's moves came
    /// through: who fails may have been the best.
    pub fn sides(self, case: &CaseFigures) -> Result<(&Series, &Series), Unknown> {
        let ours = of_peer(case, Peer::Ferry)?;
        let theirs = case.series.iter().filter(|series| series.peer.is_qemu());
        theirs.clone().try_for_each(all_came_through)?;
        let best = case.best_of_qemu(self.best_by);
        Ok((ours, best.ok_or(Unknown::NoMoveByQemu)?))
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
        measure: impl FnOnce(&CaseFigures) -> Result<(f64, [String; N]), Unknown>,
    ) -> Row {
        let (measured, from) = match self.case(name).and_then(measure) {
            Ok((measured, from)) => (Ok(measured), from.join(" / ")),
            Err(unknown) => {
                let why = unknown.to_string();
                (Err(unknown), why)
            }
        };
        Row {
            case: name,
            what,
            limit,
            measured,
            from,
        }
    }

    fn case(&self, name: &str) -> Result<&CaseFigures, Unknown> {
        let why = if self.figures.is_planned(name) {
            Unknown::NoCase
        } else {
            Unknown::NotAsked
        };
        self.figures.case(name).ok_or(why)
    }

    fn ratio(&self, name: &'static str, measure: Measure, limit: f64) -> Row {
        self.row(name, measure.what, limit, |case| {
            let (ours, theirs) = measure.sides(case)?;
            let (mine, best) = (median(ours, measure.of)?, median(theirs, measure.of)?);
            let from = [(ours, mine), (theirs, best)]
                .map(|(series, figure)| format!("{} {figure:.2}", series.label()));
            Ok((mine / best, from))
        })
    }

    /// In seconds, against QEMU's best: where that has lost next to nothing a ratio says nothing.
    fn lost(&self, name: &'static str) -> Row {
        let sides = |case| {
            let (ours, theirs) = LOST.sides(case)?;
            let best = median(theirs, LOST.of)?;
            Ok((median(ours, LOST.of)?, best.max(0.0), theirs.label()))
        };
        let found = self.case(name).and_then(sides);
        let limit = found.as_ref().map_or(f64::NAN, |(_, best, _)| *best);
        self.row(name, "progress lost, s, QEMU's best at most", limit, |_| {
            found.map(|(mine, _, label)| (mine.max(0.0), [format!("the limit is {label}")]))
        })
    }

    fn median_blackout(&self, name: &'static str, limit_ms: f64) -> Row {
        self.row(name, "blackout, median, ms", limit_ms, |case| {
            let ours = of_peer(case, Peer::Ferry)?;
            Ok((median(ours, BLACKOUT.of)?, [moves(ours)]))
        })
    }

    fn longest_blackout(&self, name: &'static str) -> Row {
        let limit_ms = self
            .figures
            .case(name)
            .map_or(f64::NAN, |case| number(case.conditions.downtime_limit_ms));
        self.row(name, "blackout, the longest, ms", limit_ms, |case| {
            let ours = of_peer(case, Peer::Ferry)?;
            let moved = ours.moves.len();
            if moved < LONGEST_OF {
                return Err(Unknown::TooFew { moves: moved });
            }
            let spread = ours.spread(BLACKOUT.of).ok_or(Unknown::NotMeasured)?;
            Ok((spread.max, [moves(ours)]))
        })
    }

    fn over_switchover(&self, name: &'static str, limit: f64) -> Row {
        let what = "blackout, ratio to an empty switchover";
        self.row(name, what, limit, |case| {
            let switchover = case.series.iter();
            let mut switchover = switchover.filter(|it| it.peer == Peer::Switchover);
            switchover.try_for_each(all_came_through)?;
            let of = |peer| median(of_peer(case, peer)?, BLACKOUT.of);
            let (ours, empty) = (of(Peer::Ferry)?, of(Peer::Switchover)?);
            let from = [("ferry", ours), ("switchover", empty)]
                .map(|(name, ms)| format!("{name} {ms:.2}"));
            Ok((ours / empty, from))
        })
    }

    fn engine_memory(&self, name: &'static str) -> Row {
        let what = "engine memory, the greater side, MiB";
        self.row(name, what, ENGINE_MEMORY_MIB, |case| {
            let ours = of_peer(case, Peer::Ferry)?;
            let peak = ours.spread(|run| {
                let engine = run.engine.as_ref();
                let kib = engine.map(|it| it.source_peak_kib.max(it.target_peak_kib));
                kib.map_or(f64::NAN, |kib| number(kib) / 1024.0)
            });
            let peak = peak.ok_or(Unknown::NotMeasured)?;
            Ok((peak.max, [moves(ours)]))
        })
    }

    fn clean_round(&self, name: &'static str, limit: f64) -> Row {
        let what = "a round with nothing dirty, ms/GiB";
        self.row(name, what, limit, |case| {
            let ms = case.clean_round_ms_per_gib.ok_or(Unknown::NotMeasured)?;
            Ok((ms, []))
        })
    }
}

fn of_peer(case: &CaseFigures, peer: Peer) -> Result<&Series, Unknown> {
    case.series_of(peer).ok_or(Unknown::NoMove(peer))
}

fn median(series: &Series, of: fn(&Move) -> f64) -> Result<f64, Unknown> {
    series.median(of).ok_or(Unknown::NotMeasured)
}

fn all_came_through(series: &Series) -> Result<(), Unknown> {
    let failed = series.failures.len();
    if failed == 0 {
        return Ok(());
    }
    Err(Unknown::Failed {
        way: series.label(),
        failed,
        all: failed + series.moves.len(),
    })
}

fn moves(series: &Series) -> String {
    format!("{} moves", series.moves.len())
}

#[cfg(test)]
pub(crate) mod tests {
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
            wire_bytes: 1 << 20,
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

    /// Of the case `writes`.
    pub(crate) fn figures(ours_ms: &[f64]) -> Figures {
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
            problems: Vec::new(),
        };
        Figures {
            host: host(),
            target_host: None,
            runs: 3,
            quick: false,
            planned: vec![writes.name.into()],
            cases: vec![case],
            left_out: Vec::new(),
        }
    }

    /// Ten moves: so many that the longest of them counts.
    fn ten(total_ms: f64) -> Vec<f64> {
        vec![total_ms; LONGEST_OF]
    }

    #[test]
    fn the_best_of_the_others_is_the_measure() {
        let mut ours_ms = ten(110.0);
        (ours_ms[0], ours_ms[9]) = (100.0, 120.0);
        let rows = rows(&figures(&ours_ms));
        let row = |what: &str| {
            let is_it = |row: &&Row| row.case == "writes" && row.what == what;
            rows.iter().find(is_it).unwrap()
        };
        assert_eq!(row(TOTAL.what).measured, Ok(0.5));
        assert_eq!(row(TOTAL.what).holds(), Some(true));
        let lost = row("progress lost, s, QEMU's best at most");
        assert_eq!((&lost.measured, lost.limit), (&Ok(0.11), 0.22));
        assert_eq!(row("blackout, median, ms").measured, Ok(11.0));
        assert_eq!(row("blackout, the longest, ms").measured, Ok(12.0));
        let unmeasured = rows.iter().filter(|row| row.case != "writes");
        assert!(unmeasured.clone().count() > 5);
        assert!(unmeasured.clone().all(|row| row.holds().is_none()));
    }

    #[test]
    fn what_is_missed_is_told() {
        assert_eq!(missed(&figures(&ten(100.0))), Vec::<String>::new());
        // Too slow, and once above the limit of 20 ms.
        let mut slow_ms = ten(115.0);
        slow_ms[3] = 210.0;
        let slow = missed(&figures(&slow_ms));
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
    fn what_is_unknown_does_not_hold() {
        let told = |figures: &Figures, why: &str| {
            let missed = missed(figures);
            missed.iter().filter(|line| line.contains(why)).count()
        };
        // The longest of nine is not the longest of ten.
        let nine = figures(&ten(100.0)[1..]);
        assert_eq!(told(&nine, "unknown: 9 moves, 10 are needed"), 1);
        assert_eq!(missed(&nine).len(), 1);
        // A case that was to be measured and is not there; of old figures, all.
        let mut cut_short = figures(&ten(100.0));
        cut_short.planned.push("idle".into());
        assert_eq!(told(&cut_short, "idle: total"), 1);
        cut_short.planned.clear();
        assert_eq!(told(&cut_short, "unknown"), 11);
        // Nothing of these must hold.
        cut_short.planned.push("hot".into());
        assert_eq!(missed(&cut_short).len(), 1);
        // Whoever failed might have been QEMU's best.
        let mut failed = figures(&ten(100.0));
        failed.cases[0].series[2].failures.push("no reason".into());
        let why = "unknown: 1 of 2 moves by precopy (file) failed";
        assert_eq!(told(&failed, why), 2);
    }

    #[test]
    fn a_run_in_which_nothing_moves_is_broken() {
        assert_eq!(broken(&figures(&[100.0])), Vec::<String>::new());
        let mut none = figures(&[]);
        assert_eq!(broken(&none), ["writes: ferry: no move came through"]);
        none.cases[0].series[0].failures.push("it hung".into());
        none.cases[0].series[1].moves.clear();
        assert_eq!(broken(&none).len(), 3);
        none.cases[0].series.clear();
        assert_eq!(broken(&none), ["writes: nothing was measured"]);
        none.cases.clear();
        assert_eq!(broken(&none), ["nothing was measured"]);
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
