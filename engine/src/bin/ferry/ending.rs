//! How a command ends: words, or one JSON object, and an exit code.

use std::error::Error;
use std::process::ExitCode;
use std::time::Duration;

use ferry_engine::Finished;
use ferry_engine::core::blackout::Blackout;
use ferry_engine::core::encoding::EncodingTotals;
use ferry_engine::core::layout::PAGE_SIZE;
use ferry_engine::core::message::{GuestLeft, Outcome, Reason};
use ferry_engine::core::meter::{PostcopyReport, Report, RoundReport};
use ferry_engine::core::outcome::in_full;
use ferry_engine::core::postcopy::FetchFigures;
use ferry_engine::message::AbortCode;
use ferry_engine::qemu::Problem;
use serde::Serialize;

use crate::say;

/// Wrong usage, or something that cannot be moved; nothing was changed.
pub(crate) const REFUSED: u8 = 2;

/// Something running was asked for, and it is not done.
pub(crate) const FAILED: u8 = 1;

const KEPT: u8 = 1;
const IN_DOUBT: u8 = 3;

/// Why nothing was begun.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) reason: String,
    pub(crate) problems: Vec<Problem>,
    code: u8,
}

impl Refusal {
    pub(crate) fn because(reason: String) -> Self {
        Self::with_problems(reason, Vec::new())
    }

    pub(crate) fn with_problems(reason: String, problems: Vec<Problem>) -> Self {
        Self {
            reason,
            problems,
            code: REFUSED,
        }
    }

    /// Somebody gave up before anything had begun: no fault of the command or of the guest.
    pub(crate) fn interrupted() -> Self {
        Self {
            code: KEPT,
            ..Self::because(Reason::Cancelled.to_string())
        }
    }

    pub(crate) fn of(error: &dyn Error) -> Self {
        Self::because(in_full(error))
    }
}

/// The arguments cannot be understood, or only help was asked for.
pub(crate) fn usage(error: &clap::Error) -> ExitCode {
    // A standard error that is closed has no reader to miss it.
    _ = error.print();
    if !error.use_stderr() {
        return ExitCode::SUCCESS;
    }
    // Whoever asked for JSON reads that alone; where in the line the mistake is does not matter.
    if std::env::args_os().any(|arg| arg == "--json") {
        let text = error.render().to_string();
        let first = text.split("\n\n").next().unwrap_or_default();
        let words: Vec<&str> = first
            .trim_start_matches("error: ")
            .split_whitespace()
            .collect();
        print_json(&Json::refused(words.join(" "), Vec::new()));
    }
    ExitCode::from(REFUSED)
}

/// What `--json` prints.
#[derive(Serialize)]
struct Json {
    outcome: &'static str,
    /// Its name while it ran.
    #[serde(skip_serializing_if = "Option::is_none")]
    job: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    guest: Option<&'static str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    problems: Vec<JsonProblem>,
    #[serde(flatten)]
    figures: Option<Figures>,
    #[serde(skip_serializing_if = "Option::is_none")]
    faults: Option<JsonFaults>,
}

impl Json {
    fn refused(reason: String, problems: Vec<JsonProblem>) -> Self {
        Self {
            outcome: "kept",
            job: None,
            reason: Some(reason),
            guest: Some(guest_word(&GuestLeft::Untouched)),
            problems,
            figures: None,
            faults: None,
        }
    }
}

#[derive(Serialize)]
struct JsonProblem {
    code: &'static str,
    found: String,
    remedy: String,
}

#[derive(Serialize)]
struct Figures {
    total_ms: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    downtime_ms: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    blackout_ms: Option<JsonBlackout>,
    setup_ms: f64,
    bytes_wire: u64,
    pages_zero: u64,
    pages_held: u64,
    pages_rewritten: u64,
    /// Taken by the target from the source's own RAM, both being on one host; 0 when pages travelled.
    pages_shared: u64,
    throughput_bytes_per_s: u64,
    dirty_bytes_per_s: u64,
    /// The most that stood at one time.
    lanes: u16,
    lanes_lost: u32,
    /// By how much the guest is slowed in the end: 0, unless that could not be undone.
    throttled_percent: u8,
    throttled_percent_max: u8,
    rounds: Vec<JsonRound>,
    compression: JsonCompression,
    /// What came after the guest, where it was handed over before its pages.
    #[serde(skip_serializing_if = "Option::is_none")]
    postcopy: Option<JsonPostcopy>,
}

