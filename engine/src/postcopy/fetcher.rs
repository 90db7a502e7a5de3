//! The target's end: pages that the guest runs without are asked for, checked and placed.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use ferry_stream::lane::{Incoming, PageLaneReader, Request, RequestWriter};
use ferry_stream::link::{Closer, Lane};
use ferry_stream::message::LaneId;
use ferry_stream::pages::{Encoding, Record};
use tokio::sync::mpsc::UnboundedSender;

use super::FAULT_LANE;
use crate::core::layout::{Layout, PAGE_SIZE, PageRange, RegionIndex};
use crate::core::message::{Input, Notice};
use crate::core::outcome::in_full;
use crate::core::pageset::{OutsideRam, PageSet};
use crate::core::postcopy::absence::absences;
use crate::core::postcopy::{Answer, FetchFigures, Lacking};
use crate::linux::priority;
use crate::vmm::{Fault, Pager, VmmError};
use crate::worker::{Clock, Facts};

/// Threads that wait for faults: while one asks, another hears of the next.
const FAULT_THREADS: usize = 2;

/// How long a fault thread waits before it looks whether it is still wanted.
const LOOK: Duration = Duration::from_millis(100);

/// How often every lane says that this side is there.
const BEAT: Duration = Duration::from_secs(1);

/// Fetches missing pages, once there are some.
#[derive(Clone)]
pub(crate) struct Fetcher(Arc<Shared>);

struct Shared {
    layout: Layout,
    clock: Clock,
    facts: Facts,
    notices: UnboundedSender<Notice>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// None before faults are armed.
    armed: Option<Armed>,
    lanes: Vec<LaneEnd>,
    threads: Vec<thread::JoinHandle<()>>,
    fault_threads: Vec<thread::JoinHandle<()>>,
    disarmed: bool,
    whole_told: bool,
    over: bool,
    said_alive: Option<Instant>,
}

struct Armed {
    lacking: Lacking,
    pager: Arc<dyn Pager>,
}

/// A lane, as the others see it.
struct LaneEnd {
    id: LaneId,
    closer: Box<dyn Closer>,
    requests: Arc<Mutex<Requests>>,
}

/// Where a lane's requests go.
struct Requests {
    lane: Box<dyn Lane>,
    writer: RequestWriter,
    /// Frames of the lane that are in place.
    frames: u64,
}

impl Requests {
    fn send(&mut self, requests: &[Request]) -> Result<(), ferry_stream::Error> {
        self.writer.send(&mut *self.lane, requests)
    }

    fn say_placed(&mut self) -> Result<(), ferry_stream::Error> {
        let frames = self.frames;
        self.send(&[Request::Placed { frames }])
    }
}

