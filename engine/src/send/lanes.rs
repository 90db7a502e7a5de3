//! Opening, cutting and reclaiming page lanes: none of it holds up the driver.

use std::io;
use std::sync::Arc;

use ferry_stream::message::LaneId;
use tokio::time::timeout;

use super::{Driver, GREETING_LIMIT, PARTING, lock};
use crate::core::message::{Failure, Input, Reclaimed, Step};
use crate::core::pageset::PageSet;
use crate::dial::open_lane;

impl Driver {
    pub(super) fn open_lane(&mut self, id: LaneId) {
        let (connector, session) = (Arc::clone(&self.connector), self.session);
        let lender = self.lender.clone();
        let (outfit, senders) = (self.outfit.clone(), Arc::clone(&self.senders));
        self.opening.spawn(async move {
            let opening = open_lane(&*connector, lender.as_deref(), session, id);
            let opened = timeout(GREETING_LIMIT, opening).await;
            let added = match opened {
                Ok(Ok(lane)) => lock(&senders)
                    .add(id, lane, &outfit)
                    .map_err(ferry_stream::Error::from),
                Ok(Err(error)) => Err(error),
                Err(elapsed) => Err(io::Error::from(elapsed).into()),
            };
            outfit.facts.tell(match added {
                Ok(()) => Input::LaneOpen(id),
                Err(error) => Input::LaneUnopened {
                    lane: id,
                    failure: Failure::new(Step::OpenLanes, error),
                },
            });
        });
    }

    /// Waits, on a thread that may block, until the lane's own has ended.
    pub(super) fn reclaim(&mut self, id: LaneId, frames: u64, into: PageSet) {
        let facts = self.facts.clone();
        let Some(lane) = lock(&self.senders).remove(id) else {
            // It never stood.
            let from = Reclaimed::nothing(into);
            return facts.tell(Input::Reclaimed { lane: id, from });
        };
        self.opening.spawn_blocking(move || {
            facts.tell(match lane.reclaim(frames, into) {
                Some(Ok(from)) => Input::Reclaimed { lane: id, from },
                Some(Err(error)) => Input::Failed(Failure::new(Step::Pages, error)),
                None => return,
            });
        });
    }

    /// Closes the page lanes once the words before it have left: the target would see them end and
    /// not read why.
    pub(super) fn close_lanes(&self) {
        let flushed = self.control.flushed(PARTING);
        let (senders, pacer) = (Arc::clone(&self.senders), Arc::clone(&self.outfit.pacer));
        tokio::spawn(async move {
            flushed.await;
            lock(&senders).close(&pacer);
        });
    }
}
