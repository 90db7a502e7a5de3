//! Telling pages by how they differ from what was sent of them before.
//!
//! Only where the link is what everybody waits for: the encoder says so. And where nothing comes of
//! it, since pages are rewritten as a whole, a lane tries fewer and fewer of them, down to one in
//! sixteen. Always the same ones, and not a chunk in so many: what is kept in one round shows its worth
//! only when the same page is tried in the next.

use std::sync::Arc;

use ferry_stream::message::Round;
use ferry_stream::pages::{DeltaBuffer, PageFrame};

use super::bases::{Bases, Page, PageId};
use super::send::Run;
use crate::core::layout::{PAGE_SIZE, PageNumber, PageRange};
use crate::core::message::Deltas;

/// How often the part of the pages that is tried is halved at most.
const MOST_HALVINGS: u32 = 4;

static ZEROS: Page = [0; PAGE_SIZE];

/// Whether fewer bytes would make pages arrive earlier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Thrift {
    /// The link is what everybody waits for.
    Pays,
    /// The cores are, or nobody knows yet.
    IsIdle,
}

/// What was told as deltas of a chunk.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Told {
    /// Pages.
    pub(crate) pages: u64,
    /// Bytes of their deltas.
    pub(crate) bytes: u64,
}

impl Told {
    /// Bytes that the pages are longer than their deltas.
    pub(crate) fn saved_bytes(self) -> u64 {
        (self.pages * PAGE_SIZE as u64).saturating_sub(self.bytes)
    }
}

/// One lane's deltas.
pub(super) struct Differ {
    bases: Arc<Bases>,
    round: Round,
    work: Work,
    /// What was sent of the page at hand, once it was found.
    base: Box<Page>,
    at_hand: Option<PageId>,
    scratch: Box<DeltaBuffer>,
    told: Told,
    /// Pages of the chunk that were told whole, though something was kept of them.
    vain: u64,
    /// How often the part of the pages that is tried was halved.
    halvings: u32,
}

/// What is done about the chunk at hand.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Work {
    /// Nothing: nothing is kept.
    Nothing,
    /// Its pages travel whole, so that what is kept of them is not what the target has.
    Drop,
    /// Deltas are tried, and pages kept.
    Try,
}

impl Differ {
    pub(super) fn new(bases: Arc<Bases>) -> Self {
        Self {
            bases,
            round: Round(0),
            work: Work::Nothing,
            base: Box::new(ZEROS),
            at_hand: None,
            scratch: Box::new(DeltaBuffer::new()),
            told: Told::default(),
            vain: 0,
            halvings: 0,
        }
    }

    /// A chunk of `round` begins. Asks what it pays only where something may come of it.
    pub(super) fn begin(&mut self, round: Round, deltas: Deltas, thrift: impl FnOnce() -> Thrift) {
        self.round = round;
        (self.told, self.vain) = (Told::default(), 0);
        self.work = if deltas == Deltas::Off || thrift() == Thrift::IsIdle {
            Work::Drop
        } else {
            Work::Try
        };
        if self.work == Work::Drop && self.bases.is_empty() {
            self.work = Work::Nothing;
        }
    }

    /// How many pages of `run`, from its first on, are told alike: one of which something is kept, or
    /// all up to such a one.
    pub(super) fn piece(&self, Run { region, range }: Run) -> PageRange {
        if self.work != Work::Try {
            return range;
        }
        let first = range.first.0;
        let pages = first..range.end().0;
        let known = |page: &u64| {
            let page = PageNumber(*page);
            let id = PageId { region, page };
            id.is_among(self.halvings) && self.bases.knows(id, self.round)
        };
        let plain = pages.take_while(|page| !known(page)).count() as u64;
        PageRange::new(first, plain.max(1))
    }

    /// The bytes of a piece, as they are being sent.
    pub(super) fn note(&mut self, Run { region, range }: Run, bytes: &[u8]) {
        self.at_hand = None;
        if self.work == Work::Nothing {
            return;
        }
        let pages = (range.first.0..).map(PageNumber);
        for (page, bytes) in pages.zip(bytes.as_chunks().0) {
            let id = PageId { region, page };
            let is_tried = self.work == Work::Try && id.is_among(self.halvings);
            if !is_tried || *bytes == ZEROS {
                self.bases.dismiss(id);
            } else if self.bases.exchange(id, self.round, bytes, &mut self.base) {
                self.at_hand = Some(id);
            }
        }
    }

    /// Tells the piece just noted, in the frame by now, as a delta if it can be.
    pub(super) fn tell(&mut self, frame: &mut PageFrame) {
        let Some(id) = self.at_hand.take() else {
            return;
        };
        let before = frame.data().len();
        if frame.tell_as_delta(&self.base, &mut self.scratch) {
            self.told.pages += 1;
            let shorter = before - frame.data().len();
            self.told.bytes += PAGE_SIZE.saturating_sub(shorter) as u64;
        } else {
            // Another page has more of its place.
            self.bases.dismiss(id);
            self.vain += 1;
        }
    }

    /// The chunk is over: what was told as deltas of it.
    pub(super) fn finish(&mut self) -> Told {
        if self.told.pages > 0 {
            self.halvings = 0;
        } else if self.vain > 0 {
            self.halvings = (self.halvings + 1).min(MOST_HALVINGS);
        }
        self.told
    }
}

#[cfg(test)]
mod tests {
    use ferry_stream::pages::{PageRun, Zeros};

