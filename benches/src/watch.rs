//! How a move is seen: by the guest's own counter, or by QEMU's events where the guest has none.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ferry_testbed::{Probe, Qemu, Seen, StatusPage, TestbedError};
use serde_json::Value;

use crate::figures::{Curve, GuestFigures, Move};
use crate::guest::{AFTERMATH, failed};
use crate::peer::Peer;
use crate::way::Began;

/// How long a guest is watched before the move: what it does then is normal.
pub const LEAD: Duration = Duration::from_secs(1);

/// A watch over both sides from one host.
pub enum Watch {
    /// The guest counts.
    Counter(Probe),
    /// QEMU tells when it stops and when it goes on.
    Events,
}

impl Watch {
    /// Begins, [`LEAD`] before the move.
    pub fn start(
        pages: Option<(StatusPage, Option<StatusPage>)>,
        qemus: [&Qemu; 2],
    ) -> Result<Self, TestbedError> {
        let watch = if let Some((source, target)) = pages {
            Self::Counter(Probe::start(source, target))
        } else {
            for qemu in qemus {
                qemu.take_events()?;
            }
            Self::Events
        };
        std::thread::sleep(LEAD);
        Ok(watch)
    }

    /// Ends, and tells what it saw; the rest is filled in by whoever knows it.
    pub fn finish(
        self,
        peer: Peer,
        began: &Began,
        last_page: Option<LastPage>,
        [source, target]: [&Qemu; 2],
    ) -> Result<Move, TestbedError> {
        match self {
            Self::Counter(probe) => counted(peer, &probe.finish()?, began, last_page),
            Self::Events => {
                let stopped = last_event(source, "STOP")?;
                let resumed = last_event(target, "RESUME")?;
                between_events(stopped, resumed, began)
            }
        }
    }
}

/// When the last page came that followed a guest.
#[derive(Clone, Copy, Debug)]
pub enum LastPage {
    /// So long after the client's start.
    SinceStart(Duration),
    /// So long after the guest ran at the target.
    AfterGuest(Duration),
}

/// By the guest's counter.
pub fn counted(
    peer: Peer,
    seen: &Seen,
    began: &Began,
    last_page: Option<LastPage>,
) -> Result<Move, TestbedError> {
    let began = began.at.saturating_duration_since(seen.started);
    let (blackout, moved_at) = if peer == Peer::Switchover {
        // One memory, one counter: the guest stands still once for long.
        let watched = seen.progress.last().map_or(began, |&(at, _)| at);
        let (at, stall) = seen.longest_stall_between(began, watched);
        (stall, at + stall)
    } else {
        let moved_at = seen
            .moved_at
            .ok_or_else(|| failed(&peer.to_string(), "the guest never went on"))?;
        (seen.blackout, moved_at)
    };
    let last_page = last_page.map(|last| match last {
        LastPage::SinceStart(span) => began + span,
        LastPage::AfterGuest(span) => moved_at + span,
    });
    let end = last_page.map_or(moved_at, |last| last.max(moved_at)) + AFTERMATH;
    Ok(Move {
        total_ms: ms(moved_at.saturating_sub(began)),
        blackout_ms: ms(blackout),
        last_page_ms: last_page.map(|last| ms(last.saturating_sub(began))),
        guest: Some(GuestFigures {
            stall_ms: ms(seen.longest_stall),
            brownout_ms: ms(seen.brownout),
            lost_s: seen.lost_s(began, end),
            resolution_ms: ms(seen.resolution),
            bad: 0,
            curve: Curve::of(seen, began, end),
        }),
        ..Move::default()
    })
}

/// By QEMU's clock, as it stands in its events.
pub fn between_events(
    stopped: Duration,
    resumed: Duration,
    began: &Began,
) -> Result<Move, TestbedError> {
    let began = began.since_epoch();
    if resumed < stopped || stopped < began {
        let times = format!("stopped {stopped:?}, resumed {resumed:?}, begun {began:?}");
        return Err(failed("QEMU's events", &times));
    }
    Ok(Move {
        total_ms: ms(resumed.saturating_sub(began)),
        blackout_ms: ms(resumed.saturating_sub(stopped)),
        ..Move::default()
    })
}

/// When QEMU last told an event, since the epoch.
pub fn last_event(qemu: &Qemu, name: &str) -> Result<Duration, TestbedError> {
    last_event_where(qemu, name, |event| event["event"] == name)
}

/// When QEMU last told an event of a kind that `is_it` knows.
pub fn last_event_where(
    qemu: &Qemu,
    name: &str,
    is_it: impl Fn(&Value) -> bool,
) -> Result<Duration, TestbedError> {
    let events = qemu.take_events()?;
    let last = events.iter().rev().find(|event| is_it(event));
    let when = |event: &Value| -> Option<Duration> {
        let stamp = &event["timestamp"];
        let seconds = Duration::from_secs(stamp["seconds"].as_u64()?);
        Some(seconds + Duration::from_micros(stamp["microseconds"].as_u64()?))
    };
    last.and_then(when)
        .ok_or_else(|| failed("QEMU", &format!("there was no event {name}: {events:?}")))
}

/// The wall clock, since the epoch.
pub fn now_since_epoch() -> Duration {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.unwrap_or_default()
}

/// Milliseconds with three digits: no clock here knows more.
fn ms(span: Duration) -> f64 {
    (span.as_secs_f64() * 1e6).round() / 1e3
}