/// Why a lane ended before every page was there.
#[derive(Debug, thiserror::Error)]
enum LaneError {
    #[error(transparent)]
    Wire(#[from] ferry_stream::Error),
    #[error("pages cannot be placed")]
    Place(#[from] VmmError),
    #[error(transparent)]
    Outside(#[from] OutsideRam),
    #[error("the source closed it")]
    Closed,
    #[error("the source ends a round that has none")]
    RoundEnd,
    #[error("pages in an encoding that no fetch lane has")]
    Encoding,
}

impl Fetcher {
    pub(crate) fn new(
        layout: Layout,
        clock: Clock,
        facts: Facts,
        notices: UnboundedSender<Notice>,
    ) -> Self {
        Self(Arc::new(Shared {
            layout,
            clock,
            facts,
            notices,
            state: Mutex::default(),
            changed: Condvar::new(),
        }))
    }

    /// Takes a lane that has said hello. One of the same number that was there before is dead.
    pub(crate) fn add(&self, id: LaneId, lane: Box<dyn Lane>) -> io::Result<()> {
        let closer = lane.closer()?;
        let requests = Arc::new(Mutex::new(Requests {
            lane: lane.duplicate()?,
            writer: RequestWriter::new(id),
            frames: 0,
        }));
        let end = LaneEnd {
            id,
            closer,
            requests: Arc::clone(&requests),
        };
        let mut state = self.lock();
        if state.over {
            return end.closer.close();
        }
        state.lanes.retain(|other| {
            let stays = other.id.index != id.index;
            if !stays {
                drop(other.closer.close());
            }
            stays
        });
        state.lanes.push(end);
        let fetcher = self.clone();
        let thread = thread::Builder::new()
            .name(format!("ferry-fetch-{}", id.index.0))
            .spawn(move || fetcher.run(id, lane, &requests))?;
        state.threads.push(thread);
        Ok(())
    }

    /// Faults are armed: asks for what is waited for, and takes what comes.
    pub(crate) fn begin(&self, missing: PageSet, pager: &Arc<dyn Pager>) -> io::Result<()> {
        let nothing = PageSet::empty(&self.0.layout);
        let mut state = self.lock();
        state.armed = Some(Armed {
            lacking: Lacking::new(missing, nothing),
            pager: Arc::clone(pager),
        });
        for _ in 0..FAULT_THREADS {
            let (fetcher, pager) = (self.clone(), Arc::clone(pager));
            let thread = thread::Builder::new()
                .name("ferry-fault".to_owned())
                .spawn(move || fetcher.serve_faults(&*pager))?;
            state.fault_threads.push(thread);
        }
        drop(state);
        self.0.changed.notify_all();
        Ok(())
    }

    /// Nobody waits for pages any more: ends the threads that serve faults. The lanes stay, for a source
    /// that has not heard that all is there: what was told on one may be lost with it.
    pub(crate) fn end_faults(&self) {
        let mut state = self.lock();
        state.disarmed = true;
        let threads = std::mem::take(&mut state.fault_threads);
        drop(state);
        for thread in threads {
            drop(thread.join());
        }
    }

    /// Ends every lane and waits for every thread.
    pub(crate) fn end(&self) {
        self.end_faults();
        let mut state = self.lock();
        state.over = true;
        for lane in state.lanes.drain(..) {
            // One that cannot be closed is ended already.
            drop(lane.closer.close());
        }
        let threads = std::mem::take(&mut state.threads);
        drop(state);
        self.0.changed.notify_all();
        for thread in threads {
            drop(thread.join());
        }
    }

    /// True when all is there, and the source has closed its lanes upon that.
    pub(crate) fn source_knows(&self) -> bool {
        let state = self.lock();
        state.whole_told && state.lanes.is_empty()
    }

    /// How it went so far; none before faults were armed.
    pub(crate) fn figures(&self) -> Option<FetchFigures> {
        let state = self.lock();
        let lacking = &state.armed.as_ref()?.lacking;
        Some(lacking.figures())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, what: String) {
        drop(self.0.notices.send(Notice::Leftover(what)));
    }

    /// Hears of faults until the end: pages that the guest gave back fault even when all are there.
    fn serve_faults(&self, pager: &dyn Pager) {
        priority::hurry();
        let mut found = Vec::new();
        loop {
            found.clear();
            let heard = pager.faults(LOOK, &mut found);
            if self.lock().disarmed {
                return;
            }
            self.say_alive();
            let served = heard.and_then(|()| self.serve(pager, &found));
            if let Err(error) = served {
                // Its death is told as an event of the guest; whatever else it is, faults go on being
                // served by the others, and the lanes bring every page in the end.
                self.tell(format!("a fault thread ended: {}", in_full(&error)));
                return;
            }
        }
    }

    /// Says on every lane that this side is there, once in a while.
    fn say_alive(&self) {
        let mut state = self.lock();
        let now = Instant::now();
        if state
            .said_alive
            .is_some_and(|said| now.duration_since(said) < BEAT)
        {
            return;
        }
        state.said_alive = Some(now);
        let lanes: Vec<_> = state
            .lanes
            .iter()
            .map(|lane| Arc::clone(&lane.requests))
            .collect();
        drop(state);
        for requests in lanes {
            // A lane at work says so by itself.
            if let Ok(mut requests) = requests.try_lock() {
                drop(requests.say_placed());
            }
        }
    }

    fn serve(&self, pager: &dyn Pager, faults: &[Fault]) -> Result<(), VmmError> {
        if faults.is_empty() {
            return Ok(());
        }
        let now = self.0.clock.now();
        let mut state = self.lock();
        let mut asked = Vec::new();
        let mut there = Vec::new();
        for &fault in faults {
            let Some(armed) = &mut state.armed else { break };
            match armed.lacking.fault(now, fault) {
                Answer::Ask => asked.push(Request::Fault {
                    region: fault.region.0,
                    page: fault.page.0,
                }),
                Answer::Wait => {}
                Answer::There => there.push(fault),
            }
        }
        let lane = state.lanes.iter().find(|lane| lane.id.index == FAULT_LANE);
        let requests = lane.map(|lane| Arc::clone(&lane.requests));
        drop(state);
        if let (Some(requests), false) = (requests, asked.is_empty()) {
            // A lane that is dead is dialled again, and all is asked for anew.
            drop(lock(&requests).send(&asked));
        }
        for fault in there {
            pager.zero(fault.region, PageRange::new(fault.page.0, 1))?;
        }
        Ok(())
    }

    /// Takes a lane's frames until it ends.
    fn run(&self, id: LaneId, lane: Box<dyn Lane>, requests: &Mutex<Requests>) {
        // Also when it panics: the source would wait for a lane that nobody reads.
        let _gone = Gone { fetcher: self, id };
        let outcome = FetchLane {
            fetcher: self,
            id,
            lane,
            reader: PageLaneReader::new(id),
            requests,
            bytes: Vec::new(),
        }
        .run();
        let state = self.lock();
        let expected = state.over || state.whole_told;
        drop(state);
        if let (Err(error), false) = (outcome, expected) {
            self.tell(format!("fetch {id} was lost: {}", in_full(&error)));
        }
    }

    /// Waits until pages may be placed. None at the end.
    fn wait_armed(&self) -> Option<Arc<dyn Pager>> {
        let mut state = self.lock();
        loop {
            if state.over {
                return None;
            }
            if let Some(armed) = &state.armed {
                return Some(Arc::clone(&armed.pager));
            }
            state = self
                .0
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// What a lane that joins says: nothing before faults are armed.
    fn greeting(&self, id: LaneId) -> Vec<Request> {
        let state = self.lock();
        let Some(Armed { lacking, .. }) = &state.armed else {
            return Vec::new();
        };
        if lacking.is_whole() {
            return vec![Request::Whole];
        }
        let told = absences(lacking.missing()).into_iter();
        let mut wanted = lacking.wanted();
        if id.index != FAULT_LANE {
            wanted.clear();
        }
        let wanted = wanted.into_iter();
        told.map(Request::Lacking)
            .chain(wanted.map(|(region, page)| Request::Fault {
                region: region.0,
                page: page.0,
            }))
            .collect()
    }

    fn claim(&self, region: RegionIndex, range: PageRange) -> Result<Vec<PageRange>, OutsideRam> {
        match &mut self.lock().armed {
            Some(armed) => armed.lacking.claim(region, range),
            None => Ok(Vec::new()),
        }
    }

    fn settled(&self, region: RegionIndex, range: PageRange, placed: bool) {
        let now = self.0.clock.now();
        let mut state = self.lock();
        let Some(armed) = &mut state.armed else {
            return;
        };
        if placed {
            armed.lacking.placed(now, region, range);
        } else {
            armed.lacking.failed(region, range);
        }
        if !armed.lacking.is_whole() || std::mem::replace(&mut state.whole_told, true) {
            return;
        }
        let lanes: Vec<_> = state
            .lanes
            .iter()
            .map(|lane| Arc::clone(&lane.requests))
            .collect();
        drop(state);
        self.0.facts.tell(Input::Whole);
        for requests in lanes {
            // One that is dead is dialled again, and hears of it then.
            drop(lock(&requests).send(&[Request::Whole]));
        }
    }
}

/// Ends a lane whose thread has.
struct Gone<'a> {
    fetcher: &'a Fetcher,
    id: LaneId,
}

impl Drop for Gone<'_> {
    fn drop(&mut self) {
        let mut state = self.fetcher.lock();
        state.lanes.retain(|lane| {
            let stays = lane.id != self.id;
            if !stays {
                // One that cannot be closed is ended already.
                drop(lane.closer.close());
            }
            stays
        });
        let was_last = state.lanes.is_empty() && state.whole_told && !state.over;
        drop(state);
        if was_last {
            self.fetcher.0.facts.tell(Input::SourceLeft);
        }
        if thread::panicking() {
            self.fetcher
                .tell(format!("the thread of fetch {} panicked", self.id));
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A lane at work.
struct FetchLane<'a> {
    fetcher: &'a Fetcher,
    id: LaneId,
    lane: Box<dyn Lane>,
    reader: PageLaneReader,
    requests: &'a Mutex<Requests>,
    /// The bytes of a frame: placed when they are checked, and no sooner.
    bytes: Vec<u8>,
}

impl FetchLane<'_> {
    fn run(mut self) -> Result<(), LaneError> {
        if self.id.index == FAULT_LANE {
            priority::hurry();
        }
        // Under the lock, so that no fault is asked for before the others.
        let mut requests = lock(self.requests);
        let greeting = self.fetcher.greeting(self.id);
        requests.send(&greeting)?;
        drop(requests);
        loop {
            let records = self.read_frame()?;
            let Some(pager) = self.fetcher.wait_armed() else {
                return Ok(());
            };
            self.place(&*pager, &records)?;
            let mut requests = lock(self.requests);
            requests.frames = self.reader.frames();
            requests.say_placed()?;
        }
    }

    /// Reads a frame and checks it.
    fn read_frame(&mut self) -> Result<Vec<Record>, LaneError> {
        self.bytes.clear();
        let body = match self.reader.next(&mut *self.lane)? {
            Incoming::Pages(body) => body,
            Incoming::RoundEnd { .. } => return Err(LaneError::RoundEnd),
            Incoming::End => return Err(LaneError::Closed),
        };
        let records = body.records().to_vec();
        let bytes = &mut self.bytes;
        body.place(|_, data, mut hasher| {
            let start = bytes.len();
            data.read_to_end(bytes)?;
            hasher.update(&bytes[start..]);
            Ok::<_, ferry_stream::Error>(hasher)
        })?;
        Ok(records)
    }

    fn place(&self, pager: &dyn Pager, records: &[Record]) -> Result<(), LaneError> {
        let mut rest = &self.bytes[..];
        for record in records {
            let region = RegionIndex(record.run.region);
            let range = PageRange::new(record.run.first, u64::from(record.run.count));
            let data = match record.encoding {
                Encoding::Zero => None,
                Encoding::Raw => {
                    let length = usize::try_from(record.data_bytes()).unwrap_or(usize::MAX);
                    let (data, after) = rest.split_at_checked(length).ok_or(LaneError::Encoding)?;
                    rest = after;
                    Some(data)
                }
                _ => return Err(LaneError::Encoding),
            };
            for claimed in self.fetcher.claim(region, range)? {
                let placed = match data {
                    None => pager.zero(region, claimed),
                    Some(data) => pager.place(region, claimed, within(data, range, claimed)),
                };
                self.fetcher.settled(region, claimed, placed.is_ok());
                placed?;
            }
        }
        Ok(())
    }
}

/// The bytes of `part`, of those of `range`.
fn within(data: &[u8], range: PageRange, part: PageRange) -> &[u8] {
    let at = |page: u64| usize::try_from(page - range.first.0).unwrap_or(usize::MAX) * PAGE_SIZE;
    &data[at(part.first.0)..at(part.end().0)]
}
