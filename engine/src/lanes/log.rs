//! What a lane has taken in the open round: enough to take it again when the lane dies.
//!
//! Written by the lane's thread alone, without a lock, and read when that has ended. A round that is
//! done needs no log: rounds are barriers.

use std::sync::Arc;

use super::feed::Place;
use super::send::{RoundOrder, Run};
use crate::core::message::Reclaimed;
use crate::core::pageset::{Cursor, OutsideRam, PageSet};

/// Bytes in the log for a chunk of half a MiB: 32 MiB for a TiB of guest RAM, all lanes together.
const CHUNK_LOG_BYTES: usize = 16;

const _: () = assert!(size_of::<Chunk>() == CHUNK_LOG_BYTES);

/// A chunk: where it was taken, and how many of its pages were told.
#[derive(Clone, Copy, Debug)]
struct Chunk {
    page: u64,
    segment: u32,
    region: u16,
    told: u16,
}

impl Chunk {
    fn place(self) -> Place {
        let (region, page) = (self.region, self.page);
        Place {
            segment: self.segment,
            cursor: Cursor { region, page },
        }
    }
}

/// The log of one lane. Each chunk is a frame, in order.
#[derive(Default)]
pub(crate) struct Log {
    order: Option<Arc<RoundOrder>>,
    /// The number of the round's first frame.
    first: u64,
    chunks: Vec<Chunk>,
}

/// A target that claims frames which were never sent.
#[derive(Debug, thiserror::Error)]
#[error("the target has {claimed} frames of a lane on which {sent} were sent")]
pub(crate) struct FramesClaimed {
    claimed: u64,
    sent: u64,
}

/// Why a dead lane's pages cannot be found.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReclaimError {
    #[error(transparent)]
    Claimed(#[from] FramesClaimed),
    #[error(transparent)]
    Outside(#[from] OutsideRam),
}

impl Log {
    /// A round begins, and with it a new log. `first` is the number of the next frame.
    pub(super) fn begin(&mut self, order: &Arc<RoundOrder>, first: u64) {
        self.order = Some(Arc::clone(order));
        self.first = first;
        self.chunks.clear();
    }

    /// A chunk is taken: from here on it is the lane's to send.
    pub(super) fn take(&mut self, at: Place) {
        self.chunks.push(Chunk {
            page: at.cursor.page,
            segment: at.segment,
            region: at.cursor.region,
            told: 0,
        });
    }

    /// So many pages of the chunk just taken are told. With none there is no frame.
    pub(super) fn tell(&mut self, pages: u64) {
        if pages == 0 {
            self.chunks.pop();
        } else if let Some(chunk) = self.chunks.last_mut() {
            chunk.told = u16::try_from(pages).unwrap_or(u16::MAX);
        }
    }

    /// Pages told in the round.
    pub(super) fn told(&self) -> u64 {
        told(&self.chunks)
    }

    /// What is in place when the target has so many frames, and, added to `into`, what is not.
    pub(super) fn reclaim(
        &self,
        frames: u64,
        mut into: PageSet,
    ) -> Result<Reclaimed, ReclaimError> {
        // After the pages comes the end of the round.
        let sent = self.first + self.chunks.len() as u64 + 1;
        if frames > sent {
            let claimed = frames;
            return Err(FramesClaimed { claimed, sent }.into());
        }
        // Fewer than before the round are those of a lane whose first frames were ends of rounds that
        // were done without it.
        let placed = usize::try_from(frames.saturating_sub(self.first)).unwrap_or(usize::MAX);
        let (placed, missing) = self.chunks.split_at(placed.min(self.chunks.len()));
        let mut runs = Vec::new();
        for chunk in missing {
            let Some(order) = &self.order else { break };
            order.feed.take_at(chunk.place(), &mut runs);
            for &Run { region, range } in &runs {
                into.insert(region, range)?;
            }
        }
        Ok(Reclaimed {
            round: self
                .order
                .as_ref()
                .map_or_else(Default::default, |order| order.round),
            placed: told(placed),
            since_end: if frames == sent { 0 } else { told(placed) },
            found: into,
        })
    }
}

fn told(chunks: &[Chunk]) -> u64 {
    chunks.iter().map(|chunk| u64::from(chunk.told)).sum()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use ferry_stream::message::Round;

    use super::*;
    use crate::core::layout::{Layout, PageRange, Region, RegionIndex};
    use crate::core::message::{Deltas, Pace, Rewritten, ZeroPages};
    use crate::lanes::feed::Feed;
    use crate::lanes::send::CHUNK_PAGES;

    const PAGES: u64 = 1000;

    fn layout() -> Layout {
        let region = Region {
            name: "ram0".into(),
            bytes: PAGES * 4096,
            backing_page_bytes: 4096,
        };
        Layout::new(vec![region]).unwrap()
    }

    /// A log of all pages but `holes`, taken as a lane takes them, the first frame being number 5.
    fn log(holes: PageRange) -> (Log, PageSet) {
        let mut pages = PageSet::full(&layout());
        pages.remove(RegionIndex(0), holes).unwrap();
        let order = Arc::new(RoundOrder {
            round: Round(3),
            feed: Arc::new(Feed::of(Arc::new(pages.clone()), CHUNK_PAGES)),
            zeros: ZeroPages::Tell,
            rewritten: Rewritten::Send,
            deltas: Deltas::Off,
            pace: Pace::Limited,
        });
        let mut log = Log::default();
        log.begin(&order, 5);
        let mut runs = Vec::new();
        while let Some(at) = order.feed.take(&mut runs, &AtomicBool::new(false)) {
            log.take(at);
            log.tell(runs.iter().map(|run| run.range.count).sum());
        }
        (log, pages)
    }

    #[test]
    fn what_is_placed_and_what_is_found_are_all_pages() {
        let (log, pages) = log(PageRange::new(100, 57));
        let frames = log.chunks.len() as u64;
        for came in 0..=5 + frames {
            let blank = PageSet::empty(&layout());
            let reclaimed = log.reclaim(came, blank).unwrap();
            assert_eq!(reclaimed.placed + reclaimed.found.len(), pages.len());
            assert_eq!(reclaimed.since_end, reclaimed.placed);
            let placed = came.saturating_sub(5) * u64::from(CHUNK_PAGES);
            assert_eq!(reclaimed.placed, placed.min(pages.len()));
        }
        let ended = log.reclaim(6 + frames, PageSet::empty(&layout())).unwrap();
        assert_eq!((ended.placed, ended.since_end), (pages.len(), 0));
        assert!(ended.found.is_empty());
        assert!(log.reclaim(7 + frames, PageSet::empty(&layout())).is_err());
    }

    #[test]
    fn a_chunk_with_nothing_to_tell_is_no_frame() {
        let (mut log, _) = log(PageRange::new(0, 1));
        let frames = log.chunks.len();
        log.take(Place::default());
        log.tell(0);
        assert_eq!(log.chunks.len(), frames);
    }
}
