//! The control socket of a migration: how it is watched and steered while it runs.
//!
//! A migration has a Unix socket in a folder of its user alone, beside its journal and of the same
//! name. So running migrations are found without anybody who keeps a list, and one whose engine was
//! killed leaves a socket on which nobody listens: it is not listed, and the next migration of that
//! name replaces it.
//!
//! ```text
//! {"version":1,"command":"info"}
//!                          {"version":1,"answer":"info","job":{"name":"qemu-42-1","phase":"copying",…}}
//! {"version":1,"command":"set-speed","limit":{"bytes-per-s":1048576}}        or "limit":"unlimited"
//!                          {"version":1,"answer":"done"}
//! {"version":1,"command":"set-max-downtime","ms":50}
//!                          {"version":1,"answer":"done"}
//! {"version":1,"command":"abort"}
//!                          {"version":1,"answer":"refused","code":"too-late","reason":"…"}
//! ```
//!
//! One JSON object a line, a request and then its answer, as often as the client likes. Whoever watches
//! asks again. The end of the connection is the end of the migration. Fields may be added to an answer
//! at any time; another meaning is another version.
//!
//! Nobody who connects may do the migration harm, and only its user and root may connect at all: lines,
//! clients and waits are bounded, and whoever sends what is no request is told so and shown out.

mod client;
mod folder;
mod protocol;
mod server;
#[cfg(test)]
mod tests;

pub use self::client::{Client, ClientError};
pub use self::folder::{BadName, Folder, FolderError, JobName};
pub use self::protocol::{
    Answer, Command, Figures, JobInfo, MAX_DOWNTIME_MS, MAX_LINE_BYTES, Packed, RefusalCode, Speed,
    VERSION,
};
pub use self::server::{Server, Steered};
