//! The source's end: pages of a guest that stands here and runs elsewhere, sent as they are wanted.

use std::collections::{HashMap, VecDeque};
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ferry_stream::lane::{FETCH_ROUND, PageLaneWriter, Request, RequestReader};
use ferry_stream::link::{Closer, Lane};
use ferry_stream::message::LaneId;
use ferry_stream::pages::{self, PageFrame, Zeros};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::FAULT_LANE;
use crate::core::layout::{PAGE_SIZE, PageNumber, PageRange, RegionIndex};
use crate::core::message::Input;
use crate::core::pageset::{OutsideRam, PageSet};
use crate::core::postcopy::owed::Overstated;
use crate::core::postcopy::{Owed, PageRun};
use crate::linux::priority;
use crate::pacer::{Account, Pacer};
use crate::vmm::{Ram, VmmError};
use crate::worker::Facts;

/// Most pages in a frame of the sweep; half a MiB is what a lane takes at once in a round as well.
const MOST_PAGES: u64 = 64;

/// Fewest pages in one: below that the headers and wake-ups cost more than the wait they save.
const FEWEST_PAGES: u64 = 4;

/// Pages in the first ones.
const FIRST_PAGES: u64 = 16;

/// Most runs in a frame. Each may become many records, for zero pages are told apart.
const MOST_RUNS: usize = 16;

/// Pages that are sent after one that was waited for, unless another is waited for already.
const NEIGHBOURS: u64 = 15;

/// Frames of the sweep that are not known to be in place, at most: one that is being placed, and one on
/// its way. What is behind them in the link's queue waits for both.
const FRAMES_AHEAD: usize = 2;

/// A frame of the sweep is what the link carries in this time: a fault waits behind as much.
const FRAME_TIME: Duration = Duration::from_micros(250);

/// How long the rate of the link is measured at a time: single frames tell more of the scheduler.
const RATE_TIME: Duration = Duration::from_millis(10);

/// A target that has begun to fetch says something on every lane each second. One that says nothing for so
/// long cannot be reached over it.
const SILENCE: Duration = Duration::from_secs(10);

/// How long all may be on its way or in place while the target lacks something still: then the lane is
/// opened anew, upon which the target tells what that is.
const AT_ODDS: Duration = Duration::from_secs(3);

/// How long a lane with nothing to send listens before it looks whether there is something again.
const IDLE: Duration = Duration::from_millis(20);

/// Serves missing pages, once there are some.
#[derive(Clone)]
pub(crate) struct Server(Arc<Shared>);

struct Shared {
    ram: Arc<dyn Ram>,
    pacer: Arc<Pacer>,
    facts: Facts,
    state: Mutex<State>,
    changed: Condvar,
    /// Faults that were heard of and are not answered: the sweep gives way.
    waited_for: AtomicUsize,
    over: AtomicBool,
    bytes: AtomicU64,
    asked_pages: AtomicU64,
}

#[derive(Default)]
struct State {
    /// None before the guest is handed over.
    owed: Option<Owed>,
    /// Since when it is.
    since: Option<Instant>,
    lanes: HashMap<LaneId, Box<dyn Closer>>,
}

/// What was served so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Served {
    /// Pages that are neither on their way nor in place.
    pub(crate) left: u64,
    /// Bytes on the fetch lanes.
    pub(crate) bytes: u64,
    /// Pages that were asked for.
    pub(crate) asked_pages: u64,
}