#[derive(Serialize)]
struct JsonPostcopy {
    pages_missing: u64,
    /// From the target's word that the guest runs to its word that every page is there.
    #[serde(skip_serializing_if = "Option::is_none")]
    last_page_ms: Option<f64>,
    bytes_wire: u64,
    /// Sent because somebody waited for them.
    pages_asked: u64,
}

impl From<&PostcopyReport> for JsonPostcopy {
    fn from(report: &PostcopyReport) -> Self {
        Self {
            pages_missing: report.missing_pages,
            last_page_ms: report.last_page.map(ms),
            bytes_wire: report.bytes_wire,
            pages_asked: report.asked_pages,
        }
    }
}

/// How the faults of a guest were served that runs here and whose pages followed.
#[derive(Serialize)]
struct JsonFaults {
    count: u64,
    p50_us: f64,
    p90_us: f64,
    p99_us: f64,
    max_us: f64,
    /// Of all threads together.
    total_ms: f64,
    pages_missing: u64,
    stalls: Vec<JsonStalls>,
}

/// How a thread of QEMU fared, a vCPU or another.
#[derive(Serialize)]
struct JsonStalls {
    thread: u32,
    count: u64,
    total_ms: f64,
}

impl From<&FetchFigures> for JsonFaults {
    fn from(figures: &FetchFigures) -> Self {
        let us = |span: Duration| (span.as_secs_f64() * 1e7).round() / 10.0;
        let faults = figures.faults;
        let stalls = figures.stalls.iter().map(|(thread, stalls)| JsonStalls {
            thread: *thread,
            count: stalls.count,
            total_ms: ms(stalls.total),
        });
        Self {
            count: faults.count,
            p50_us: us(faults.p50),
            p90_us: us(faults.p90),
            p99_us: us(faults.p99),
            max_us: us(faults.longest),
            total_ms: ms(faults.total),
            pages_missing: figures.missing_pages,
            stalls: stalls.collect(),
        }
    }
}

#[derive(Serialize)]
struct JsonCompression {
    /// Bytes of pages for each byte sent of them.
    ratio: f64,
    pages_raw: u64,
    pages_lz4: u64,
    pages_zstd: u64,
    /// Told by how they differ from what was sent before.
    pages_delta: u64,
    /// What that saved, before packing.
    bytes_saved_delta: u64,
    cpu_ms: f64,
}

impl From<&EncodingTotals> for JsonCompression {
    fn from(totals: &EncodingTotals) -> Self {
        Self {
            ratio: totals.ratio(),
            pages_raw: totals.raw_pages,
            pages_lz4: totals.lz4_pages,
            pages_zstd: totals.zstd_pages,
            pages_delta: totals.delta_pages,
            bytes_saved_delta: totals.delta_saved_bytes,
            cpu_ms: ms(totals.cpu),
        }
    }
}

/// The parts of the blackout. They add up to `downtime_ms`.
#[derive(Serialize)]
struct JsonBlackout {
    stop: f64,
    flush: f64,
    scan: f64,
    pages: f64,
    state_save: f64,
    state_load: f64,
    resume: f64,
    other: f64,
}

impl From<Blackout> for JsonBlackout {
    fn from(blackout: Blackout) -> Self {
        Self {
            stop: ms(blackout.stop),
            flush: ms(blackout.flush),
            scan: ms(blackout.scan),
            pages: ms(blackout.pages),
            state_save: ms(blackout.state_save),
            state_load: ms(blackout.state_load),
            resume: ms(blackout.resume),
            other: ms(blackout.other),
        }
    }
}

#[derive(Serialize)]
struct JsonRound {
    round: u32,
    dirty_pages: u64,
    pages: u64,
    pages_zero: u64,
    bytes: u64,
    ms: f64,
    dirty_bytes_per_s: u64,
}

impl From<&RoundReport> for JsonRound {
    fn from(round: &RoundReport) -> Self {
        Self {
            round: round.round.0,
            dirty_pages: round.dirty_pages,
            pages: round.pages,
            pages_zero: round.zero_pages,
            bytes: round.bytes,
            ms: ms(round.took),
            dirty_bytes_per_s: round.dirty_bytes_per_s,
        }
    }
}

