//! What happens at the server without our asking.

use std::time::Instant;

use serde::Deserialize;
use serde_json::Value;

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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn kind(name: &str, data: Value) -> EventKind {
        let timestamp = Timestamp {
            seconds: 0,
            microseconds: 0,
        };
        let event = Event {
            name: name.into(),
            data,
            timestamp,
            received_at: Instant::now(),
            line_bytes: 0,
        };
        event.kind()
    }

    #[test]
    fn reads_what_qemu_documents() {
        assert_eq!(kind("STOP", Value::Null), EventKind::Stop);
        assert_eq!(kind("RESUME", Value::Null), EventKind::Resume);
        let reset = json!({"guest": true, "reason": "guest-reset"});
        assert_eq!(kind("RESET", reset), EventKind::Reset { guest: true });
        let shutdown = json!({"guest": true, "reason": "guest-shutdown"});
        assert_eq!(
            kind("SHUTDOWN", shutdown),
            EventKind::Shutdown {
                guest: true,
                reason: "guest-shutdown".into()
            }
        );
        let action = PanicAction::Pause;
        let panicked = json!({"action": "pause"});
        assert_eq!(
            kind("GUEST_PANICKED", panicked),
            EventKind::GuestPanicked { action }
        );
        let status = MigrationStatus::Other("brand-new".into());
        let migration = json!({"status": "brand-new"});
        assert_eq!(
            kind("MIGRATION", migration),
            EventKind::Migration { status }
        );
        let io_error = json!({
            "qom-path": "/machine/peripheral/vda", "device": "", "node-name": "disk0",
            "operation": "write", "action": "stop", "nospace": true, "reason": "No space",
        });
        assert_eq!(
            kind("BLOCK_IO_ERROR", io_error),
            EventKind::BlockIoError {
                device: String::new(),
                node_name: "disk0".into(),
                action: IoErrorAction::Stop,
                operation: IoOperation::Write,
            }
        );
        let resized = json!({"id": "vm0", "size": 4096, "qom-path": "/machine/peripheral/vm0"});
        assert_eq!(
            kind("MEMORY_DEVICE_SIZE_CHANGE", resized),
            EventKind::MemoryDeviceSizeChange {
                id: "vm0".into(),
                qom_path: "/machine/peripheral/vm0".into(),
                size: 4096,
            }
        );
        let deleted = json!({"path": "/machine/peripheral/net0"});
        assert_eq!(
            kind("DEVICE_DELETED", deleted),
            EventKind::DeviceDeleted {
                device: String::new(),
                path: "/machine/peripheral/net0".into(),
            }
        );
        assert_eq!(kind("RTC_CHANGE", json!({"offset": 1})), EventKind::Other);
    }

    #[test]
    fn data_of_another_shape_keeps_the_kind() {
        for data in [Value::Null, json!([]), json!({"guest": "yes"}), json!(7)] {
            assert_eq!(kind("RESET", data), EventKind::Reset { guest: false });
        }
    }
}
