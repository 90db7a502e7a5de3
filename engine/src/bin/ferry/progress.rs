//! The progress line: a bar on a terminal, else lines as virsh prints them.

use std::io::{IsTerminal as _, stderr};
use std::time::Duration;

use ferry_engine::core::meter::Progress;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::sync::watch;

use crate::ending::bytes;
use crate::say;

/// The first round is nearly everything; what comes after it is the last percent.
const FIRST_ROUND_PERCENT: u64 = 98;

/// How often the bar is drawn anew.
const REDRAW: Duration = Duration::from_millis(100);

/// Shows progress until the migration is over.
pub(crate) async fn show(mut progress: watch::Receiver<Progress>) {
    let mut display = Display::new();
    while progress.changed().await.is_ok() {
        let look = progress.borrow_and_update().clone();
        display.draw(&look);
    }
    display.finish();
}

enum Display {
    Bar(ProgressBar),
    Lines { told: Option<u64> },
}

impl Display {
    fn new() -> Self {
        if !stderr().is_terminal() {
            return Self::Lines { told: None };
        }
        let style = ProgressStyle::with_template("{bar:30} {percent:>3} %  {msg}")
            .unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = ProgressBar::new(100).with_style(style);
        bar.enable_steady_tick(REDRAW);
        Self::Bar(bar)
    }

    fn draw(&mut self, look: &Progress) {
        let percent = percent(look);
        match self {
            Self::Bar(bar) => {
                bar.set_position(bar.position().max(percent));
                bar.set_message(line(look));
            }
            Self::Lines { told } if told.is_none_or(|told| told < percent) => {
                *told = Some(percent);
                say::tell(format_args!("Migration: [{percent:>3} %]"));
            }
            Self::Lines { .. } => {}
        }
    }

    fn finish(self) {
        if let Self::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}

fn percent(look: &Progress) -> u64 {
    match look.round {
        0 => 0,
        1 => u64::from(look.percent()) * FIRST_ROUND_PERCENT / 100,
        _ => FIRST_ROUND_PERCENT + 1,
    }
}

fn line(look: &Progress) -> String {
    let mut parts = vec![
        look.phase.to_string(),
        format!("round {}", look.round),
        format!("{}/s", bytes(look.rate_bytes_per_s)),
        format!("{} left", bytes(look.remaining_bytes)),
        format!("dirtied {}/s", bytes(look.dirty_bytes_per_s)),
    ];
    parts.push(match (look.lanes, look.lanes_lost) {
        (1, 0) => "1 lane".to_owned(),
        (lanes, 0) => format!("{lanes} lanes"),
        (lanes, lost) => format!("{lanes} lanes, {lost} lost"),
    });
    parts.extend(
        look.predicted_blackout
            .map(|span| format!("blackout ~{} ms", span.as_millis())),
    );
    parts.extend(look.left.map(|span| format!("{:.1} s", span.as_secs_f64())));
    parts.join(", ")
}
