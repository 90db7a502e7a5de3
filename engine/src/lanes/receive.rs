//! The receiving side of the page lanes: straight from the socket into guest RAM.

use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use crc32fast::Hasher;
use ferry_stream::lane::{Incoming, PageLaneReader};
use ferry_stream::limits::MAX_DELTA_BYTES;
use ferry_stream::link::{Closer, Lane};
use ferry_stream::message::LaneId;
use ferry_stream::pages::delta::{self, Applied};
use ferry_stream::pages::{Encoding, Record};

use super::ahead::Front;
use super::{PanicWatch, is_death};
use crate::core::layout::{PAGE_SIZE, PageNumber, PageRange, RegionIndex};
use crate::core::message::{Failure, Input, LaneSeen, Step};
use crate::core::outcome::in_full;
use crate::vmm::{Ram, RamWindow, VmmError};
use crate::worker::Facts;

/// Where pages go, and where those come from that are told without bytes.
#[derive(Clone)]
pub(crate) struct Place {
    pub(crate) ram: Arc<dyn Ram>,
    /// The RAM of a source on this host, once both sides have agreed on that.
    pub(crate) windows: Option<Arc<[RamWindow]>>,
    /// How far the pages are that have come, for those who make room for others.
    pub(crate) front: Arc<Front>,
}

/// The receiving lanes of a migration.
#[derive(Default)]
pub(crate) struct Receivers(Vec<ReceivingLane>);

/// A lane, as its owner holds it.
pub(crate) struct ReceivingLane {
    id: LaneId,
    closer: Box<dyn Closer>,
    /// Bytes that have come.
    seen: Arc<AtomicU64>,
    /// Set when this side ends the lane: that it ends is no news then.
    over: Arc<AtomicBool>,
    thread: thread::JoinHandle<Tally>,
}

/// What of a lane is checked and in place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    /// Whole frames.
    pub(crate) frames: u64,
    /// Pages of those after the lane's last end of a round.
    pub(crate) pages: u64,
}

impl Receivers {
    /// Starts a thread for a lane that has said hello.
    pub(crate) fn start(
        &mut self,
        id: LaneId,
        lane: Box<dyn Lane>,
        place: Place,
        facts: &Facts,
    ) -> io::Result<()> {
        let closer = lane.closer()?;
        let (seen, over) = (Arc::default(), Arc::default());
        let receiver = Receiver {
            id,
            lane: Counted {
                lane,
                seen: Arc::clone(&seen),
            },
            reader: PageLaneReader::new(id),
            placer: Placer::new(place),
            facts: facts.clone(),
            over: Arc::clone(&over),
        };
        let thread = thread::Builder::new()
            .name(format!("ferry-lane-{}", id.index.0))
            .spawn(move || receiver.run())?;
        self.0.push(ReceivingLane {
            id,
            closer,
            seen,
            over,
            thread,
        });
        Ok(())
    }

    /// Gives away a lane that is to be ended.
    pub(crate) fn remove(&mut self, id: LaneId) -> Option<ReceivingLane> {
        let at = self.0.iter().position(|lane| lane.id == id)?;
        Some(self.0.swap_remove(at))
    }

    /// How much has come on each lane.
    pub(crate) fn seen(&self) -> Vec<LaneSeen> {
        let seen = |lane: &ReceivingLane| LaneSeen {
            lane: lane.id,
            bytes: lane.seen.load(Ordering::Relaxed),
        };
        self.0.iter().map(seen).collect()
    }

    /// Ends every lane, whatever it is doing.
    pub(crate) fn close(&self) {
        self.0.iter().for_each(ReceivingLane::close);
    }

    /// Waits for the threads, which end once closed: after this nothing writes guest RAM.
    pub(crate) fn join(&mut self) {
        self.close();
        for lane in self.0.drain(..) {
            drop(lane.thread.join());
        }
    }
}

impl ReceivingLane {
    fn close(&self) {
        self.over.store(true, Ordering::Release);
        // One that cannot be closed is ended already.
        drop(self.closer.close());
    }

    /// Ends the lane and waits for its thread: after this nothing of it writes guest RAM. None of a
    /// lane that broke down: it has told so, and the migration ends.
    pub(crate) fn end(self) -> Option<Tally> {
        self.close();
        self.thread.join().ok()
    }
}

