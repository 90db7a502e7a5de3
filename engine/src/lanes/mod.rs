//! Page workers: a thread for each lane, which reads, encodes and sends, or receives, checks and
//! places.

pub(crate) mod ahead;
pub(crate) mod bases;
mod deltas;
pub(crate) mod encode;
pub(crate) mod feed;
mod fresh;
mod log;
pub(crate) mod receive;
pub(crate) mod send;
mod sender;

use std::thread;
use std::time::Duration;

use crate::core::message::{Failure, Input, Step};
use crate::worker::Facts;

/// How much later than the end of the control lane the peer's last word may be read.
pub(crate) const LAST_WORD: Duration = Duration::from_millis(100);

/// True when a lane that ends so has died, and the migration goes on without it. Wrong bytes are no
/// death: what else is wrong then, nobody knows.
fn is_death(error: &ferry_stream::Error) -> bool {
    use ferry_stream::Error;
    matches!(error, Error::Io { .. } | Error::Truncated { .. })
}

/// Tells of a thread that panicked: the migration ends, and the guest is kept.
struct PanicWatch(Facts);

impl Drop for PanicWatch {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.tell(Input::Failed(Failure::new(
                Step::Pages,
                "a page worker panicked",
            )));
        }
    }
}
