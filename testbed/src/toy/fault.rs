//! Faults on order: any call of an embedder's trait can be made to fail, hang or panic.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use std::{io, panic, thread};

use ferry_engine::vmm::VmmError;

/// The calls that the engine makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // each is the method of its name
pub enum Call {
    Read,
    Populated,
    Blank,
    Allocate,
    Write,
    Receive,
    Fetch,
    Zero,
    TrackerStart,
    Collect,
    TrackerStop,
    Watch,
    Inventory,
    RunState,
    Flush,
    Throttle,
    Pause,
    Resume,
    Restore,
    Quit,
    Open,
    Save,
    Abandon,
    Prepare,
    Load,
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The VMM says no.
    Refuse,
    /// A system call fails: whether anything happened cannot be told.
    Io,
    /// The call takes so long, and then works.
    Hang(Duration),
    /// The adapter panics.
    Panic,
}

/// What was called how often, and what shall go wrong.
#[derive(Debug, Default)]
pub struct Faults(Mutex<Book>);

#[derive(Debug, Default)]
struct Book {
    counts: HashMap<Call, u32>,
    planned: Vec<(Call, u32, Fault)>,
}

impl Faults {
    /// Plans `fault` for the `nth` call, counted from 1.
    pub fn plan(&self, call: Call, nth: u32, fault: Fault) {
        self.book().planned.push((call, nth, fault));
    }

    /// How often `call` was made.
    pub fn count(&self, call: Call) -> u32 {
        self.book().counts.get(&call).copied().unwrap_or(0)
    }

    /// Counts a call, and lets happen what is planned for it.
    pub(super) fn hit(&self, call: Call) -> Result<(), VmmError> {
        match self.count_in(call) {
            None => Ok(()),
            Some(Fault::Refuse) => Err(VmmError::failed(format!("{call:?}"), "refused on order")),
            Some(Fault::Io) => Err(VmmError::io(
                format!("{call:?}"),
                io::Error::other("failed on order"),
            )),
            Some(Fault::Hang(span)) => {
                thread::sleep(span);
                Ok(())
            }
            // Without the panic hook: a panic that was ordered is no news for the test's output.
            Some(Fault::Panic) => panic::resume_unwind(Box::new("on order")),
        }
    }

    fn count_in(&self, call: Call) -> Option<Fault> {
        let mut book = self.book();
        let count = book.counts.entry(call).or_default();
        *count += 1;
        let nth = *count;
        let planned = book
            .planned
            .iter()
            .find(|plan| (plan.0, plan.1) == (call, nth));
        planned.map(|plan| plan.2)
    }

    fn book(&self) -> std::sync::MutexGuard<'_, Book> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
