//! What a VMM must offer to be migrated: the traits for embedders.
//!
//! The engine never reaches into a VMM. It calls these traits, from threads of its own, and every
//! call may block for as long as its contract says. No method has a default: an override that was
//! forgotten would lose memory in silence.
//!
//! | trait | called from | role |
//! |---|---|---|
//! | [`Ram`] | every page worker, at once | read at the source, write at the target |
//! | [`Tracker`] | one tracker thread | which pages were written |
//! | [`Fresh`] | every page worker, at once | the same, looked at |
//! | [`Guest`] | one VM thread | run state, pause, resume, end |
//! | [`DeviceState`] | the same VM thread | everything that is not RAM |
//! | [`Faults`] | one fault thread | pages that a guest runs without (post-copy) |
//! | [`Pager`] | every fault and page worker, at once | the same, served |
//!
//! An error from any of them before the hand-over ends the migration as kept: the guest goes on at
//! the source as it was. So report errors early and never swallow one. Only a guest that cannot be
//! slowed ([`Guest::throttle`]) is moved all the same.

use std::error::Error as StdError;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crate::core::layout::{Layout, PageNumber, PageRange, RegionIndex};
use crate::core::pageset::PageSet;
use crate::linux::window_view::WindowView;

/// What went wrong inside a VMM, told by its adapter.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmmError {
    /// The VMM, or its process, is gone: the guest died with it.
    #[error("the VMM is gone: {what}")]
    Gone {
        /// How that showed.
        what: String,
    },
    /// A system call failed.
    #[error("{what}")]
    Io {
        /// What was being done.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// The VMM refused or failed an operation.
    #[error("{what}")]
    Failed {
        /// What was being done.
        what: String,
        /// Why it failed.
        source: Box<dyn StdError + Send + Sync>,
    },
    /// The VMM did something that it must not do now, or has something that cannot be moved.
    #[error("{what}")]
    Unfit {
        /// What is wrong, and what to do about it.
        what: String,
    },
    /// No answer in time.
    #[error("{what} took longer than {limit_ms} ms")]
    TimedOut {
        /// What was being done.
        what: String,
        /// The bound, in milliseconds.
        limit_ms: u64,
    },
}

impl VmmError {
    /// A failed system call, with what was being done.
    pub fn io(what: impl Into<String>, source: io::Error) -> Self {
        Self::Io {
            what: what.into(),
            source,
        }
    }

    /// A failed operation of the VMM, with what was being done.
    pub fn failed(
        what: impl Into<String>,
        source: impl Into<Box<dyn StdError + Send + Sync>>,
    ) -> Self {
        Self::Failed {
            what: what.into(),
            source: source.into(),
        }
    }
}

/// A region of guest RAM, as another process on the same host can read it.
#[derive(Debug)]
pub struct RamWindow {
    /// The file that holds it, open for reading alone: it is given away.
    pub file: File,
    /// Which bytes of the file: as many as the region has.
    pub bytes: Range<u64>,
    /// The same, mapped, where that can be had and somebody has read it.
    view: OnceLock<Option<WindowView>>,
}

impl RamWindow {
    /// The region in `bytes` of `file`.
    pub fn new(file: File, bytes: Range<u64>) -> Self {
        Self {
            file,
            bytes,
            view: OnceLock::new(),
        }
    }

    /// The mapping of it, if `range` of it can be read through one: where the file has a hole by now, or
    /// ends, it must be read itself, which allocates nothing and fails in an orderly way.
    pub(crate) fn view(&self, range: Range<u64>) -> Option<&WindowView> {
        let map = || WindowView::new(&self.file, &self.bytes).ok();
        let view = self.view.get_or_init(map).as_ref()?;
        view.is_whole(&range).then_some(view)
    }

    /// Copies from `offset` in the window as many bytes as `into` has.
    pub(crate) fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let end = offset.saturating_add(into.len() as u64);
        match self.view(offset..end) {
            Some(view) => view.read(offset, into),
            None => self.file.read_exact_at(into, self.bytes.start + offset),
        }
    }
}

/// Guest RAM.
///
/// Called from many threads at once. Ranges that run at the same time never overlap between honest
/// peers, those of `allocate` excepted; a hostile one may name a page twice at once, and then the page may
/// hold anything, and nothing else may. A range outside
/// [`Ram::layout`] is the engine's own fault, and an error.
pub trait Ram: Send + Sync {
    /// The regions. Constant for the life of the value.
    fn layout(&self) -> &Layout;

    /// Copies `range` into `into`, which is exactly as long.
    ///
    /// Source: the guest may be writing: bytes may be torn, never older than the call. A page that the
    /// VMM has not allocated reads as zeros and stays unallocated.
    ///
    /// Target: gives what was blanked, written, received or zeroed there last. A page that is told by
    /// how it differs from that is read, changed and written.
    fn read(&self, region: RegionIndex, range: PageRange, into: &mut [u8]) -> Result<(), VmmError>;

