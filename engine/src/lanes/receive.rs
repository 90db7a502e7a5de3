//! The receiving side of the page lanes: straight from the socket into guest RAM.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::{io, thread};

use crc32fast::Hasher;
use ferry_stream::lane::{Incoming, PageLaneReader};
use ferry_stream::link::Lane;
use ferry_stream::message::{LaneId, LaneIndex};
use ferry_stream::pages::{Encoding, Record};

use super::send::PanicWatch;
use super::{Closers, tell_lost};
use crate::core::layout::{PageRange, RegionIndex};
use crate::core::message::{Failure, Input, Step};
use crate::vmm::{Ram, VmmError};
use crate::worker::Facts;

/// The receiving lanes of a migration.
#[derive(Default)]
pub(crate) struct Receivers {
    threads: Vec<thread::JoinHandle<()>>,
    closers: Closers,
    /// Set when this side ends the lanes: that they end is no news then.
    over: Arc<AtomicBool>,
}

impl Receivers {
    /// Starts a thread for a lane that has said hello.
    pub(crate) fn start(
        &mut self,
        index: LaneIndex,
        lane: Box<dyn Lane>,
        ram: &Arc<dyn Ram>,
        facts: &Facts,
    ) -> io::Result<()> {
        self.closers.add(lane.closer()?);
        let reader = PageLaneReader::new(LaneId::first(index));
        let receiver = Receiver {
            index,
            lane,
            reader,
            ram: Arc::clone(ram),
            facts: facts.clone(),
            over: Arc::clone(&self.over),
        };
        let name = format!("ferry-lane-{}", index.0);
        self.threads.push(
            thread::Builder::new()
                .name(name)
                .spawn(move || receiver.run())?,
        );
        Ok(())
    }

    /// Ends every lane, whatever it is doing.
    pub(crate) fn close(&mut self) {
        self.over.store(true, Ordering::Release);
        self.closers.close();
    }

    /// Waits for the threads, which end once closed: after this nothing writes guest RAM.
    pub(crate) fn join(&mut self) {
        self.close();
        for thread in self.threads.drain(..) {
            drop(thread.join());
        }
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
}

/// One lane's thread.
struct Receiver {
    index: LaneIndex,
    lane: Box<dyn Lane>,
    reader: PageLaneReader,
    ram: Arc<dyn Ram>,
    facts: Facts,
    over: Arc<AtomicBool>,
}

impl Receiver {
    fn run(mut self) {
        let _watch = PanicWatch(self.facts.clone());
        while !self.over.load(Ordering::Acquire) {
            match self.next() {
                Ok(Some(fact)) => self.facts.tell(fact),
                Ok(None) => {}
                Err(_) if self.over.load(Ordering::Acquire) => return,
                Err(error) => {
                    return self.tell_broken(error);
                }
            }
        }
    }

    /// Takes in one frame.
    fn next(&mut self) -> Result<Option<Input>, PlaceError> {
        match self.reader.next(&mut *self.lane)? {
            Incoming::Pages(body) => {
                let ram = &*self.ram;
                body.place(|record, data, hasher| place(ram, record, data, hasher))?;
                Ok(None)
            }
            Incoming::RoundEnd { round, pages } => Ok(Some(Input::RoundEnded { round, pages })),
            Incoming::End => {
                Err(ferry_stream::Error::from(io::Error::from(io::ErrorKind::UnexpectedEof)).into())
            }
        }
    }

    fn tell_broken(&self, error: PlaceError) {
        let failure = match error {
            PlaceError::Wire(
                error @ (ferry_stream::Error::Io { .. } | ferry_stream::Error::Truncated { .. }),
            ) => return tell_lost(&self.facts, self.index, &error),
            // Each as it is, so that the peer can be told by a code what went wrong.
            PlaceError::Wire(error) => Failure::new(Step::Pages, error),
            PlaceError::Vmm(error) => Failure::new(Step::Pages, error),
            error @ PlaceError::OutsideRam { .. } => Failure::new(Step::Pages, error),
        };
        self.facts.tell(Input::Failed(failure));
    }
}

fn place(
    ram: &dyn Ram,
    record: &Record,
    data: &mut dyn io::Read,
    hasher: Hasher,
) -> Result<Hasher, PlaceError> {
    let region = RegionIndex(record.run.region);
    let range = PageRange::new(record.run.first, u64::from(record.run.count));
    if !ram.layout().contains(region, range) {
        return Err(PlaceError::OutsideRam { region, range });
    }
    match record.encoding {
        Encoding::Raw => Ok(ram.receive(region, range, data, hasher)?),
        Encoding::Zero => {
            ram.zero(region, range)?;
            Ok(hasher)
        }
        _ => Err(ferry_stream::Error::UnknownEncoding { found: u8::MAX }.into()),
    }
}
