//! One page with everything: no script, nothing fetched, legible in light and in dark.

mod bars;
mod curves;

use std::fmt::Write as _;

use crate::figures::{CaseFigures, Figures, Move, Series, mib};
use crate::hold;

/// How a series is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Ferry,
    Qemu,
    /// QEMU's best by the total.
    Best,
}

impl Kind {
    fn of(case: &CaseFigures, series: &Series) -> Self {
        let best = case.best_of_qemu(hold::TOTAL.of);
        if !series.peer.is_qemu() {
            Self::Ferry
        } else if best.is_some_and(|best| best.label() == series.label()) {
            Self::Best
        } else {
            Self::Qemu
        }
    }

    /// The class in the style sheet.
    fn class(self) -> &'static str {
        match self {
            Self::Ferry => "ferry",
            Self::Qemu => "qemu",
            Self::Best => "best",
        }
    }
}

/// The page.
pub fn page(figures: &Figures) -> String {
    let mut page = String::new();
    _ = write!(
        page,
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <title>Ferry against QEMU's own migration</title>\n<style>\n{}</style></head>\n<body>\n\
         <h1>Ferry against QEMU's own migration</h1>\n",
        include_str!("style.css")
    );
    add_host(&mut page, figures);
    add_rows(&mut page, figures);
    page.push_str(
        "<p class=\"legend\"><span class=\"ferry\"></span>Ferry\
         <span class=\"qemu\"></span>QEMU<span class=\"best\"></span>QEMU's fastest\
         <span class=\"dark\"></span>blackout. Bars are medians, lines reach from the least to the \
         most; a dashed line is the downtime limit. QEMU's ways run with private memory, \
         and with shared files (file).</p>\n",
    );
    for case in &figures.cases {
        add_case(&mut page, case);
    }
    page.push_str("</body></html>\n");
    page
}

fn add_host(page: &mut String, figures: &Figures) {
    let host = &figures.host;
    let runs = figures.runs;
    let facts = [
        format!("{} × {}", host.cpus, host.cpu),
        format!("{} MiB of RAM", host.memory_mib),
        format!("Linux {}", host.kernel),
        host.qemu.clone(),
        host.ferry.clone(),
        format!(
            "huge pages: {} (private), {} (shared)",
            host.huge_pages[0], host.huge_pages[1]
        ),
        format!("medians of {runs} interleaved runs"),
    ];
    let facts = facts.map(|fact| escaped(&fact)).join(" · ");
    _ = writeln!(page, "<p>{facts}</p>");
    if let Some(host) = &figures.target_host {
        _ = writeln!(
            page,
            "<p>To a host with {} × {}, Linux {}. Two hosts have two clocks: by how much totals and \
             blackouts may be wrong stands in the JSON as clock_error_ms.</p>",
            host.cpus,
            escaped(&host.cpu),
            escaped(&host.kernel)
        );
    }
    if figures.quick {
        page.push_str(
            "<p class=\"note\">A quick run: small guests, few moves. What must hold is told of the \
             full one.</p>\n",
        );
    }
    for what in &figures.left_out {
        _ = writeln!(page, "<p class=\"note\">Left out: {}</p>", escaped(what));
    }
}

fn add_rows(page: &mut String, figures: &Figures) {
    page.push_str(
        "<h2>What must hold</h2>\n<div class=\"scroll\"><table><tr><th>case</th>\
         <th class=\"text\">figure</th><th>measured</th><th>at most</th><th class=\"text\"></th>\
         <th class=\"text\">from</th></tr>\n",
    );
    for row in hold::rows(figures) {
        let number = |value: Option<f64>| value.map_or("–".into(), |value| format!("{value:.2}"));
        let verdict = hold::verdict(&row);
        _ = writeln!(
            page,
            "<tr><td>{}</td><td class=\"text\">{}</td><td>{}</td><td>{}</td>\
             <td class=\"text {verdict}\">{verdict}</td><td class=\"text\">{}</td></tr>",
            row.case,
            escaped(row.what),
            number(row.measured.clone().ok()),
            number(Some(row.limit).filter(|limit| limit.is_finite())),
            escaped(&row.from),
        );
    }
    page.push_str("</table></div>\n");
}

fn add_case(page: &mut String, case: &CaseFigures) {
    _ = writeln!(
        page,
        "<h2>{}</h2>\n<p>{}; downtime limit {} ms, {} MiB guest with {} MiB in use.</p>",
        escaped(&case.name),
        escaped(&case.what),
        case.conditions.downtime_limit_ms,
        case.conditions.guest_mib,
        case.conditions.data_mib,
    );
    let limit_ms = crate::figures::number(case.conditions.downtime_limit_ms);
    let charts = [
        ("Total, ms", None, (|run| run.total_ms) as fn(&Move) -> f64),
        ("Blackout, ms", Some(limit_ms), |run| run.blackout_ms),
        ("On the wire, MiB", None, |run| mib(run.wire_bytes)),
        ("Progress lost, s of normal running", None, Move::lost_s),
        ("CPU at the source, s", None, |run| run.source.migration_s),
        ("CPU at the target, s", None, |run| run.target.migration_s),
    ];
    for (title, limit, of) in charts {
        let bars = bars::Chart { title, limit, of };
        _ = writeln!(page, "<h3>{title}</h3>\n{}", bars.svg(case));
    }
    _ = writeln!(
        page,
        "<h3>The guest's progress through the move, in % of normal</h3>\n<p class=\"note\">\
         The move with the median total of each way; 0 is the client's start.</p>\n{}",
        curves::svg(case)
    );
    let failures = case.series.iter().flat_map(|series| {
        let label = series.label();
        let told = |failure: &String| format!("{label}: {failure}");
        series.failures.iter().map(told).collect::<Vec<_>>()
    });
    for problem in &case.problems {
        let problem = escaped(problem);
        _ = writeln!(page, "<p class=\"MISSED\">Not measured: {problem}</p>");
    }
    for failure in failures {
        _ = writeln!(
            page,
            "<p class=\"MISSED\">Failed: {}</p>",
            escaped(&failure)
        );
    }
}

/// Text as HTML has it.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_taken_for_markup() {
        assert_eq!(escaped("a<b> & \"c\""), "a&lt;b&gt; &amp; &quot;c&quot;");
    }
}
