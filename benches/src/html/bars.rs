//! Bars of medians with whiskers.

use std::fmt::Write as _;

use super::{Kind, escaped};
use crate::figures::{CaseFigures, Move, Spread, number};

const WIDTH: f64 = 960.0;
const ROW: f64 = 22.0;
const BAR: f64 = 12.0;
const TOP: f64 = 10.0;
/// Where the bars begin and where they end: labels stand before, figures after.
const LEFT: f64 = 170.0;
const RIGHT: f64 = 740.0;

/// A figure of all series of a case.
pub(super) struct Chart {
    pub(super) title: &'static str,
    /// A line across, in the figure's unit.
    pub(super) limit: Option<f64>,
    pub(super) of: fn(&Move) -> f64,
}

impl Chart {
    pub(super) fn svg(&self, case: &CaseFigures) -> String {
        let rows: Vec<(String, Kind, Spread)> = case
            .series
            .iter()
            .filter_map(|series| {
                let spread = series.spread(self.of)?;
                Some((series.label(), Kind::of(case, series), spread))
            })
            .collect();
        let most = rows.iter().map(|(_, _, spread)| spread.max);
        let most = most.chain(self.limit).fold(0.0, f64::max);
        let least = rows.iter().map(|(_, _, spread)| spread.min);
        let least = least.fold(0.0, f64::min);
        let span = (most - least).max(f64::MIN_POSITIVE);
        let x = move |value: f64| LEFT + (value - least) / span * (RIGHT - LEFT);
        let height = 2.0 * TOP + ROW * number(rows.len() as u64);
        let mut svg = format!(
            "<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{}\">",
            escaped(self.title)
        );
        let mut top = TOP;
        for (label, kind, spread) in &rows {
            add_row(&mut svg, top, label, *kind, spread, x);
            top += ROW;
        }
        let zero = x(0.0);
        _ = write!(
            svg,
            "<path class=\"axis\" d=\"M{zero:.1} {TOP}V{:.1}\"/>",
            height - TOP
        );
        if let Some(limit) = self.limit {
            let at = x(limit);
            _ = write!(
                svg,
                "<path class=\"limit\" d=\"M{at:.1} {TOP}V{:.1}\"/>",
                height - TOP
            );
        }
        svg.push_str("</svg>");
        svg
    }
}

fn add_row(
    svg: &mut String,
    top: f64,
    label: &str,
    kind: Kind,
    spread: &Spread,
    x: impl Fn(f64) -> f64,
) {
    let middle = top + ROW / 2.0;
    let (from, to) = (x(spread.median.min(0.0)), x(spread.median.max(0.0)));
    let (low, high) = (x(spread.min), x(spread.max));
    let digits = if spread.median.abs() < 100.0 { 2 } else { 0 };
    let text = |value: f64| format!("{value:.digits$}");
    let [median, min, max] = [spread.median, spread.min, spread.max].map(text);
    _ = write!(
        svg,
        "<text class=\"right\" x=\"{:.1}\" y=\"{base:.1}\">{}</text>\
         <rect class=\"{}\" x=\"{from:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{BAR}\" rx=\"2\"/>\
         <path class=\"whisker\" d=\"M{low:.1} {middle:.1}H{high:.1}M{low:.1} {a:.1}V{b:.1}\
         M{high:.1} {a:.1}V{b:.1}\"/>\
         <text x=\"{:.1}\" y=\"{base:.1}\">{median} ({min} – {max})</text>",
        LEFT - 8.0,
        escaped(label),
        kind.class(),
        middle - BAR / 2.0,
        (to - from).max(1.0),
        RIGHT + 12.0,
        base = middle + 4.0,
        a = middle - 3.0,
        b = middle + 3.0,
    );
}
