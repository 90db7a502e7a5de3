//! The queue between a connection and whoever reads its events.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use tokio::sync::mpsc;

use crate::error::Error;
use crate::event::{Event, EventKind};

/// Most events that may be unread, in bytes of their lines plus [`EVENT_COST`] for each.
const UNREAD_MAX: usize = 1 << 20;

/// Events of kind [`EventKind::Other`] are let in only below this, so that they cannot crowd out the
/// rest.
const UNREAD_OTHER_MAX: usize = UNREAD_MAX / 2;

/// What an event costs besides its line, in bytes: about the size of the parsed value.
const EVENT_COST: usize = 256;

/// The events of a connection, in order.
///
/// Unread events are kept, up to 1 MiB of them: some thousands. A reader who falls behind:
/// - from half of that on, events of kind [`EventKind::Other`] are dropped and counted
///   ([`Events::dropped`]);
/// - at the limit the connection ends with [`Error::EventsUnread`], which every command then gets.
///
/// So an event that tells of the guest's fate is never lost without the caller's learning of it. Who
/// does not care for events drops this value: then none are kept.
#[derive(Debug)]
pub struct Events {
    queue: mpsc::UnboundedReceiver<(Event, usize)>,
    unread: Arc<Unread>,
}

/// Shared by both ends of the queue.
#[derive(Debug, Default)]
struct Unread {
    bytes: AtomicUsize,
    dropped: AtomicU64,
}

impl Events {
    /// The next event; nothing when the connection has ended and all events were read. No event is
    /// lost when the future is dropped.
    pub async fn next(&mut self) -> Option<Event> {
        let (event, cost) = self.queue.recv().await?;
        self.unread.bytes.fetch_sub(cost, Ordering::Relaxed);
        Some(event)
    }

    /// How many events of kind [`EventKind::Other`] were dropped because they were not read.
    pub fn dropped(&self) -> u64 {
        self.unread.dropped.load(Ordering::Relaxed)
    }
}

/// Where the connection puts events.
#[derive(Debug)]
pub(crate) struct EventSink {
    queue: mpsc::UnboundedSender<(Event, usize)>,
    unread: Arc<Unread>,
}

impl EventSink {
    /// Queues an event, or fails when that cannot be done without losing one that matters.
    pub(crate) fn put(&self, event: Event) -> Result<(), Error> {
        if self.queue.is_closed() {
            return Ok(());
        }
        let cost = EVENT_COST + event.line_bytes;
        let unread = self.unread.bytes.load(Ordering::Relaxed) + cost;
        if unread > UNREAD_OTHER_MAX && event.kind() == EventKind::Other {
            self.unread.dropped.fetch_add(1, Ordering::Relaxed);
            return Ok(());
        }
        if unread > UNREAD_MAX {
            return Err(Error::EventsUnread { limit: UNREAD_MAX });
        }
        self.unread.bytes.fetch_add(cost, Ordering::Relaxed);
        // It fails when the reader has just gone: then nobody misses the event.
        let _ = self.queue.send((event, cost));
        Ok(())
    }
}

pub(crate) fn queue() -> (EventSink, Events) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let unread = Arc::new(Unread::default());
    let sink = EventSink {
        queue: sender,
        unread: Arc::clone(&unread),
    };
    let events = Events {
        queue: receiver,
        unread,
    };
    (sink, events)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use serde_json::Value;

    use super::*;
    use crate::event::Timestamp;

    fn event(name: &str, line_bytes: usize) -> Event {
        Event {
            name: name.into(),
            data: Value::Null,
            timestamp: Timestamp {
                seconds: 0,
                microseconds: 0,
            },
            received_at: Instant::now(),
            line_bytes,
        }
    }

    /// An event that takes a tenth of the queue.
    fn tenth(name: &str) -> Event {
        event(name, UNREAD_MAX / 10 - EVENT_COST)
    }

    #[tokio::test]
    async fn a_reader_who_keeps_up_loses_nothing() {
        let (sink, mut events) = queue();
        for name in ["STOP", "RTC_CHANGE"].repeat(50) {
            sink.put(tenth(name)).unwrap();
            assert_eq!(events.next().await.unwrap().name, name);
        }
        assert_eq!(events.dropped(), 0);
        drop(sink);
        assert!(events.next().await.is_none());
    }

    #[tokio::test]
    async fn what_matters_is_kept_or_the_loss_is_an_error() {
        let (sink, mut events) = queue();
        for _ in 0..8 {
            sink.put(tenth("RTC_CHANGE")).unwrap();
        }
        assert_eq!(events.dropped(), 3);
        for _ in 0..5 {
            sink.put(tenth("MIGRATION")).unwrap();
        }
        let lost = sink.put(tenth("STOP"));
        assert!(
            matches!(lost, Err(Error::EventsUnread { limit: UNREAD_MAX })),
            "{lost:?}"
        );
        drop(sink);
        let mut names = Vec::new();
        while let Some(event) = events.next().await {
            names.push(event.name);
        }
        assert_eq!(names, [["RTC_CHANGE"; 5], ["MIGRATION"; 5]].concat());
    }

    #[test]
    fn without_a_reader_nothing_is_kept() {
        let (sink, events) = queue();
        drop(events);
        for _ in 0..50 {
            sink.put(tenth("STOP")).unwrap();
        }
        assert_eq!(sink.unread.bytes.load(Ordering::Relaxed), 0);
    }
}