    use super::*;
    use crate::core::layout::RegionIndex;

    const PAGES: u64 = 128;

    fn run() -> Run {
        Run {
            region: RegionIndex(0),
            range: PageRange::new(0, PAGES),
        }
    }

    /// Sends a chunk whose pages are made by `page`; what was told as deltas of it.
    fn send(
        differ: &mut Differ,
        round: u32,
        (deltas, thrift): (Deltas, Thrift),
        page: impl Fn(u64) -> Page,
    ) -> Told {
        let mut frame = PageFrame::new(128);
        frame.begin(Round(round));
        differ.begin(Round(round), deltas, || thrift);
        let Run { region, mut range } = run();
        while !range.is_empty() {
            let piece = differ.piece(Run { region, range });
            let pushed = PageRun {
                region: region.0,
                first: piece.first.0,
                count: u32::try_from(piece.count).unwrap(),
            };
            let bytes = frame.push_raw(pushed).unwrap();
            for (at, into) in (piece.first.0..).zip(bytes.as_chunks_mut::<PAGE_SIZE>().0) {
                *into = page(at);
            }
            let piece = Run {
                region,
                range: piece,
            };
            differ.note(piece, bytes);
            frame.elide_zeros(Zeros::Tell);
            differ.tell(&mut frame);
            range.first.0 += piece.range.count;
            range.count -= piece.range.count;
        }
        assert_eq!(frame.pages(), PAGES);
        differ.finish()
    }

    /// A page in which a word tells the write, and the rest the page.
    fn changed(write: u8) -> impl Fn(u64) -> Page {
        move |at| {
            let mut page = [u8::try_from(at + 1).unwrap(); PAGE_SIZE];
            page[80] = write;
            page
        }
    }

    fn rewritten(write: u8) -> impl Fn(u64) -> Page {
        move |_| [write; PAGE_SIZE]
    }

    const YES: (Deltas, Thrift) = (Deltas::On, Thrift::Pays);

    #[test]
    fn a_page_that_changes_a_little_is_told_so_from_the_second_time_on() {
        let mut differ = Differ::new(Arc::default());
        assert_eq!(send(&mut differ, 2, YES, changed(1)).pages, 0);
        for round in 3..6 {
            let told = send(
                &mut differ,
                round,
                YES,
                changed(u8::try_from(round).unwrap()),
            );
            assert_eq!(told.pages, PAGES);
            // Two checksums, two numbers, and a word.
            assert_eq!(told.bytes, PAGES * (8 + 2 + 8));
        }
        assert_eq!(send(&mut differ, 5, YES, changed(9)).pages, 0, "same round");
    }

    #[test]
    fn what_is_sent_whole_is_no_base_any_more() {
        for between in [(Deltas::On, Thrift::IsIdle), (Deltas::Off, Thrift::Pays)] {
            let mut differ = Differ::new(Arc::default());
            send(&mut differ, 2, YES, changed(1));
            assert_eq!(send(&mut differ, 3, between, changed(2)).pages, 0);
            assert!(differ.bases.is_empty());
            assert_eq!(send(&mut differ, 4, YES, changed(3)).pages, 0);
        }
        let mut differ = Differ::new(Arc::default());
        send(&mut differ, 2, YES, changed(1));
        send(&mut differ, 3, YES, |_| ZEROS);
        assert!(differ.bases.is_empty(), "a page of zeros needs no base");
    }

    #[test]
    fn where_it_does_not_pay_nothing_is_kept() {
        let mut differ = Differ::new(Arc::default());
        for round in 2..5 {
            send(&mut differ, round, (Deltas::On, Thrift::IsIdle), changed(1));
        }
        assert!(differ.bases.is_empty());
        let begin = |differ: &mut Differ| {
            differ.begin(Round(5), Deltas::Off, || unreachable!("nobody asks"));
        };
        begin(&mut differ);
        assert!(differ.work == Work::Nothing);
    }

    #[test]
    fn finding_nothing_it_tries_fewer_and_fewer() {
        let mut differ = Differ::new(Arc::default());
        let mut kept = Vec::new();
        for round in 2..40 {
            let write = u8::try_from(round).unwrap();
            send(&mut differ, round, YES, rewritten(write));
            kept.push(differ.bases.len());
        }
        let pages = usize::try_from(PAGES).unwrap();
        assert_eq!(kept[0], pages);
        // What was in vain gives its place away, and is kept again the next time.
        let of_late = kept.iter().rev().take(2).max();
        assert!((1..=pages / 8).contains(of_late.unwrap()), "{kept:?}");
        let mut told = Vec::new();
        for round in 40..45 {
            let write = u8::try_from(round).unwrap();
            told.push(send(&mut differ, round, YES, changed(write)).pages);
        }
        assert_eq!(told.last(), Some(&PAGES), "it finds out: {told:?}");
    }

    #[test]
    fn deltas_stand_in_the_frame_between_other_pages() {
        let mut differ = Differ::new(Arc::default());
        let odd = |write| {
            move |at| {
                if at % 2 == 1 {
                    changed(write)(at)
                } else {
                    ZEROS
                }
            }
        };
        send(&mut differ, 2, YES, odd(1));
        assert_eq!(send(&mut differ, 3, YES, odd(2)).pages, PAGES / 2);
        assert_eq!(send(&mut differ, 4, YES, changed(3)).pages, PAGES / 2);
        assert_eq!(send(&mut differ, 5, YES, changed(4)).pages, PAGES);
    }
}