/// Why a lane ended before the target was whole.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LaneError {
    #[error(transparent)]
    Wire(#[from] ferry_stream::Error),
    #[error("guest RAM cannot be read")]
    Ram(#[from] VmmError),
    #[error(transparent)]
    Overstated(#[from] Overstated),
    #[error("the target asks for what no guest has")]
    Outside(#[from] OutsideRam),
    #[error("the target closed it")]
    Closed,
    #[error("the target asks before anything is missing")]
    Early,
    #[error("the target said nothing for {} s", SILENCE.as_secs())]
    Silent,
    #[error("the target lacks pages that are not owed")]
    AtOdds,
}

impl From<std::io::Error> for LaneError {
    fn from(error: std::io::Error) -> Self {
        Self::Wire(error.into())
    }
}

impl Server {
    pub(crate) fn new(ram: Arc<dyn Ram>, pacer: Arc<Pacer>, facts: Facts) -> Self {
        Self(Arc::new(Shared {
            ram,
            pacer,
            facts,
            state: Mutex::default(),
            changed: Condvar::new(),
            waited_for: AtomicUsize::new(0),
            over: AtomicBool::new(false),
            bytes: AtomicU64::new(0),
            asked_pages: AtomicU64::new(0),
        }))
    }

    /// The guest is handed over without `missing`; what of it is in `first` goes first.
    pub(crate) fn serve(&self, missing: PageSet, first: &PageSet) {
        let mut state = self.lock();
        state.owed = Some(Owed::new(missing, first));
        state.since = Some(Instant::now());
        drop(state);
        self.0.changed.notify_all();
    }

    /// Ends every lane.
    pub(crate) fn close(&self) {
        self.0.over.store(true, Ordering::Release);
        for closer in self.lock().lanes.values() {
            // One that cannot be closed is ended already.
            drop(closer.close());
        }
        self.0.changed.notify_all();
        self.0.pacer.wake();
    }

    /// True when no lane is wanted any more.
    pub(crate) fn is_over(&self) -> bool {
        self.0.over.load(Ordering::Acquire)
    }

    /// What was served so far; none before the guest was handed over.
    pub(crate) fn served(&self) -> Option<Served> {
        let left = self.lock().owed.as_ref()?.left();
        Some(Served {
            left,
            bytes: self.0.bytes.load(Ordering::Relaxed),
            asked_pages: self.0.asked_pages.load(Ordering::Relaxed),
        })
    }

    /// Serves a lane until the target is whole, or the lane is dead. Blocks.
    pub(crate) fn run(&self, id: LaneId, lane: Box<dyn Lane>) -> Result<(), LaneError> {
        let closer = lane.closer()?;
        self.lock().lanes.insert(id, closer);
        // Whoever closed before has not seen it.
        let outcome = if self.is_over() {
            Ok(())
        } else {
            ServedLane::new(self, id, lane).run()
        };
        let mut state = self.lock();
        state.lanes.remove(&id);
        if let Some(owed) = &mut state.owed {
            owed.lost(id);
        }
        drop(state);
        // Others may be idle, and send what this one owes.
        self.0.changed.notify_all();
        outcome
    }

    fn whole(&self) {
        if !self.0.over.swap(true, Ordering::AcqRel) {
            self.0.facts.tell(Input::Whole);
        }
        self.close();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A lane at work.
struct ServedLane<'a> {
    server: &'a Server,
    id: LaneId,
    lane: Box<dyn Lane>,
    reader: RequestReader,
    writer: PageLaneWriter,
    frame: PageFrame,
    account: Account,
    /// Pages in the next frame of the sweep.
    pages: u64,
    /// How many pages are in each frame that is not in place.
    sent: VecDeque<u64>,
    placed: u64,
    /// Pages that came to be in place since the rate is measured.
    placed_pages: u64,
    measured_from: Instant,
    /// When the target said something last.
    heard: Instant,
    /// Since when there is nothing to send.
    nothing_left: Option<Instant>,
}

impl<'a> ServedLane<'a> {
    fn new(server: &'a Server, id: LaneId, lane: Box<dyn Lane>) -> Self {
        Self {
            server,
            id,
            lane,
            reader: RequestReader::new(id),
            writer: PageLaneWriter::new(id),
            frame: PageFrame::new(u32::try_from(MOST_PAGES).unwrap_or(u32::MAX)),
            account: Account::default(),
            pages: FIRST_PAGES,
            sent: VecDeque::new(),
            placed: 0,
            placed_pages: 0,
            measured_from: Instant::now(),
            heard: Instant::now(),
            nothing_left: None,
        }
    }

    fn run(mut self) -> Result<(), LaneError> {
        if self.id.index == FAULT_LANE {
            priority::hurry();
        }
        while !self.server.is_over() {
            let more = if self.id.index == FAULT_LANE {
                self.hear()?
            } else {
                self.sweep()?
            };
            if !more {
                break;
            }
        }
        Ok(())
    }

    /// Sends the next frame, or hears what the target says where that has to come first.
    fn sweep(&mut self) -> Result<bool, LaneError> {
        if self.sent.len() >= FRAMES_AHEAD {
            return self.hear();
        }
        // Before anything is taken: what waits here would be waited for there.
        self.pay();
        if let Some(runs) = self.next_frame() {
            self.nothing_left = None;
            self.send(&runs)?;
            return Ok(true);
        }
        // Another lane may owe something yet.
        if self.has_said(IDLE)? {
            return self.hear();
        }
        let since = *self.nothing_left.get_or_insert_with(Instant::now);
        if self.sent.is_empty() && since.elapsed() > AT_ODDS {
            return Err(LaneError::AtOdds);
        }
        Ok(true)
    }

    /// The next frame of the sweep, once nobody waits for a page that this lane would hold up.
    fn next_frame(&self) -> Option<Vec<PageRun>> {
        let shared = &self.server.0;
        let mut state = self.server.lock();
        loop {
            if self.server.is_over() {
                return None;
            }
            let gives_way = shared.waited_for.load(Ordering::Acquire) > 0;
            match &mut state.owed {
                Some(owed) if !gives_way => return owed.next(self.id, self.pages, MOST_RUNS),
                _ => {}
            }
            state = shared
                .changed
                .wait_timeout(state, IDLE)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Keeps to the bandwidth. Pages that are waited for do not.
    fn pay(&mut self) {
        let bytes = self.pages * PAGE_SIZE as u64;
        let (pacer, over) = (&self.server.0.pacer, &self.server.0.over);
        let paid = pacer.pay(&mut self.account, bytes, over);
        pacer.settle(&mut self.account, paid, bytes);
    }

    /// Hears one request, and does what it says. False when the target is whole.
    fn hear(&mut self) -> Result<bool, LaneError> {
        while !self.has_said(IDLE)? {
            if self.server.is_over() {
                return Ok(false);
            }
            let since = self.server.lock().since;
            let heard = since.map(|since| since.max(self.heard));
            if heard.is_some_and(|heard| heard.elapsed() > SILENCE) {
                return Err(LaneError::Silent);
            }
        }
        self.heard = Instant::now();
        let request = self.reader.next(&mut *self.lane)?;
        match request.ok_or(LaneError::Closed)? {
            Request::Fault { region, page } => {
                self.answer(RegionIndex(region), PageNumber(page))?;
            }
            Request::Placed { frames } => self.placed(frames)?,
            Request::Lacking(lacking) => {
                let mut state = self.server.lock();
                let owed = state.owed.as_mut().ok_or(LaneError::Early)?;
                for run in lacking.runs() {
                    let range = PageRange::new(run.first, run.count);
                    owed.lacking(RegionIndex(lacking.region), range)?;
                }
                drop(state);
                self.server.0.changed.notify_all();
            }
            Request::Whole => {
                self.server.whole();
                return Ok(false);
            }
            // A request of a later version was not agreed on.
            _ => return Err(LaneError::Closed),
        }
        Ok(true)
    }

    /// Sends a page that is waited for, and what lies behind it.
    fn answer(&mut self, region: RegionIndex, page: PageNumber) -> Result<(), LaneError> {
        let shared = Arc::clone(&self.server.0);
        shared.waited_for.fetch_add(1, Ordering::AcqRel);
        let answered = self.send_asked(region, page);
        if shared.waited_for.fetch_sub(1, Ordering::AcqRel) == 1 {
            shared.changed.notify_all();
        }
        answered
    }

    fn send_asked(&mut self, region: RegionIndex, page: PageNumber) -> Result<(), LaneError> {
        let mut state = self.server.lock();
        let owed = state.owed.as_mut().ok_or(LaneError::Early)?;
        let asked = owed.fault(self.id, region, page);
        drop(state);
        if let Some(run) = asked {
            self.server.0.asked_pages.fetch_add(1, Ordering::Relaxed);
            self.send(&[run])?;
        }
        if self.has_said(Duration::ZERO)? {
            return Ok(());
        }
        let mut state = self.server.lock();
        let neighbours = state
            .owed
            .as_mut()
            .and_then(|owed| owed.behind(self.id, region, page, NEIGHBOURS));
        drop(state);
        match neighbours {
            Some(run) => self.send(&[run]),
            None => Ok(()),
        }
    }

    fn placed(&mut self, frames: u64) -> Result<(), LaneError> {
        let mut state = self.server.lock();
        state
            .owed
            .as_mut()
            .ok_or(LaneError::Early)?
            .placed(self.id, frames)?;
        drop(state);
        while self.placed < frames {
            self.placed += 1;
            if let Some(pages) = self.sent.pop_front() {
                self.adapt(pages);
            }
        }
        Ok(())
    }

    /// Makes frames as large as may be without a fault waiting behind them for long.
    fn adapt(&mut self, placed_pages: u64) {
        self.placed_pages += placed_pages;
        let took = self.measured_from.elapsed();
        if took < RATE_TIME {
            return;
        }
        let pages = u128::from(self.placed_pages) * FRAME_TIME.as_nanos() / took.as_nanos();
        let pages = u64::try_from(pages).unwrap_or(MOST_PAGES);
        // Half of the way: what is measured once may be an accident.
        self.pages = u64::midpoint(self.pages, pages).clamp(FEWEST_PAGES, MOST_PAGES);
        self.placed_pages = 0;
        self.measured_from = Instant::now();
    }

    fn send(&mut self, runs: &[PageRun]) -> Result<(), LaneError> {
        self.frame.begin(FETCH_ROUND);
        for &(region, range) in runs {
            let run = pages::PageRun {
                region: region.0,
                first: range.first.0,
                count: u32::try_from(range.count).unwrap_or(u32::MAX),
            };
            let into = self.frame.push_raw(run)?;
            self.server.0.ram.read(region, range, into)?;
            self.frame.elide_zeros(Zeros::Tell);
        }
        let bytes = self.writer.send(&mut *self.lane, &mut self.frame)?;
        self.server.0.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.sent.push_back(self.frame.pages());
        Ok(())
    }

    /// Whether the target has said something, waiting so long for it.
    fn has_said(&self, wait: Duration) -> Result<bool, LaneError> {
        let Some(socket) = self.lane.socket() else {
            return Ok(true);
        };
        let mut watched = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        let wait = PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX);
        let ready = poll(&mut watched, wait).map_err(std::io::Error::from);
        match ready {
            Ok(count) => Ok(count > 0),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}
