//! The progress line: a bar on a terminal, else lines as virsh prints them.

use std::io::{IsTerminal as _, stderr};
use std::time::Duration;

use ferry_engine::core::meter::Progress;
use ferry_engine::host::control::Figures;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::sync::watch;

use crate::ending::bytes;
use crate::say;

/// How often the bar is drawn anew.
const REDRAW: Duration = Duration::from_millis(100);

/// Shows progress until the migration is over.
pub(crate) async fn show(mut progress: watch::Receiver<Progress>) {
    let mut display = Display::new();
    while progress.changed().await.is_ok() {
        let look = Figures::from(&*progress.borrow_and_update());
        display.draw(&look);
    }
    display.finish();
}

enum Display {
    Bar(ProgressBar),
    Lines { told: Option<u8> },
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

    fn draw(&mut self, look: &Figures) {
        let percent = look.percent;
        match self {
            Self::Bar(bar) => {
                bar.set_position(bar.position().max(percent.into()));
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

/// A look in one line.
pub(crate) fn line(look: &Figures) -> String {
    let mut parts = vec![
        look.doing.clone(),
        format!("round {}", look.round),
        format!("{}/s", bytes(look.rate_bytes_per_s)),
        format!("{} left", bytes(look.remaining_bytes)),
        format!("dirtied {}/s", bytes(look.dirty_bytes_per_s)),
    ];
    parts.extend(throttled(look));
    parts.push(lanes(look));
    parts.extend(packing(look));
    let blackout = look.predicted_blackout_ms;
    parts.extend(blackout.map(|ms| format!("blackout ~{ms} ms")));
    parts.extend(look.left_ms.map(seconds));
    parts.join(", ")
}

/// By how much the guest is slowed, when it is: `slowed by 20 %`.
fn throttled(look: &Figures) -> Option<String> {
    let percent = look.throttled_percent;
    (percent > 0).then(|| format!("slowed by {percent} %"))
}

pub(crate) fn lanes(look: &Figures) -> String {
    match (look.lanes, look.lanes_lost) {
        (1, 0) => "1 lane".to_owned(),
        (lanes, 0) => format!("{lanes} lanes"),
        (lanes, lost) => format!("{lanes} lanes, {lost} lost"),
    }
}

/// What packing does, when it does anything: `zstd 4.8:1`.
pub(crate) fn packing(look: &Figures) -> Option<String> {
    let packed = look.compression.as_ref()?;
    Some(format!("{} {:.1}:1", packed.with, packed.ratio))
}

/// Seconds to a tenth.
pub(crate) fn seconds(ms: u64) -> String {
    format!("{}.{} s", ms / 1000, ms % 1000 / 100)
}