    /// Source: tells `found` every run of `range` that may hold anything but zeros, in order. May
    /// tell of more of the region, where that is known anyway: it is not asked for again.
    ///
    /// A page of `range` outside them was all zeros at some moment during the call.
    fn populated(
        &self,
        region: RegionIndex,
        range: PageRange,
        found: &mut dyn FnMut(PageRange),
    ) -> Result<(), VmmError>;

    /// Source: where an engine on the same host can read the regions, one window for each in the
    /// layout's order. None when it cannot: pages travel as bytes then.
    ///
    /// Whoever reads there sees what [`Ram::read`] would copy at that moment.
    fn windows(&self) -> Option<Vec<RamWindow>>;

    /// Target: makes every page of every region read as zero, whatever was there.
    ///
    /// Called once, before anything is written, while the guest cannot run.
    fn blank(&self) -> Result<(), VmmError>;

    /// Target: makes room for `range` ahead of its pages. It reads as before, and a page that has room
    /// already costs nothing. Where there is no room this is an error.
    ///
    /// Called for small pieces, after `blank` and before the device state is loaded, from threads that
    /// give way to all others; also while the same range is being received, written or zeroed, of which
    /// it must change nothing and hold nothing up. A range for which it was never called is placed all
    /// the same.
    fn allocate(&self, region: RegionIndex, range: PageRange) -> Result<(), VmmError>;

    /// Target: copies `from` into `range`, which is exactly as long.
    fn write(&self, region: RegionIndex, range: PageRange, from: &[u8]) -> Result<(), VmmError>;

    /// Target: reads exactly the bytes of `range` from `from`, straight into guest RAM, and returns
    /// the CRC32 (IEEE) of `seed` continued over those bytes.
    ///
    /// On an error the range holds anything: the engine does not use it before it is sent again.
    fn receive(
        &self,
        region: RegionIndex,
        range: PageRange,
        from: &mut dyn io::Read,
        seed: crc32fast::Hasher,
    ) -> Result<crc32fast::Hasher, VmmError>;

    /// Target: copies `range` from `window`, a source's of the same region, as it is now.
    ///
    /// The source's guest may be writing there. A file that is too short by now is an error; one that is
    /// cut short during the call may end the process. On an error the range holds anything, as with
    /// [`Ram::receive`].
    fn fetch(
        &self,
        region: RegionIndex,
        range: PageRange,
        window: &RamWindow,
    ) -> Result<(), VmmError>;

    /// Target: makes `range` read as zeros.
    fn zero(&self, region: RegionIndex, range: PageRange) -> Result<(), VmmError>;
}

/// Whether a collection ends with the reported pages watched again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rearm {
    /// Every reported page is watched again, atomically with its report.
    Yes,
    /// The last collection, with the guest paused: only looked at, which is cheaper.
    No,
}

/// What a collection tells while it goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// These pages were written.
    Written(RegionIndex, PageRange),
    /// The collection is through with these pages, written or not: nothing more of them is told, and
    /// they may be read.
    Through(RegionIndex, PageRange),
}

impl Found {
    /// The pages, if they were written.
    pub fn written(self) -> Option<(RegionIndex, PageRange)> {
        match self {
            Self::Written(region, range) => Some((region, range)),
            Self::Through(..) => None,
        }
    }
}

/// What a tracker tells while it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begun {
    /// Every later write to these pages will be reported, by whomever it is made: vCPU, device emulation
    /// or direct I/O. They may be read.
    Watched(RegionIndex, PageRange),
    /// These pages were zero when tracking began. What of them is written since is reported, as long as
    /// it is not zero again; so nobody may read them before they are.
    Empty(RegionIndex, PageRange),
}

/// Dirty tracking: which pages were written since they were last reported.
pub trait Tracker: Send {
    /// Begins. The engine reads pages as soon as they are told to be watched, from other threads, so a
    /// range that is told too early loses memory; one that is not told at all is only read later. When
    /// the call returns, all guest RAM is watched that was not told to be empty.
    ///
    /// Worth telling in pieces that take about a millisecond: meanwhile the lanes have work.
    fn start(&mut self, begun: &mut dyn FnMut(Begun)) -> Result<(), VmmError>;

    /// Tells `found` every page written since it was last reported, or since it was watched. The order
    /// is the tracker's own.
    ///
    /// Once it is through with a page, and at the latest when it returns, a read sees at least the write
    /// that led to a report; a write that happens later is in the next report, one that happens during
    /// the call in this one or in the next.
    fn collect(&mut self, rearm: Rearm, found: &mut dyn FnMut(Found)) -> Result<(), VmmError>;

