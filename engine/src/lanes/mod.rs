//! Page workers: a thread for each lane, which reads, encodes and sends, or receives, checks and
//! places.

pub(crate) mod encode;
pub(crate) mod receive;
pub(crate) mod send;

use std::thread;
use std::time::Duration;

use ferry_stream::link::Closer;
use ferry_stream::message::LaneIndex;

use crate::core::message::Input;
use crate::core::outcome::in_full;
use crate::worker::Facts;

/// How much later than the end of a page lane the peer's word on the control lane may come.
pub(crate) const LAST_WORD: Duration = Duration::from_millis(100);

/// Tells that a lane has ended. A peer that gives up says why on the control lane and then closes
/// this one; the two race, and the reason is worth a moment.
fn tell_lost(facts: &Facts, lane: LaneIndex, error: &ferry_stream::Error) {
    thread::sleep(LAST_WORD);
    facts.tell(Input::LinkLost {
        what: format!("page {lane}: {}", in_full(error)),
    });
}

/// The means to end every lane from outside its thread.
#[derive(Debug, Default)]
pub(crate) struct Closers(Vec<Box<dyn Closer>>);

impl Closers {
    pub(crate) fn add(&mut self, closer: Box<dyn Closer>) {
        self.0.push(closer);
    }

    /// Ends them. A lane that cannot be closed is ended already.
    pub(crate) fn close(&mut self) {
        for closer in self.0.drain(..) {
            drop(closer.close());
        }
    }
}
