//! An asynchronous QMP client.
//!
//! QMP is how QEMU is driven: one JSON object a line, commands in, replies and events out. This
//! crate knows JSON and sockets and nothing of migration. It exists because a migration engine asks
//! more of a client than most do:
//!
//! - **Latency.** In the blackout every millisecond is the guest's. Commands are written as short as
//!   JSON allows (QEMU reads them one byte at a time), several may be in flight, and events carry the
//!   moment at which they arrived.
//! - **Nothing lost.** An event that tells of the guest's fate is never dropped in silence; see
//!   [`Events`].
//! - **Clear ends.** A peer that closes, sends garbage, never greets or never answers is told apart,
//!   and every command in flight hears of it. Every wait has a bound.
//!
//! ```no_run
//! use ferry_qmp::commands::{QueryStatus, Stop};
//! use ferry_qmp::{Client, EventKind, Options};
//!
//! # async fn pause() -> Result<(), ferry_qmp::Error> {
//! let address = "unix:/run/vm/qmp.sock".parse()?;
//! let (client, mut events) = Client::connect(&address, &Options::default()).await?;
//! println!("QEMU {}", client.greeting().version);
//!
//! // Both are on their way before the first is awaited.
//! let stopped = client.execute(Stop);
//! let status = client.execute(QueryStatus);
//! stopped.await?;
//! println!("now {}", status.await?.status);
//!
//! while let Some(event) = events.next().await {
//!     if event.kind() == EventKind::Stop {
//!         println!("stopped at {:?}", event.received_at);
//!         break;
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! | module | role |
//! |---|---|
//! | [`proto`] | the protocol without any I/O: bytes in, messages out; commands in, bytes out |
//! | [`Client`], [`Events`] | one connection, driven by one task |
//! | [`commands`] | typed commands and their replies |
#![forbid(unsafe_code)]

#[macro_use]
mod open_enum;

mod address;
mod client;
pub mod commands;
mod connection;
mod error;
mod event;
mod events;
pub mod proto;

pub use address::Address;
pub use client::{Client, Options, Peer};
pub use commands::Command;
pub use error::{Error, ErrorClass};
pub use event::{
    Event, EventKind, IoErrorAction, IoOperation, MigrationStatus, PanicAction, Timestamp,
};
pub use events::Events;
pub use proto::{Greeting, Version};