    /// A look at the same, for the page workers. Called once, after `start`. It keeps nothing alive:
    /// after `stop` a look may fail, or find nothing.
    fn fresh(&self) -> Result<Arc<dyn Fresh>, VmmError>;

    /// Ends and leaves nothing behind. May be called at any time, also twice.
    fn stop(&mut self) -> Result<(), VmmError>;
}

/// What was written since it was last reported, looked at from any thread.
///
/// A page worker leaves such pages out: they will be reported, and sent, again.
pub trait Fresh: Send + Sync {
    /// Tells `found`, in order, runs of `range` that the next [`Tracker::collect`] will report. May
    /// miss some. Changes nothing, and takes microseconds.
    fn written(
        &self,
        region: RegionIndex,
        range: PageRange,
        found: &mut dyn FnMut(PageRange),
    ) -> Result<(), VmmError>;
}

/// Whether a guest's vCPUs run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunState {
    /// They run.
    Running,
    /// They are paused, by whomever.
    Paused,
}

/// What happens to a guest without the engine's doing. Each is an input of the core with an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum GuestEvent {
    /// The guest was reset: its RAM changes, through the same page tables.
    Reset,
    /// The guest turned itself off; it will not run again.
    ShutDown,
    /// The guest's kernel panicked and the VMM halted it.
    Panicked,
    /// The VMM paused the guest because of an I/O error.
    IoErrorPause {
        /// The device or node, as the VMM names it.
        device: String,
    },
    /// Somebody else paused the guest.
    ForeignPause,
    /// Somebody else resumed the guest.
    ForeignResume,
    /// The VMM itself is gone, or its control connection is.
    Gone {
        /// How that showed.
        what: String,
    },
}

/// Where a guest's events go. May be called from any thread; never blocks.
pub type EventSink = Arc<dyn Fn(GuestEvent) + Send + Sync>;

/// Everything about the VM that must be the same at both sides, as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inventory {
    /// Architecture, in the VMM's own words: `x86_64`.
    pub arch: String,
    /// The versioned machine type: `pc-q35-10.0`.
    pub machine: String,
    /// The VMM's name and version, for people: `QEMU 10.0.2`.
    pub vmm: String,
    /// Guest RAM.
    pub layout: Layout,
    /// Devices, one line each, in a stable order. Compared only with an earlier reading of the same
    /// VM; never between source and target.
    pub devices: Vec<String>,
}

/// When the guest stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stopped {
    /// The moment from which no vCPU ran: the start of the blackout.
    pub at: Instant,
    /// The moment from which all I/O had landed, and the disks were flushed.
    pub drained_at: Instant,
}

/// What a pause is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PauseFor {
    /// A non-live move: the guest stays paused while all its RAM is copied.
    Copy,
    /// The switchover: [`DeviceState::save`] follows.
    Switchover,
}

/// The guest: its run state, and the life of its VMM.
///
/// The methods of this trait and of [`DeviceState`] are called one at a time, from threads that may
/// block: the first three before the VM thread starts, all others from it.
pub trait Guest: Send {
    /// From now on tells `sink` what happens to the guest without the engine's doing.
    fn watch(&mut self, sink: EventSink) -> Result<(), VmmError>;

    /// Reads the inventory anew.
    fn inventory(&mut self) -> Result<Inventory, VmmError>;

    /// Whether the guest runs now.
    fn run_state(&mut self) -> Result<RunState, VmmError>;

    /// Source: writes out, with the guest running, what a pause would otherwise wait for (dirty
    /// caches of disk images). Called from a thread of its own through the returned handle, so that
    /// the VM thread stays free.
    fn flusher(&mut self) -> Box<dyn FnMut() -> Result<(), VmmError> + Send>;

    /// Source: leaves the running guest all but `percent` of the time that it would have, 0 to 99, each
    /// vCPU alike; 0 gives all of it back, at once. [`Guest::restore`] does that, too. An error leaves it
    /// as slow as it was, or anything between that and what was wanted; the move goes on without.
    fn throttle(&mut self, percent: u8) -> Result<(), VmmError>;

    /// Source: pauses the guest. When it returns, no vCPU runs and all its I/O has landed in RAM.
    /// Idempotent; a guest that was paused already keeps its earlier moment. Bounded.
    fn pause(&mut self, why: PauseFor) -> Result<Stopped, VmmError>;

    /// Lets the guest run. When it returns, it runs. At the target this is the one call that makes
    /// it the owner; at the source, the way back after a failed move. Bounded.
    fn resume(&mut self) -> Result<(), VmmError>;

    /// Puts back every setting that the engine changed, except the run state. Idempotent; called on
    /// every way out on which the VMM lives on: at the source when the guest stays, at the target when
    /// it has it.
    fn restore(&mut self) -> Result<(), VmmError>;

