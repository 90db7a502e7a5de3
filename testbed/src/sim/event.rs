//! What happens, and what will happen next.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;
use std::time::Duration;

use ferry_engine::core::message::Input;
use ferry_stream::message::{Message, Verdict};

use super::link::Frame;
use super::plan::{Mischief, Side};
use super::worker::Thread;

/// What happens.
pub(super) enum Event {
    /// A machine learns something.
    Fact(Side, Input),
    /// A thread has done its job.
    Done(Side, Thread),
    /// The source's tracker gets through with the next part of guest RAM.
    ScansOn,
    /// The source's worker of a lane has read and sent what it was at.
    LaneSent(usize),
    /// Something arrives on a lane.
    LaneArrives(usize, Frame),
    /// The target's worker of a lane has placed what arrived first, or this, which is late.
    LanePlaces(usize, Option<Frame>),
    /// The hello of a lane arrives.
    LaneHello(usize),
    /// Its answer arrives: whether it is welcome.
    LaneAnswered(usize, bool),
    /// A side notices that a lane is gone.
    LaneNotices(Side, usize),
    /// The target's worker of a lane ends.
    LaneEnds(usize),
    /// A message arrives on the control lane.
    Arrives(Side, Message),
    /// A side notices that a link is gone.
    Notices(Side, &'static str),
    /// A guest's vCPUs write.
    Tick(Side),
    /// A machine's deadline.
    Wake(Side),
    /// Mischief.
    Mischief(Mischief),
    /// A question arrives at the target.
    AskArrives(u64),
    /// A question ends.
    AskEnds(u64, Option<Verdict>),
}

impl Event {
    /// A fact as an event, where it has a twin that may come late.
    pub(super) fn twin(side: Side, input: &Input) -> Option<Self> {
        let twin = match input {
            Input::LaneOpen(lane) => Input::LaneOpen(*lane),
            Input::StateOpen => Input::StateOpen,
            Input::Flushed => Input::Flushed,
            Input::Paused { at, drained } => Input::Paused {
                at: *at,
                drained: *drained,
            },
            Input::Sent(totals) => Input::Sent(*totals),
            Input::Undone(Ok(state)) => Input::Undone(Ok(*state)),
            Input::Retired => Input::Retired,
            Input::TrackingStopped => Input::TrackingStopped,
            Input::Prepared => Input::Prepared,
            Input::Loaded => Input::Loaded,
            Input::Resumed => Input::Resumed,
            Input::Quit => Input::Quit,
            Input::Journaled(record) => Input::Journaled(*record),
            _ => return None,
        };
        Some(Self::Fact(side, twin))
    }
}

/// What is to happen, in order of time, and at one time in the order it was scheduled.
#[derive(Default)]
pub(super) struct Agenda {
    queue: BinaryHeap<Reverse<Scheduled>>,
    scheduled: u64,
    /// Events that are not guests at work: when there are none, nothing will change.
    pending: usize,
}

impl Agenda {
    pub(super) fn schedule(&mut self, at: Duration, event: Event) {
        self.scheduled += 1;
        if !matches!(event, Event::Tick(_)) {
            self.pending += 1;
        }
        self.queue.push(Reverse(Scheduled {
            at,
            order: self.scheduled,
            event,
        }));
    }

    /// The next event, unless only guests are left at work.
    pub(super) fn next(&mut self) -> Option<(Duration, Event)> {
        if self.pending == 0 {
            return None;
        }
        let Reverse(next) = self.queue.pop()?;
        if !matches!(next.event, Event::Tick(_)) {
            self.pending -= 1;
        }
        Some((next.at, next.event))
    }
}

struct Scheduled {
    at: Duration,
    order: u64,
    event: Event,
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Scheduled {}

impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Scheduled {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}
