//! Post-copy at the source: lanes that are there before they are needed, and for as long as they are.

use std::sync::Arc;
use std::time::Duration;

use ferry_stream::link::Connector;
use ferry_stream::message::{LaneId, LaneIndex, SessionId};
use tokio::time::{sleep, timeout};

use super::{Driver, GREETING_LIMIT};
use crate::core::layout::PAGE_SIZE;
use crate::core::message::{Failure, Input, Phase, Step};
use crate::core::meter::{PostcopyReport, Progress, Report};
use crate::core::outcome::in_full;
use crate::core::pageset::PageSet;
use crate::dial::open_fetch_lane;
use crate::postcopy::FETCH_LANES;
use crate::postcopy::server::Server;

/// Before a lane that died is dialled again; doubled each time that it is in vain, up to a bound.
const REDIAL: Duration = Duration::from_millis(20);

/// The longest time between two attempts: a guest may be waiting.
const LONGEST_REDIAL: Duration = Duration::from_secs(1);

impl Driver {
    /// Opens the lanes on which missing pages will be served: a guest that stands, or waits for a page,
    /// must not wait for a connection as well.
    pub(super) fn open_fetch_lanes(&mut self) {
        for index in 1..=FETCH_LANES {
            let lane = LaneId::first(LaneIndex(index));
            let (connector, server) = (Arc::clone(&self.connector), self.server.clone());
            self.opening
                .spawn(keep(connector, self.session, server, lane));
        }
    }

    /// Looks at all of guest RAM, on a thread that may block.
    pub(super) fn peek(&mut self) {
        let Some(fresh) = self.outfit.fresh.get().cloned() else {
            return;
        };
        let (layout, facts) = (self.outfit.ram.layout().clone(), self.facts.clone());
        self.opening.spawn_blocking(move || {
            let mut pages = 0;
            for (index, region) in layout.iter() {
                let looked = fresh.written(index, region.all(), &mut |run| pages += run.count);
                if let Err(error) = looked {
                    // What is written is reported all the same; a rule that does not know of it waits.
                    return tracing::debug!(error = in_full(&error), "no look within the round");
                }
            }
            facts.tell(Input::Peeked(pages));
        });
    }

    pub(super) fn take_left(&self, mut into: PageSet) {
        self.facts.tell(match self.feed.take_left(&mut into) {
            Ok(()) => Input::Left { left: into },
            Err(outside) => Input::Failed(Failure::new(Step::Collect, outside)),
        });
    }

    /// While a guest is served that was handed over, what counts is how many of its pages are left.
    pub(super) fn with_served(&self, progress: Progress) -> Progress {
        match self.server.served() {
            Some(served) if matches!(progress.phase, Phase::Serving | Phase::Leaving) => {
                let left = served.left * PAGE_SIZE as u64;
                let all = self.machine.missing_pages() * PAGE_SIZE as u64;
                Progress {
                    done_bytes: all.saturating_sub(left),
                    remaining_bytes: left,
                    bytes_wire: progress.bytes_wire + served.bytes,
                    ..progress
                }
            }
            _ => progress,
        }
    }

    pub(super) fn with_what_followed(&self, report: Report) -> Report {
        let served = self.server.served().unwrap_or_default();
        Report {
            bytes_wire: report.bytes_wire + served.bytes,
            postcopy: report.postcopy.map(|postcopy| PostcopyReport {
                bytes_wire: served.bytes,
                asked_pages: served.asked_pages,
                ..postcopy
            }),
            ..report
        }
    }
}

/// Keeps a lane open until it is not wanted any more.
pub(crate) async fn keep(
    connector: Arc<dyn Connector>,
    session: SessionId,
    server: Server,
    first: LaneId,
) {
    let mut lane = first;
    let mut wait = REDIAL;
    while !server.is_over() {
        let opening = open_fetch_lane(&*connector, session, lane);
        match timeout(GREETING_LIMIT, opening).await {
            Ok(Ok(opened)) => {
                wait = REDIAL;
                let server = server.clone();
                let served = tokio::task::spawn_blocking(move || server.run(lane, opened)).await;
                if let Ok(Err(error)) = served {
                    tracing::debug!(error = in_full(&error), %lane, "a fetch lane has ended");
                }
                // After the last there is none that the target could tell from it.
                lane = lane.successor().unwrap_or(lane);
            }
            Ok(Err(error)) => {
                tracing::debug!(error = in_full(&error), %lane, "no fetch lane");
            }
            Err(_) => tracing::debug!(%lane, "no fetch lane in time"),
        }
        if !server.is_over() {
            sleep(wait).await;
            wait = (wait * 2).min(LONGEST_REDIAL);
        }
    }
}
