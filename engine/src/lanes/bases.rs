//! What was sent of pages that are rewritten, for telling them by how they differ next time.
//!
//! A bounded number of pages, in sets of a few, so that a look and a replacement cost a few
//! comparisons. A page gets a place that is free, or that of one which was not sent for two rounds:
//! where the guest rewrites more than fits, what is kept stays and pays in every round, and does not
//! give way to pages that will have given way themselves when their turn comes again.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use ferry_stream::limits::MAX_BASES;
use ferry_stream::message::Round;

use crate::core::layout::{PAGE_SIZE, PageNumber, RegionIndex};

/// The bytes of a page.
pub(super) type Page = [u8; PAGE_SIZE];

/// Places in a set.
const WAYS: usize = 8;

/// Sets under one lock: lanes seldom meet at one.
const SHARD_SETS: usize = 32;

/// Places under one lock.
const SHARD_PLACES: usize = SHARD_SETS * WAYS;

/// Locks.
const SHARDS: usize = MAX_BASES as usize / SHARD_PLACES;

/// Places in all: 16 MiB of pages.
const PLACES: usize = SHARDS * SHARD_PLACES;

const _: () = assert!(PLACES == MAX_BASES as usize);

/// Rounds in which a page was not sent, before its place is another's.
const IDLE_ROUNDS: u32 = 2;

/// A page of guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PageId {
    pub(super) region: RegionIndex,
    pub(super) page: PageNumber,
}

impl PageId {
    /// Neighbours, and pages at any usual distance, are spread evenly by it.
    fn spread(self) -> u64 {
        let id = self.page.0 ^ u64::from(self.region.0) << 48;
        id.wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }

    /// Its set, of all.
    fn set(self) -> usize {
        let set = (self.spread() >> 32) % (SHARDS * SHARD_SETS) as u64;
        usize::try_from(set).expect("it is below a number that came from a usize")
    }

    /// Whether it is among one in `2^halvings` pages, always the same.
    pub(super) fn is_among(self, halvings: u32) -> bool {
        (self.spread() >> 48).trailing_zeros() >= halvings
    }
}

/// Kept pages, shared by all lanes. None of it is allocated before the first is kept.
#[derive(Debug)]
pub(crate) struct Bases {
    shards: [Mutex<Shard>; SHARDS],
    /// How many pages are kept.
    kept: AtomicUsize,
}

#[derive(Debug, Default)]
struct Shard {
    /// Whose the places are, and when that page was sent.
    owners: Vec<Option<(PageId, Round)>>,
    bytes: Vec<u8>,
}

impl Default for Bases {
    fn default() -> Self {
        Self {
            shards: std::array::from_fn(|_| Mutex::default()),
            kept: AtomicUsize::new(0),
        }
    }
}

impl Bases {
    /// True when nothing is kept.
    pub(super) fn is_empty(&self) -> bool {
        self.kept.load(Ordering::Relaxed) == 0
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.kept.load(Ordering::Relaxed)
    }

    /// Forgets everything. Between rounds: no lane is at work on one then.
    pub(crate) fn forget(&self) {
        if self.is_empty() {
            return;
        }
        for shard in &self.shards {
            // The memory stays: to give it back takes longer than to forget what is in it, and a guest
            // may stand.
            lock(shard).owners.fill(None);
        }
        self.kept.store(0, Ordering::Relaxed);
    }

    /// Whether something is kept of the page that was sent before `round`.
    pub(super) fn knows(&self, id: PageId, round: Round) -> bool {
        let (shard, set) = self.place(id);
        shard.find(set, id).is_some_and(|(_, sent)| sent < round)
    }

    /// Keeps `page`, which is sent in `round`, in place of what was sent of it before, which comes
    /// into `base`. False when there is no such thing; the page is kept then if there is room.
    pub(super) fn exchange(&self, id: PageId, round: Round, page: &Page, base: &mut Page) -> bool {
        let (mut shard, set) = self.place(id);
        match shard.find(set, id) {
            Some((at, sent)) if sent < round => {
                base.copy_from_slice(shard.page(at));
                shard.fill(at, id, round, page);
                return true;
            }
            Some((at, _)) => {
                shard.fill(at, id, round, page);
            }
            None => {
                if let Some(at) = shard.room(set, round) {
                    let before = shard.fill(at, id, round, page);
                    self.kept
                        .fetch_add(usize::from(before.is_none()), Ordering::Relaxed);
                }
            }
        }
        false
    }