impl From<&Report> for Figures {
    fn from(report: &Report) -> Self {
        Self {
            total_ms: ms(report.total),
            downtime_ms: report.downtime.map(ms),
            blackout_ms: report.blackout.map(JsonBlackout::from),
            setup_ms: ms(report.setup),
            bytes_wire: report.bytes_wire,
            pages_zero: report.zero_pages,
            pages_held: report.held_pages,
            pages_rewritten: report.fresh_pages,
            pages_shared: report.shared_pages,
            throughput_bytes_per_s: report.throughput_bytes_per_s(),
            dirty_bytes_per_s: report.dirty_bytes_per_s(),
            lanes: report.lanes,
            lanes_lost: report.lanes_lost,
            throttled_percent: report.throttled_percent,
            throttled_percent_max: report.throttled_percent_max,
            rounds: report.rounds.iter().map(JsonRound::from).collect(),
            compression: JsonCompression::from(&report.encoding),
            postcopy: report.postcopy.as_ref().map(JsonPostcopy::from),
        }
    }
}

/// Milliseconds with three digits: the clock knows no more.
fn ms(span: Duration) -> f64 {
    (span.as_secs_f64() * 1e6).round() / 1e3
}

/// How the end of either command is told.
pub(crate) struct Teller {
    pub(crate) json: bool,
    /// Whether the figures are this side's to tell.
    pub(crate) figures: bool,
    /// The job's name, once there is one.
    pub(crate) job: Option<String>,
}

impl Teller {
    /// Nothing was begun.
    pub(crate) fn refused(&self, refusal: Refusal) -> ExitCode {
        say::tell(format_args!("ferry: {}", refusal.reason));
        for problem in &refusal.problems {
            say::tell(format_args!("  {problem}"));
        }
        if self.json {
            let problems = refusal.problems.iter().map(|problem| JsonProblem {
                code: problem.code.as_str(),
                found: problem.found.clone(),
                remedy: problem.remedy.clone(),
            });
            print_json(&Json::refused(refusal.reason, problems.collect()));
        }
        ExitCode::from(refusal.code)
    }

    /// It is over.
    pub(crate) fn finished(&self, finished: &Finished) -> ExitCode {
        let (name, reason, guest, code) = match &finished.outcome {
            Outcome::Moved => ("moved", None, None, ExitCode::SUCCESS),
            Outcome::Kept { reason, guest } => {
                let code = match (guest, reason) {
                    (GuestLeft::Untouched, Reason::Cancelled) => KEPT,
                    (GuestLeft::Untouched, _) => REFUSED,
                    _ => KEPT,
                };
                (
                    "kept",
                    Some(words(reason)),
                    Some(guest_word(guest)),
                    ExitCode::from(code),
                )
            }
            Outcome::InDoubt { reason } => (
                "in-doubt",
                Some(words(reason)),
                None,
                ExitCode::from(IN_DOUBT),
            ),
            _ => ("unknown", None, None, ExitCode::from(IN_DOUBT)),
        };
        self.say(finished);
        if self.json {
            let figures = self.figures.then(|| Figures::from(&finished.report));
            print_json(&Json {
                outcome: name,
                job: self.job.clone(),
                reason,
                guest,
                problems: Vec::new(),
                figures,
                faults: finished.report.fetched.as_ref().map(JsonFaults::from),
            });
        }
        code
    }

    fn say(&self, finished: &Finished) {
        match &finished.outcome {
            Outcome::Moved if self.figures => {
                say::tell(summary(&finished.report));
                if let Some(blackout) = &finished.report.blackout {
                    say::tell(split(blackout));
                }
                if let Some(postcopy) = &finished.report.postcopy {
                    say::tell(followed(postcopy));
                }
            }
            Outcome::Moved => {
                say::tell(format_args!("The guest is here now."));
                if let Some(fetched) = &finished.report.fetched {
                    say::tell(waited(fetched));
                }
            }
            Outcome::Kept { reason, guest } => {
                say::tell(format_args!("ferry: not moved: {}", words(reason)));
                say::tell(format_args!("{}", guest_sentence(guest)));
            }
            Outcome::InDoubt { reason } if is_lost(reason) => {
                say::tell(format_args!("ferry: {}", words(reason)));
                say::tell(format_args!(
                    "It had run at the target, with pages missing that only the source has. The source's \
                     QEMU, if it was not ended, holds the guest as it was at the hand-over; its disks have \
                     been written since. Start the guest anew from them."
                ));
            }
            Outcome::InDoubt { reason } => {
                say::tell(format_args!("ferry: IN DOUBT: {}", words(reason)));
                say::tell(format_args!(
                    "Only the target knows whether it took the guest, and it did not answer. Neither \
                     QEMU was touched. Look at the target: if its guest runs, end the source's QEMU; \
                     if its QEMU has ended or was never told to run, resume the source's with QMP \
                     `cont`. Never let both run."
                ));
            }
            _ => say::tell(format_args!(
                "ferry: an outcome that this version cannot tell"
            )),
        }
    }
}