    /// Ends the VMM: at the source after the guest has moved, at the target when it did not get the
    /// guest. Never called on an owner. Idempotent.
    fn quit(&mut self) -> Result<(), VmmError>;
}

/// Everything that is not RAM: registers, devices, clocks.
///
/// Called from the same thread as [`Guest`].
pub trait DeviceState: Send {
    /// Source: keeps `sink` for what [`DeviceState::save`] will write. What is large and may travel
    /// before the pause (ROMs, video memory) can be written from now on, from any thread.
    fn open(&mut self, sink: Box<dyn io::Write + Send>) -> Result<(), VmmError>;

    /// Source: writes the state of the paused guest into the sink and drops it. May still change
    /// guest RAM: the engine collects once more afterwards. Bounded.
    fn save(&mut self) -> Result<(), VmmError>;

    /// Source: undoes `open` and `save`, so that the guest can be resumed here. Idempotent, allowed
    /// at any time before the guest was given away.
    fn abandon(&mut self) -> Result<(), VmmError>;

    /// Target: gets ready to load. When it returns, the guest cannot start by itself, neither before
    /// the load nor after it.
    fn prepare(&mut self) -> Result<(), VmmError>;

    /// Target: reads the state from `from` and loads it. `from` holds back what must not be loaded
    /// before all RAM is in place. When it returns, the guest is complete and paused, and
    /// [`Guest::resume`] is all that is missing. An error of `from` ends the load with an error.
    fn load(&mut self, from: &mut dyn io::Read) -> Result<(), VmmError>;
}

/// An access to a page that is not there yet, which blocks whoever made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fault {
    /// The region.
    pub region: RegionIndex,
    /// The page.
    pub page: PageNumber,
    /// The thread of the VMM that waits, by its number in the engine's own pid namespace: a vCPU, or
    /// one that works for the guest. 0 where it is not known.
    pub thread: u32,
}

/// Target: the pages that a guest runs without, since it was handed over before they came (post-copy).
///
/// `prepare`, perhaps `discard`, then `arm`, then `disarm`. A value that is dropped when it was armed and not disarmed
/// leaves everything as it is: whoever waits for a page waits on, and is never given another one.
pub trait Faults: Send {
    /// Gets ready, while nothing of the guest has been loaded. An error means that post-copy cannot be
    /// had here, and says what to do about it; nothing was changed then, and precopy works.
    fn prepare(&mut self) -> Result<(), VmmError>;

    /// Makes `pages` hold nothing, whatever came of them before: ahead of `arm`, which then has less to
    /// do. Called after `prepare`, when nobody writes these pages, with nothing of the guest loaded.
    fn discard(&mut self, pages: &PageSet) -> Result<(), VmmError>;

    /// Makes `missing` hold nothing, whatever came of these pages before. From when it returns, an
    /// access to one of them blocks whoever makes it until the page is placed, and is told as a
    /// [`Fault`]; all others read as before, though an access to one that has no memory yet may block
    /// and be told as well.
    ///
    /// Called once, after `prepare`, when nobody writes guest RAM any more and before the device state
    /// is loaded. Bounded: a guest is waiting.
    fn arm(&mut self, missing: &PageSet) -> Result<Arc<dyn Pager>, VmmError>;

    /// Every page is there: nobody is blocked any more, and nothing is left behind. Idempotent, and
    /// allowed without `arm`.
    fn disarm(&mut self) -> Result<(), VmmError>;
}

/// Serves the faults of a guest whose pages are missing.
///
/// Called from many threads at once, with no help from the VMM: its control connection may itself be
/// blocked by a fault.
pub trait Pager: Send + Sync {
    /// Waits for faults, at most for `limit`, and adds those that there are to `found`. The same
    /// access may be told more than once.
    fn faults(&self, limit: Duration, found: &mut Vec<Fault>) -> Result<(), VmmError>;

    /// Places `from`, which is exactly as long as `range`, and wakes whoever waits for it. Atomic for
    /// each page: nobody ever sees a part of one. The engine places every page once; a page that is
    /// there all the same stays as it is.
    fn place(&self, region: RegionIndex, range: PageRange, from: &[u8]) -> Result<(), VmmError>;

    /// Makes the pages of `range` that have no memory read as zeros, leaves the others as they are, and
    /// wakes whoever waits for any of them.
    fn zero(&self, region: RegionIndex, range: PageRange) -> Result<(), VmmError>;
}

/// The parts of a VM, handed to a migration.
pub struct Vm {
    /// Its RAM.
    pub ram: Arc<dyn Ram>,
    /// Its dirty tracking; used at the source.
    pub tracker: Box<dyn Tracker>,
    /// Its run state and life.
    pub guest: Box<dyn Guest>,
    /// Its device state.
    pub state: Box<dyn DeviceState>,
    /// How it waits for pages, used at the target; `None` where it cannot.
    pub faults: Option<Box<dyn Faults>>,
}