    /// Keeps nothing of a page any more.
    pub(super) fn dismiss(&self, id: PageId) {
        let (mut shard, set) = self.place(id);
        if let Some((at, _)) = shard.find(set, id) {
            shard.owners[at] = None;
            self.kept.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// The shard of a page, and the first place of its set there.
    fn place(&self, id: PageId) -> (MutexGuard<'_, Shard>, usize) {
        let set = id.set();
        let shard = lock(&self.shards[set / SHARD_SETS]);
        (shard, set % SHARD_SETS * WAYS)
    }
}

impl Shard {
    /// The place of a page in its set, and when it was sent.
    fn find(&self, set: usize, id: PageId) -> Option<(usize, Round)> {
        let owners = self.owners.get(set..set + WAYS)?;
        let found = owners.iter().zip(set..);
        found
            .filter_map(|(owner, at)| owner.map(|(owner, sent)| (owner, at, sent)))
            .find(|(owner, ..)| *owner == id)
            .map(|(_, at, sent)| (at, sent))
    }

    /// A place in the set for a page that is sent in `round`: a free one, or the one that was idle for
    /// longest.
    fn room(&mut self, set: usize, round: Round) -> Option<usize> {
        self.owners.resize(SHARD_PLACES, None);
        self.bytes.resize(SHARD_PLACES * PAGE_SIZE, 0);
        let sent = |at: &usize| self.owners[*at].map_or(0, |(_, sent)| sent.0);
        let oldest = (set..set + WAYS).min_by_key(sent)?;
        (sent(&oldest) + IDLE_ROUNDS <= round.0).then_some(oldest)
    }

    fn page(&self, at: usize) -> &[u8] {
        &self.bytes[at * PAGE_SIZE..][..PAGE_SIZE]
    }

    /// Gives a place to a page; tells whose it was.
    fn fill(
        &mut self,
        at: usize,
        id: PageId,
        round: Round,
        page: &Page,
    ) -> Option<(PageId, Round)> {
        self.bytes[at * PAGE_SIZE..][..PAGE_SIZE].copy_from_slice(page);
        self.owners[at].replace((id, round))
    }
}

fn lock(shard: &Mutex<Shard>) -> MutexGuard<'_, Shard> {
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn id(page: u64) -> PageId {
        PageId {
            region: RegionIndex(u16::try_from(page % 3).unwrap()),
            page: PageNumber(page / 3),
        }
    }

    fn page(fill: u32) -> Page {
        let mut page = [0; PAGE_SIZE];
        for word in page.chunks_exact_mut(4) {
            word.copy_from_slice(&fill.to_le_bytes());
        }
        page
    }

    /// Pages that all fall into one set, and that a few more than it holds.
    fn rivals(count: usize) -> Vec<PageId> {
        let set = id(0).set();
        (0..)
            .map(id)
            .filter(|id| id.set() == set)
            .take(count)
            .collect()
    }

    #[derive(Clone, Debug)]
    enum Step {
        Send(usize),
        Drop(usize),
        NextRound,
        Forget,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            12 => (0..3 * WAYS).prop_map(Step::Send),
            2 => (0..3 * WAYS).prop_map(Step::Drop),
            3 => Just(Step::NextRound),
            1 => Just(Step::Forget),
        ]
    }

    proptest! {
        /// Against a table of everything that was sent: a base is what was sent of the page last, in
        /// an earlier round, and of no page that was dropped since; and the cache is not idle.
        #[test]
        fn a_base_is_what_was_sent_last(steps in vec(step(), 1..300)) {
            let (bases, rivals) = (Bases::default(), rivals(3 * WAYS));
            let mut last = BTreeMap::<usize, (u32, Round)>::new();
            let mut seen = BTreeSet::new();
            let (mut round, mut writes) = (Round(2), 0);
            for step in steps {
                match step {
                    Step::Send(at) => {
                        writes += 1;
                        let (knows, mut base) = (bases.knows(rivals[at], round), page(0));
                        let had = bases.exchange(rivals[at], round, &page(writes), &mut base);
                        prop_assert_eq!(had, knows);
                        if had {
                            let (write, sent) = last[&at];
                            prop_assert!(sent < round);
                            prop_assert_eq!(&base[..], &page(write)[..]);
                        } else if last.get(&at).is_some_and(|(_, sent)| *sent < round) {
                            // Only a full set keeps nothing of what was sent.
                            prop_assert!(seen.len() > WAYS, "{last:?}");
                        }
                        last.insert(at, (writes, round));
                        seen.insert(at);
                    }
                    Step::Drop(at) => {
                        bases.dismiss(rivals[at]);
                        prop_assert!(!bases.knows(rivals[at], Round(round.0 + 1)));
                        last.remove(&at);
                    }
                    Step::NextRound => round.0 += 1,
                    Step::Forget => {
                        bases.forget();
                        prop_assert!(bases.is_empty());
                        last.clear();
                        seen.clear();
                    }
                }
                let kept = rivals.iter().filter(|id| bases.knows(**id, Round(u32::MAX))).count();
                prop_assert_eq!(kept, bases.kept.load(Ordering::Relaxed));
                prop_assert!(kept <= WAYS);
            }
        }
    }

    #[test]
    fn what_is_kept_stays_while_it_is_sent_and_gives_way_when_it_is_not() {
        let (bases, rivals) = (Bases::default(), rivals(2 * WAYS));
        let mut base = page(0);
        let mut send = |at: usize, round| {
            let round = Round(round);
            bases.exchange(rivals[at], round, &page(7), &mut base)
        };
        for round in 2..6 {
            let known = (0..2 * WAYS).filter(|at| send(*at, round)).count();
            assert_eq!(known, if round == 2 { 0 } else { WAYS }, "round {round}");
        }
        for at in WAYS..2 * WAYS {
            assert!(!send(at, 6), "no room yet");
        }
        for round in 7..9 {
            let known = (WAYS..2 * WAYS).filter(|at| send(*at, round)).count();
            assert_eq!(known, if round == 7 { 0 } else { WAYS }, "round {round}");
        }
    }

    #[test]
    fn neighbours_fill_it_nearly_evenly() {
        for stride in [1, 2, 64, 512, 4096] {
            let bases = Bases::default();
            let ids = (0..u64::from(MAX_BASES) / 2).map(|at| PageId {
                region: RegionIndex(1),
                page: PageNumber(at * stride),
            });
            for id in ids {
                bases.exchange(id, Round(2), &page(1), &mut page(0));
            }
            let kept = bases.kept.load(Ordering::Relaxed);
            assert!(kept * 10 > PLACES / 2 * 8, "{kept} at a stride of {stride}");
        }
    }
}
