//! The guest's rate over time, a panel for each way, all with the same axes.

use std::fmt::Write as _;

use super::{Kind, escaped};
use crate::figures::{CaseFigures, Curve, Move, Series, number};

const WIDTH: f64 = 960.0;
const PANEL: f64 = 46.0;
const GAP: f64 = 10.0;
const LEFT: f64 = 170.0;
const RIGHT: f64 = 940.0;
/// Below the last panel: the axis of time.
const FOOT: f64 = 24.0;
/// What the height of a panel stands for, in % of normal.
const FULL_PERCENT: f64 = 130.0;
/// About so many marks on the axis of time.
const MARKS: f64 = 8.0;

/// All panels of a case.
pub(super) fn svg(case: &CaseFigures) -> String {
    let shown: Vec<(&Series, (&Move, &Curve))> = case
        .series
        .iter()
        .filter_map(|series| Some((series, typical(series)?)))
        .collect();
    let from_ms = shown.iter().map(|(_, (_, curve))| curve.from_ms);
    let from_ms = from_ms.fold(0.0, f64::min);
    let to_ms = shown
        .iter()
        .map(|(_, (_, curve))| end_ms(curve))
        .fold(1.0, f64::max);
    let x = move |ms: f64| LEFT + (ms - from_ms) / (to_ms - from_ms) * (RIGHT - LEFT);
    let foot = GAP + (PANEL + GAP) * number(shown.len() as u64);
    let mut svg = format!(
        "<svg viewBox=\"0 0 {WIDTH} {}\" role=\"img\" aria-label=\"progress over time\">",
        foot + FOOT
    );
    let mut top = GAP;
    for (series, run) in shown {
        let class = Kind::of(case, series).class();
        add_panel(&mut svg, top, &series.label(), class, run, x);
        top += PANEL + GAP;
    }
    add_axis(&mut svg, foot, to_ms, x);
    svg.push_str("</svg>");
    svg
}

/// The move with the median total.
fn typical(series: &Series) -> Option<(&Move, &Curve)> {
    let mut moves: Vec<&Move> = series
        .moves
        .iter()
        .filter(|run| run.guest.is_some())
        .collect();
    moves.sort_by(|one, other| one.total_ms.total_cmp(&other.total_ms));
    let run = moves.get(moves.len().checked_sub(1)? / 2)?;
    Some((run, &run.guest.as_ref()?.curve))
}

fn end_ms(curve: &Curve) -> f64 {
    curve.from_ms + number(curve.done_s.len() as u64) * curve.step_ms
}

fn add_panel(
    svg: &mut String,
    top: f64,
    label: &str,
    class: &str,
    (run, curve): (&Move, &Curve),
    x: impl Fn(f64) -> f64,
) {
    let bottom = top + PANEL;
    let y = |percent: f64| bottom - percent.clamp(0.0, FULL_PERCENT) / FULL_PERCENT * PANEL;
    _ = write!(
        svg,
        "<text class=\"right\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
        LEFT - 8.0,
        top + PANEL / 2.0 + 4.0,
        escaped(label)
    );
    let begin = run.total_ms - run.blackout_ms;
    _ = write!(
        svg,
        "<rect class=\"dark\" x=\"{:.1}\" y=\"{top:.1}\" width=\"{:.1}\" height=\"{PANEL}\"/>",
        x(begin),
        (x(run.total_ms) - x(begin)).max(0.5)
    );
    let mut at = curve.from_ms;
    let mut path = format!("M{:.1} {bottom:.1}", x(at));
    for pair in curve.done_s.windows(2) {
        let percent = (pair[1] - pair[0]) / (curve.step_ms / 1e3) * 100.0;
        _ = write!(path, "L{:.1} {:.1}", x(at), y(percent));
        at += curve.step_ms;
        _ = write!(path, "H{:.1}", x(at));
    }
    _ = write!(path, "V{bottom:.1}Z");
    _ = write!(
        svg,
        "<path class=\"{class}\" opacity=\".75\" d=\"{path}\"/>\
         <path class=\"axis\" d=\"M{LEFT} {hundred:.1}H{RIGHT}M{LEFT} {bottom:.1}H{RIGHT}\"/>",
        hundred = y(100.0)
    );
}

fn add_axis(svg: &mut String, foot: f64, to_ms: f64, x: impl Fn(f64) -> f64) {
    let step = mark_step(to_ms);
    let mut at = 0.0;
    while at <= to_ms {
        let place = x(at);
        _ = write!(
            svg,
            "<path class=\"axis\" d=\"M{place:.1} {GAP}V{foot:.1}\"/>\
             <text class=\"soft middle\" x=\"{place:.1}\" y=\"{:.1}\">{at:.0} ms</text>",
            foot + 12.0
        );
        at += step;
    }
}

/// The least of 1, 2 and 5 times a power of ten that makes few enough marks.
fn mark_step(span: f64) -> f64 {
    let power = 10_f64.powf((span / MARKS).log10().floor());
    let fits = |factor: &f64| factor * power * MARKS >= span;
    let factor = [1.0, 2.0, 5.0].into_iter().find(fits).unwrap_or(10.0);
    factor * power
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_round_and_few() {
        for (span, step) in [(80.0, 10.0), (1000.0, 200.0), (4100.0, 1000.0), (7.0, 1.0)] {
            assert!((mark_step(span) - step).abs() < 1e-9, "{span}");
        }
    }
}
