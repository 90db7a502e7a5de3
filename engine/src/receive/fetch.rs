//! Post-copy at the target: getting ready for it, arming faults, and ending that.

use std::io;

use ferry_stream::message::{Features, Hello, LaneId, Message};
use tokio::time::timeout;

use super::Driver;
use super::arrivals::welcome;
use crate::core::message::{Input, Notice, Step};
use crate::core::outcome::in_full;
use crate::core::pageset::PageSet;
use crate::greeting::Arrival;
use crate::send::PARTING;
use crate::vmm::VmmError;

impl Driver {
    /// Tells the machine of a source's hello, once it is known whether the VMM can wait for pages.
    pub(super) fn greet(&self, mut hello: Hello) {
        let wanted = hello.features.contains(Features::POSTCOPY);
        let Some(faults) = self.faults.as_ref().filter(|_| wanted) else {
            hello.features = hello.features.without(Features::POSTCOPY);
            return self.facts.tell(Input::Received(Message::Hello(hello)));
        };
        let notices = self.notices.clone();
        faults.order(Step::Prepare, move |faults| {
            if let Err(error) = faults.prepare() {
                let text = format!("post-copy cannot be had: {}", in_full(&error));
                drop(notices.send(Notice::Leftover(text)));
                hello.features = hello.features.without(Features::POSTCOPY);
            }
            Ok::<_, VmmError>(Input::Received(Message::Hello(hello)))
        });
    }

    /// Discards what will be missing. Rounds are barriers: no lane writes, and room is made ahead no more.
    pub(super) fn discard(&mut self, pages: PageSet) {
        self.ahead.close();
        let quiet = self.ahead.quiet();
        if let Some(faults) = &self.faults {
            faults.order(Step::Arm, move |faults| {
                quiet();
                faults.discard(&pages).map(|()| Input::Discarded)
            });
        }
    }

    /// Lets no precopy lane write any more, then discards what is missing and has the guest wait for it.
    pub(super) fn arm(&mut self, missing: PageSet) {
        self.place.windows = None;
        let mut receivers = std::mem::take(&mut self.receivers);
        let quiet = self.ahead.quiet();
        let fetcher = self.fetcher.clone();
        let Some(faults) = &self.faults else {
            // Not agreed on without them.
            return tracing::error!("faults are to be armed where there are none");
        };
        faults.order(Step::Arm, move |faults| {
            receivers.join();
            quiet();
            let pager = faults.arm(&missing)?;
            let begun = fetcher.begin(missing, &pager);
            begun.map_err(|error| VmmError::io("starting fault threads", error))?;
            Ok::<_, VmmError>(Input::Armed)
        });
    }

    /// Ends the waiting for pages, which are all there.
    pub(super) fn disarm(&self) {
        if let Some(faults) = &self.faults {
            let fetcher = self.fetcher.clone();
            faults.order(Step::Disarm, move |faults| {
                faults.disarm()?;
                fetcher.end_faults();
                Ok::<_, VmmError>(Input::Disarmed)
            });
        }
    }

    /// A fetch lane of the session: as many come, and as often, as it takes.
    pub(super) async fn add_fetch_lane(&mut self, arrival: Arrival, id: LaneId) {
        if let Err(error) = self.start_fetch_lane(arrival, id).await {
            tracing::debug!(error = in_full(&error), %id, "no fetch lane");
        }
    }

    async fn start_fetch_lane(
        &mut self,
        arrival: Arrival,
        id: LaneId,
    ) -> Result<(), ferry_stream::Error> {
        let mut lane = arrival.lane;
        let welcome = Message::Welcome(welcome(0));
        timeout(PARTING, lane.writer.send(&welcome))
            .await
            .map_err(io::Error::from)??;
        let lane = lane.into_inner()?.into_lane()?;
        self.fetcher.add(id, lane)?;
        Ok(())
    }
}
