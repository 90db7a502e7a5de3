//! Every move as a line of comma-separated values.

use std::fmt::Write as _;

use crate::figures::{Figures, GuestFigures, Move};

const HEADING: &str = "case,peer,memory,run,total_ms,last_page_ms,blackout_ms,clock_error_ms,wire_bytes,\
    source_cpu_s,source_guest_cpu_s,target_cpu_s,target_guest_cpu_s,source_peak_kib,\
    target_peak_kib,stall_ms,brownout_ms,lost_s,resolution_ms,bad";

/// All moves of all cases, with a heading. No value has a comma in it.
pub fn of(figures: &Figures) -> String {
    let mut text = format!("{HEADING}\n");
    for case in &figures.cases {
        for series in &case.series {
            for (at, run) in series.moves.iter().enumerate() {
                let (name, peer, memory) = (&case.name, series.peer, series.memory);
                _ = write!(text, "{name},{peer},{memory},{},", at + 1);
                add_move(&mut text, run);
            }
        }
    }
    text
}

fn add_move(text: &mut String, run: &Move) {
    let Move {
        total_ms,
        last_page_ms,
        blackout_ms,
        clock_error_ms,
        wire_bytes,
        source,
        target,
        engine,
        guest,
    } = run;
    let of_guest = |of: fn(&GuestFigures) -> f64| {
        let figures = guest.as_ref();
        figures.map_or_else(String::new, |it| format!("{:.4}", of(it)))
    };
    let last_page = last_page_ms.map_or_else(String::new, |ms| format!("{ms:.3}"));
    let peak = |of: fn(&crate::figures::EngineFigures) -> u64| {
        engine
            .as_ref()
            .map_or_else(String::new, |it| of(it).to_string())
    };
    _ = write!(
        text,
        "{total_ms:.3},{last_page},{blackout_ms:.3},{clock_error_ms:.3},{wire_bytes},{:.4},{:.4},{:.4},{:.4},{},{},",
        source.migration_s,
        source.guest_s,
        target.migration_s,
        target.guest_s,
        peak(|it| it.source_peak_kib),
        peak(|it| it.target_peak_kib),
    );
    let bad = guest
        .as_ref()
        .map_or_else(String::new, |it| it.bad.to_string());
    _ = writeln!(
        text,
        "{},{},{},{},{bad}",
        of_guest(|it| it.stall_ms),
        of_guest(|it| it.brownout_ms),
        of_guest(|it| it.lost_s),
        of_guest(|it| it.resolution_ms),
    );
}
