//! What happens at the server without our asking.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use serde::Deserialize;
use serde_json::Value;
use tokio::sync::mpsc;

use crate::error::Error;

/// Most events that may be unread, in bytes of their lines plus [`EVENT_COST`] for each.
pub(crate) const UNREAD_MAX: usize = 1 << 20;

/// Events of kind [`EventKind::Other`] are let in only below this, so that they cannot crowd out the
/// rest.
const UNREAD_OTHER_MAX: usize = UNREAD_MAX / 2;

/// What an event costs besides its line, in bytes: about the size of the parsed value.
const EVENT_COST: usize = 256;

/// QEMU's wall clock when something happened. Both are -1 when it could not tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct Timestamp {
    /// Seconds since the epoch.
    pub seconds: i64,
    /// Microseconds within the second.
    pub microseconds: i64,
}

/// Something that happened at the server.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Event {
    /// QEMU's name for it: `STOP`.
    pub name: String,
    /// What it came with; null for nothing.
    pub data: Value,
    /// When it happened, on QEMU's wall clock.
    pub timestamp: Timestamp,
    /// When its bytes were read here.
    pub received_at: Instant,
    /// Length of its line.
    pub(crate) line_bytes: usize,
}

open_enum! {
    /// The state of QEMU's own migration.
    MigrationStatus {
        /// Never asked for.
        None = "none",
        /// Being set up.
        Setup = "setup",
        /// Being cancelled.
        Cancelling = "cancelling",
        /// Cancelled. A guest that was paused for the switchover has got its `RESUME` before.
        Cancelled = "cancelled",
        /// Running.
        Active = "active",
        /// The target runs, pages follow.
        PostcopyActive = "postcopy-active",
        /// Post-copy with a broken link.
        PostcopyPaused = "postcopy-paused",
        /// Post-copy, a new link is being made.
        PostcopyRecoverSetup = "postcopy-recover-setup",
        /// Post-copy, going on after a broken link.
        PostcopyRecover = "postcopy-recover",
        /// Over, and well. The source's run state becomes `postmigrate` a little after the event, and
        /// no event tells of that.
        Completed = "completed",
        /// Over, and not well.
        Failed = "failed",
        /// In COLO.
        Colo = "colo",
        /// The guest is stopped and its disks are drained; waits for `migrate-continue`.
        PreSwitchover = "pre-switchover",
        /// Device state is being saved.
        Device = "device",
        /// Waits for the guest to let go of a device.
        WaitUnplug = "wait-unplug",
    }
}

open_enum! {
    /// What QEMU does about a disk's I/O error.
    IoErrorAction {
        /// Nothing.
        Ignore = "ignore",
        /// The guest is told.
        Report = "report",
        /// The guest is paused.
        Stop = "stop",
    }
}

open_enum! {
    /// What a disk failed at.
    IoOperation {
        /// Reading.
        Read = "read",
        /// Writing.
        Write = "write",
    }
}

open_enum! {
    /// What QEMU does about a guest's panic.
    PanicAction {
        /// The guest is paused.
        Pause = "pause",
        /// QEMU shuts down.
        Poweroff = "poweroff",
        /// Nothing.
        Run = "run",
    }
}

/// The events that a migration has an answer to. Fields that QEMU left out are empty.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum EventKind {
    /// `STOP`: the vCPUs stand still. Disks are drained only afterwards.
    Stop,
    /// `RESUME`: they run.
    Resume,
    /// `RESET`: the machine was reset.
    Reset {
        /// By the guest itself.
        guest: bool,
    },
    /// `SHUTDOWN`: the guest has ended, or QEMU is about to.
    Shutdown {
        /// By the guest itself.
        guest: bool,
        /// QEMU's word for the cause.
        reason: String,
    },
    /// `GUEST_PANICKED`: the guest's kernel has panicked.
    GuestPanicked {
        /// What QEMU does about it.
        action: PanicAction,
    },
    /// `BLOCK_IO_ERROR`: a disk of the guest failed.
    BlockIoError {
        /// The device's name; may be empty.
        device: String,
        /// The block node's name; may be empty.
        node_name: String,
        /// What QEMU does about it.
        action: IoErrorAction,
        /// What it failed at.
        operation: IoOperation,
    },
    /// `MIGRATION`: QEMU's own migration has another state.
    Migration {
        /// The new state.
        status: MigrationStatus,
    },
    /// `MEMORY_DEVICE_SIZE_CHANGE`: a virtio-mem or balloon device has another size.
    MemoryDeviceSizeChange {
        /// The device's id; may be empty.
        id: String,
        /// Its path in QOM; may be empty.
        qom_path: String,
        /// The new size in bytes.
        size: u64,
    },
    /// `DEVICE_DELETED`: a device is gone.
    DeviceDeleted {
        /// The device's id; may be empty.
        device: String,
        /// Its path in QOM.
        path: String,
    },
    /// Anything else: see [`Event::name`].
    Other,
}

impl Event {
    /// What it means to a migration.
    pub fn kind(&self) -> EventKind {
        let text = |key: &str| self.data[key].as_str().unwrap_or_default();
        let flag = |key: &str| self.data[key].as_bool().unwrap_or_default();
        match self.name.as_str() {
            "STOP" => EventKind::Stop,
            "RESUME" => EventKind::Resume,
            "RESET" => EventKind::Reset {
                guest: flag("guest"),
            },
            "SHUTDOWN" => EventKind::Shutdown {
                guest: flag("guest"),
                reason: text("reason").to_owned(),
            },
            "GUEST_PANICKED" => EventKind::GuestPanicked {
                action: text("action").into(),
            },
            "BLOCK_IO_ERROR" => EventKind::BlockIoError {
                device: text("device").to_owned(),
                node_name: text("node-name").to_owned(),
                action: text("action").into(),
                operation: text("operation").into(),
            },
            "MIGRATION" => EventKind::Migration {
                status: text("status").into(),
            },
            "MEMORY_DEVICE_SIZE_CHANGE" => EventKind::MemoryDeviceSizeChange {
                id: text("id").to_owned(),
                qom_path: text("qom-path").to_owned(),
                size: self.data["size"].as_u64().unwrap_or_default(),
            },
            "DEVICE_DELETED" => EventKind::DeviceDeleted {
                device: text("device").to_owned(),
                path: text("path").to_owned(),
            },
            _ => EventKind::Other,
        }
    }
}

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