/// Why pages could not be placed.
#[derive(Debug, thiserror::Error)]
enum PlaceError {
    #[error(transparent)]
    Wire(#[from] ferry_stream::Error),
    #[error(transparent)]
    Vmm(#[from] VmmError),
    #[error("{range} of {region} lie outside guest RAM")]
    OutsideRam {
        region: RegionIndex,
        range: PageRange,
    },
    #[error("{range} of {region} were told without bytes, and no RAM is shared")]
    NotShared {
        region: RegionIndex,
        range: PageRange,
    },
}

/// What went wrong on which lane.
#[derive(Debug, thiserror::Error)]
#[error("page {lane}")]
struct OnLane {
    lane: LaneId,
    source: Box<dyn std::error::Error + Send + Sync>,
}

/// One lane's thread.
struct Receiver {
    id: LaneId,
    lane: Counted,
    reader: PageLaneReader,
    placer: Placer,
    facts: Facts,
    over: Arc<AtomicBool>,
}

impl Receiver {
    /// Takes in frame after frame. Whatever ends it, what is in place is told to whoever waits.
    fn run(mut self) -> Tally {
        let _watch = PanicWatch(self.facts.clone());
        while !self.over.load(Ordering::Acquire) {
            match self.next() {
                Ok(Some(fact)) => self.facts.tell(fact),
                Ok(None) => {}
                Err(error) => {
                    if !self.over.load(Ordering::Acquire) {
                        self.tell_broken(error);
                    }
                    break;
                }
            }
        }
        Tally {
            frames: self.reader.frames(),
            pages: self.reader.pages(),
        }
    }

    /// Takes in one frame.
    fn next(&mut self) -> Result<Option<Input>, PlaceError> {
        let (round, pages) = match self.reader.next(&mut self.lane)? {
            Incoming::Pages(body) => {
                let placer = &mut self.placer;
                let placed =
                    body.place(|record, data, hasher| placer.place(record, data, hasher))?;
                // Only now: in a corrupt frame it would be the frame's fault.
                for (region, page) in self.placer.mismatched.drain(..) {
                    self.facts.tell(Input::Mismatched {
                        lane: self.id,
                        round: placed.round,
                        region,
                        page,
                    });
                }
                return Ok(None);
            }
            Incoming::RoundEnd { round, pages } => (round, pages),
            Incoming::End => {
                let end = io::Error::from(io::ErrorKind::UnexpectedEof);
                return Err(ferry_stream::Error::from(end).into());
            }
        };
        Ok(Some(Input::RoundEnded {
            lane: self.id,
            round,
            pages,
            frames: self.reader.frames(),
        }))
    }

    fn tell_broken(&self, error: PlaceError) {
        let lane = self.id;
        let source: Box<dyn std::error::Error + Send + Sync> = match error {
            PlaceError::Wire(error) if is_death(&error) => {
                let what = in_full(&error);
                return self.facts.tell(Input::LaneLost { lane, what });
            }
            // Each as it is, so that the peer can be told by a code what went wrong.
            PlaceError::Wire(error) => error.into(),
            PlaceError::Vmm(error) => error.into(),
            error @ (PlaceError::OutsideRam { .. } | PlaceError::NotShared { .. }) => error.into(),
        };
        let failure = Failure::new(Step::Pages, OnLane { lane, source });
        self.facts.tell(Input::Failed(failure));
    }
}

/// A lane that counts what comes, so that one in a black hole can be told from a slow one.
#[derive(Debug)]
struct Counted {
    lane: Box<dyn Lane>,
    seen: Arc<AtomicU64>,
}

impl Read for Counted {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let count = self.lane.read(into)?;
        self.seen.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}

/// Puts what comes where it belongs.
struct Placer {
    place: Place,
    /// Of the frame at hand: pages that are not what their deltas are from.
    mismatched: Vec<(RegionIndex, PageNumber)>,
    page: Box<[u8; PAGE_SIZE]>,
    delta: Box<[u8; MAX_DELTA_BYTES]>,
}

impl Placer {
    fn new(place: Place) -> Self {
        Self {
            place,
            mismatched: Vec::new(),
            page: Box::new([0; PAGE_SIZE]),
            delta: Box::new([0; MAX_DELTA_BYTES]),
        }
    }

    fn place(
        &mut self,
        record: &Record,
        data: &mut dyn io::Read,
        hasher: Hasher,
    ) -> Result<Hasher, PlaceError> {
        let region = RegionIndex(record.run.region);
        let range = PageRange::new(record.run.first, u64::from(record.run.count));
        if !self.place.ram.layout().contains(region, range) {
            return Err(PlaceError::OutsideRam { region, range });
        }
        match record.encoding {
            Encoding::Raw => {
                self.place.front.pass(region, range);
                Ok(self.place.ram.receive(region, range, data, hasher)?)
            }
            Encoding::Zero => {
                self.place.ram.zero(region, range)?;
                Ok(hasher)
            }
            Encoding::Shared => {
                let windows = self.place.windows.as_deref().unwrap_or_default();
                let window = windows.get(usize::from(region.0));
                let window = window.ok_or(PlaceError::NotShared { region, range })?;
                self.place.front.pass(region, range);
                self.place.ram.fetch(region, range, window)?;
                Ok(hasher)
            }
            Encoding::Delta { bytes } => self.apply(region, range, bytes, data, hasher),
            _ => Err(ferry_stream::Error::UnknownEncoding { found: u8::MAX }.into()),
        }
    }

    /// Makes the page at hand what the source has, or leaves it as it is. The delta has checksums of
    /// its own, so this may be done before the frame's is known.
    fn apply(
        &mut self,
        region: RegionIndex,
        range: PageRange,
        bytes: u32,
        data: &mut dyn io::Read,
        mut hasher: Hasher,
    ) -> Result<Hasher, PlaceError> {
        // A table with a longer one was refused.
        let length = (bytes as usize).min(MAX_DELTA_BYTES);
        let delta = &mut self.delta[..length];
        data.read_exact(delta).map_err(ferry_stream::Error::from)?;
        hasher.update(delta);
        self.place.ram.read(region, range, &mut self.page[..])?;
        match delta::apply(delta, &mut self.page)? {
            Applied::Done => self.place.ram.write(region, range, &self.page[..])?,
            Applied::Mismatch => self.mismatched.push((region, range.first)),
        }
        Ok(hasher)
    }
}
