//! The pages of a round, which may become known while it is under way.
//!
//! A scan hands on part after part of guest RAM as it gets through with them, and the lanes send what
//! is there already. What was handed on never changes, so a chunk that was taken once is found again
//! by its place. A lane that finds nothing waits; only when the scan has ended may it say that the
//! round has. One that is cut waits for nothing any more, so a scan that fails, or never ends, holds
//! up nobody.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::send::{CHUNK_PAGES, CHUNK_RUNS, Run};
use crate::core::message::HandedOn;
use crate::core::pageset::{Cursor, OutsideRam, PageSet, Piece};

/// The pages of one round.
pub(crate) struct Feed {
    /// Most pages in a chunk.
    chunk_pages: u32,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    segments: Vec<Segment>,
    /// Pages of all segments.
    pages: u64,
    /// What nobody has taken begins here.
    next: Place,
    /// No segment follows.
    closed: bool,
    /// Nothing is taken any more.
    cut_short: bool,
    hunger: Hunger,
}

/// Pages that became known together.
enum Segment {
    Set(Arc<PageSet>),
    Piece(Piece),
}

/// A place in a feed: a chunk begins there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) segment: u32,
    pub(super) cursor: Cursor,
}

impl Segment {
    fn len(&self) -> u64 {
        match self {
            Self::Set(pages) => pages.len(),
            Self::Piece(piece) => piece.len(),
        }
    }

    fn next_run(&self, cursor: &mut Cursor, most: u64) -> Option<Run> {
        let (region, range) = match self {
            Self::Set(pages) => pages.next_run(cursor, most)?,
            Self::Piece(piece) => {
                let (region, range) = piece.next_run(cursor.page(), most)?;
                cursor.pass(range);
                (region, range)
            }
        };
        Some(Run { region, range })
    }

    /// Replaces `runs` by the chunk that begins at `cursor`, and moves it past that.
    fn chunk(&self, cursor: &mut Cursor, chunk_pages: u32, runs: &mut Vec<Run>) {
        runs.clear();
        let mut room = u64::from(chunk_pages);
        while room > 0 && runs.len() < CHUNK_RUNS {
            let Some(run) = self.next_run(cursor, room) else {
                break;
            };
            room -= run.range.count;
            runs.push(run);
        }
    }
}

impl Feed {
    /// A feed to which a scan hands on, and from which lanes take so many pages at a time, at most
    /// [`CHUNK_PAGES`].
    pub(crate) fn open(chunk_pages: u32) -> Self {
        Self {
            chunk_pages: chunk_pages.clamp(1, CHUNK_PAGES),
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// A feed of pages that are known.
    pub(crate) fn of(pages: Arc<PageSet>, chunk_pages: u32) -> Self {
        let feed = Self::open(chunk_pages);
        feed.append(Segment::Set(pages));
        feed.close();
        feed
    }

    /// Hands on what was found of one part of guest RAM.
    pub(crate) fn hand_on(&self, piece: Piece) {
        self.append(Segment::Piece(piece));
    }

    /// Hands on what belongs to no part.
    pub(crate) fn hand_on_set(&self, pages: PageSet) {
        self.append(Segment::Set(Arc::new(pages)));
    }

    fn append(&self, segment: Segment) {
        if segment.len() == 0 {
            return;
        }
        let mut state = self.lock();
        state.pages += segment.len();
        state.segments.push(segment);
        drop(state);
        self.changed.notify_all();
    }

    /// The scan has ended, and with it what the lanes waited for.
    pub(crate) fn close(&self) -> HandedOn {
        let mut state = self.lock();
        state.closed = true;
        state.hunger.pass(Instant::now());
        let handed_on = HandedOn {
            pages: state.pages,
            starved: state.hunger.of_each(),
        };
        drop(state);
        self.changed.notify_all();
        handed_on
    }

    /// Lets no lane take any more: the round ends with what was taken, once the scan has ended.
    pub(crate) fn cut_short(&self) {
        self.lock().cut_short = true;
        self.changed.notify_all();
    }

    /// Adds what nobody has taken, and never will: the feed was cut short, and its round is over.
    pub(crate) fn take_left(&self, into: &mut PageSet) -> Result<(), OutsideRam> {
        let mut state = self.lock();
        let mut runs = Vec::new();
        while state.next_chunk(self.chunk_pages, &mut runs).is_some() {
            for run in &runs {
                into.insert(run.region, run.range)?;
            }
        }
        Ok(())
    }

    /// Lets whoever has been cut notice it.
    pub(super) fn wake(&self) {
        // Who has looked and does not wait yet holds the lock.
        drop(self.lock());
        self.changed.notify_all();
    }

    /// A lane begins to take.
    pub(super) fn join(&self) {
        self.lock().hunger.lanes += 1;
    }

    /// Replaces `runs` by the next chunk, and tells where it begins; none at the end of the round, or
    /// when the lane is `cut`. Waits for what is not known yet.
    pub(super) fn take(&self, runs: &mut Vec<Run>, cut: &AtomicBool) -> Option<Place> {
        let mut state = self.lock();
        loop {
            if !state.cut_short
                && let Some(at) = state.next_chunk(self.chunk_pages, runs)
            {
                return Some(at);
            }
            if state.closed || cut.load(Ordering::Acquire) {
                return None;
            }
            state.hunger.begin(Instant::now());
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
            state.hunger.end(Instant::now());
        }
    }

    /// Replaces `runs` by the chunk that begins at `place`: the same one every time.
    pub(super) fn take_at(&self, place: Place, runs: &mut Vec<Run>) {
        runs.clear();
        let mut cursor = place.cursor;
        if let Some(segment) = self.lock().segments.get(place.segment as usize) {
            segment.chunk(&mut cursor, self.chunk_pages, runs);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn next_chunk(&mut self, chunk_pages: u32, runs: &mut Vec<Run>) -> Option<Place> {
        while let Some(segment) = self.segments.get(self.next.segment as usize) {
            let at = self.next;
            segment.chunk(&mut self.next.cursor, chunk_pages, runs);
            if !runs.is_empty() {
                return Some(at);
            }
            self.next = Place {
                segment: at.segment + 1,
                cursor: Cursor::default(),
            };
        }
        None
    }
}

/// How long lanes have waited for a scan.
#[derive(Default)]
struct Hunger {
    /// Lanes that take part.
    lanes: u32,
    /// Those that wait, since when.
    waiting: u32,
    since: Option<Instant>,
    /// Of all lanes together.
    sum: Duration,
}

impl Hunger {
    fn begin(&mut self, now: Instant) {
        self.pass(now);
        self.waiting += 1;
    }

    fn end(&mut self, now: Instant) {
        self.pass(now);
        self.waiting -= 1;
    }

    fn pass(&mut self, now: Instant) {
        if let Some(since) = self.since.replace(now) {
            self.sum += now.saturating_duration_since(since) * self.waiting;
        }
    }

    /// What it comes to for each lane: as if all had waited together.
    fn of_each(&self) -> Duration {
        self.sum / self.lanes.max(1)
    }
}

#[cfg(test)]
mod tests;