fn summary(report: &Report) -> String {
    let downtime = report.downtime.map_or_else(String::new, |downtime| {
        format!("; blackout at most {:.1} ms", downtime.as_secs_f64() * 1e3)
    });
    let shared = match report.shared_bytes() {
        0 => String::new(),
        shared => format!(" and {} within the host", bytes(shared)),
    };
    format!(
        "Moved in {:.2} s{downtime}; {} rounds, {} on the wire{shared} at {}/s.",
        report.total.as_secs_f64(),
        report.rounds.len(),
        bytes(report.bytes_wire),
        bytes(report.throughput_bytes_per_s()),
    )
}

/// Where the blackout went: what is told in tenths of a millisecond and is not nothing.
fn split(blackout: &Blackout) -> String {
    let parts = blackout
        .parts()
        .map(|(name, part)| (name, format!("{:.1}", part.as_secs_f64() * 1e3)));
    let told: Vec<String> = parts
        .into_iter()
        .filter(|(_, part)| part != "0.0")
        .map(|(name, part)| format!("{name} {part}"))
        .collect();
    format!("Blackout, in ms: {}.", told.join(", "))
}

/// What came after the guest.
fn followed(report: &PostcopyReport) -> String {
    let last = report.last_page.map_or_else(String::new, |last| {
        format!(", the last {:.2} s later", last.as_secs_f64())
    });
    format!(
        "Post-copy: {} came after the guest{last}; {} pages were asked for.",
        bytes(report.missing_pages * PAGE_SIZE as u64),
        report.asked_pages
    )
}

/// How long the guest waited for pages.
fn waited(figures: &FetchFigures) -> String {
    let ms = |span: Duration| span.as_secs_f64() * 1e3;
    let faults = figures.faults;
    format!(
        "It waited {} times for a page: half of them up to {:.3} ms, 99 % up to {:.3} ms, the longest \
         {:.3} ms.",
        faults.count,
        ms(faults.p50),
        ms(faults.p99),
        ms(faults.longest)
    )
}

/// Bytes for people.
pub(crate) fn bytes(count: u64) -> String {
    indicatif::BinaryBytes(count).to_string()
}

fn guest_word(guest: &GuestLeft) -> &'static str {
    use ferry_engine::vmm::RunState;
    match guest {
        GuestLeft::Untouched => "untouched",
        GuestLeft::Ended => "at-source",
        GuestLeft::As(RunState::Running) => "running",
        GuestLeft::As(RunState::Paused) => "paused",
        GuestLeft::Damaged(_) => "damaged",
    }
}

fn guest_sentence(guest: &GuestLeft) -> String {
    use ferry_engine::vmm::RunState;
    match guest {
        GuestLeft::Untouched => "Nothing was changed.".to_owned(),
        GuestLeft::Ended => "The QEMU here was ended; the guest is the source's.".to_owned(),
        GuestLeft::As(RunState::Running) => "The guest runs on at the source.".to_owned(),
        GuestLeft::As(RunState::Paused) => "The guest is paused at the source.".to_owned(),
        GuestLeft::Damaged(failure) => {
            format!(
                "The source could not be put back altogether: {}",
                in_full(failure)
            )
        }
    }
}

/// Whether there is a guest no more, by either side's word.
fn is_lost(reason: &Reason) -> bool {
    match reason {
        Reason::DiedWithoutPages { .. } => true,
        Reason::PeerAborted { code, text } => {
            *code == AbortCode::GuestGone && text.contains("before all pages had come")
        }
        _ => false,
    }
}

fn words(reason: &Reason) -> String {
    in_full(reason)
}

fn print_json(json: &Json) {
    match serde_json::to_string(json) {
        Ok(text) => say::print(format_args!("{text}")),
        Err(error) => say::tell(format_args!(
            "ferry: the JSON report cannot be written: {error}"
        )),
    }
}
