//! The connections that come to a target at work: the source's lanes, and whoever asks.

use std::sync::Arc;

use ferry_stream::lane::ControlLane;
use ferry_stream::message::{
    AbortCode, Features, LaneId, Message, Purpose, Verdict, Versions, Welcome,
};
use tokio::time::timeout;

use super::Driver;
use crate::control::{BoxedConnection, Control};
use crate::core::message::{Input, Inquirer, Step};
use crate::core::outcome::in_full;
use crate::greeting::Arrival;
use crate::send::{GREETING_LIMIT, PARTING};
use crate::vmm::VmmError;

/// Most connections that are talked to at one time, besides the control lane. Whoever has got what it
/// came for makes place for others.
const MAX_TALKS: usize = 32;

impl Driver {
    /// A connection has said what it is for.
    pub(super) async fn arrived(&mut self, arrival: Arrival) {
        // Who has been talked to makes place for others.
        while self.talks.try_join_next().is_some() {}
        let known = self.machine.session() == Some(arrival.hello.session);
        match arrival.hello.purpose {
            Purpose::Migrate if self.control.is_none() => self.adopt(arrival),
            Purpose::Migrate => {
                self.turn_away(arrival, AbortCode::Busy, "another migration is under way");
            }
            Purpose::Lane(lane) if known => self.add_lane(arrival, lane).await,
            Purpose::Fetch(lane) if known && self.faults.is_some() => {
                self.add_fetch_lane(arrival, lane).await;
            }
            Purpose::Inquire if known && self.talks.len() + self.inquirers.len() < MAX_TALKS => {
                self.add_inquirer(arrival);
            }
            Purpose::Inquire if known => {
                self.turn_away(arrival, AbortCode::Busy, "too many ask at once");
            }
            Purpose::Lane(_) | Purpose::Inquire | Purpose::Fetch(_) => {
                self.turn_away(
                    arrival,
                    AbortCode::Session,
                    "that session is not at work here",
                );
            }
        }
    }

    /// This is the migration that is served.
    fn adopt(&mut self, arrival: Arrival) {
        let Arrival {
            lane,
            hello,
            peer,
            borrowed,
        } = arrival;
        if let Some(borrowed) = borrowed {
            self.place.windows = Some(Arc::clone(&borrowed.windows));
            self.lent = Some(Arc::clone(&borrowed.windows));
            self.talks.spawn(borrowed.lanes(self.passed.clone()));
        }
        let session = hello.session;
        let inbox = Some(self.state.clone());
        let control = Control::start(lane.reader, lane.writer, inbox, self.silence, &self.facts);
        self.control = Some(control);
        self.journal.order(Step::Journal, move |journal| {
            journal.set_session(session, &peer);
            // No fact is due: the first record that is written carries the session.
            Ok::<_, VmmError>(Input::Received(Message::Ping))
        });
        self.greet(hello);
    }

    async fn add_lane(&mut self, arrival: Arrival, id: LaneId) {
        match self.machine.enlist(id) {
            Err(why) => self.turn_away(arrival, AbortCode::Protocol, why),
            Ok(()) => {
                if let Err(error) = self.start_lane(arrival.lane, id).await {
                    let (lane, what) = (id, in_full(&error));
                    self.facts.tell(Input::LaneLost { lane, what });
                }
            }
        }
    }

    async fn start_lane(
        &mut self,
        mut lane: ControlLane<BoxedConnection>,
        id: LaneId,
    ) -> Result<(), ferry_stream::Error> {
        let lanes = self.machine.lanes();
        let welcome = Message::Welcome(welcome(lanes));
        // Nobody holds up the hand-over, not even with a full socket.
        timeout(PARTING, lane.writer.send(&welcome))
            .await
            .map_err(std::io::Error::from)??;
        let lane = lane.into_inner()?.into_lane()?;
        let place = self.place.clone();
        self.receivers.start(id, lane, place, &self.facts)?;
        Ok(())
    }

    /// Somebody wants to ask who owns the guest. The question is waited for elsewhere: a link that
    /// stands still must not hold up the hand-over. Whoever asked and went away is not missed.
    fn add_inquirer(&mut self, arrival: Arrival) {
        let (mut lane, asking) = (arrival.lane, self.asking.clone());
        self.talks.spawn(async move {
            let welcomed = lane.writer.send(&Message::Welcome(welcome(0))).await;
            let asked = timeout(GREETING_LIMIT, lane.reader.next()).await;
            if let (Ok(()), Ok(Ok(Some(Message::Inquire)))) = (welcomed, asked) {
                drop(asking.send(lane));
            }
        });
    }

    pub(super) fn inquired(&mut self, lane: ControlLane<BoxedConnection>) {
        self.inquiries += 1;
        let inquirer = Inquirer(self.inquiries);
        self.inquirers.insert(inquirer, lane);
        self.machine
            .handle(self.clock.now(), Input::Inquired(inquirer));
    }

    /// Tells a connection, in a task of its own, that it is not wanted.
    fn turn_away(&mut self, arrival: Arrival, code: AbortCode, text: &'static str) {
        self.talks.spawn(async move {
            let mut lane = arrival.lane;
            let abort = Message::Abort {
                code,
                text: text.to_owned(),
            };
            drop(timeout(PARTING, lane.writer.send(&abort)).await);
        });
    }

    pub(super) async fn answer(&mut self, to: Inquirer, verdict: Verdict) {
        if let Some(mut lane) = self.inquirers.remove(&to) {
            // An answer that is lost is asked for again.
            let answer = Message::Answer(verdict);
            drop(timeout(PARTING, lane.writer.send(&answer)).await);
        }
    }
}

pub(super) fn welcome(lanes: u16) -> Welcome {
    Welcome {
        version: Versions::OURS.highest,
        features: Features::NONE,
        lanes,
    }
}
