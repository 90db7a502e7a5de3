//! What is true, whoever owns the guest: the generation of every page, kept outside both VMMs.
//!
//! A page that a migration lost is stale and yet consistent in itself. Only a table that did not
//! travel with the RAM can tell.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use ferry_engine::core::layout::{Layout, PAGE_SIZE, Region};

/// The RAM region of a toy guest.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Its name.
    pub name: &'static str,
    /// Its pages.
    pub pages: u64,
    /// So many of its first pages hold something when the guest boots; the others are zero.
    pub filled: u64,
    /// So many of its first pages are rewritten all the time.
    pub busy: u64,
}

/// How much of a page the guest changes when it writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// All of it.
    Page,
    /// One word.
    Word,
}

/// One guest, seen from outside.
#[derive(Debug)]
pub struct World {
    shapes: Vec<Shape>,
    change: Change,
    generations: Vec<Vec<AtomicU64>>,
    writes: AtomicU64,
    bad_pages: AtomicU64,
    owners: AtomicUsize,
    ran_twice: AtomicBool,
}

/// The content of one page.
pub(super) type Page = [u8; PAGE_SIZE];

impl World {
    /// A guest with this RAM. Shapes are in the order of their names.
    pub fn new(mut shapes: Vec<Shape>, change: Change) -> Self {
        shapes.sort_by_key(|shape| shape.name);
        let generations = shapes
            .iter()
            .map(|shape| {
                (0..shape.pages).map(|page| AtomicU64::new(u64::from(page < shape.filled)))
            })
            .map(Iterator::collect)
            .collect();
        Self {
            shapes,
            change,
            generations,
            writes: AtomicU64::new(0),
            bad_pages: AtomicU64::new(0),
            owners: AtomicUsize::new(0),
            ran_twice: AtomicBool::new(false),
        }
    }

    /// The regions.
    pub fn shapes(&self) -> &[Shape] {
        &self.shapes
    }

    /// Page writes of the guest since it booted.
    pub fn writes(&self) -> u64 {
        self.writes.load(Ordering::SeqCst)
    }

    /// Pages that the guest itself found to be other than it left them.
    pub fn bad_pages(&self) -> u64 {
        self.bad_pages.load(Ordering::SeqCst)
    }

    /// True when ever two VMMs ran the guest at one time.
    pub fn ran_twice(&self) -> bool {
        self.ran_twice.load(Ordering::SeqCst)
    }

    pub(super) fn layout(&self) -> Layout {
        let regions = self.shapes.iter().map(|shape| Region {
            name: shape.name.to_owned(),
            bytes: shape.pages * PAGE_SIZE as u64,
            backing_page_bytes: u32::try_from(PAGE_SIZE).expect("a page is 4096 bytes"),
        });
        Layout::new(regions.collect()).expect("tests name and size their regions properly")
    }

    pub(super) fn enter(&self) {
        if self.owners.fetch_add(1, Ordering::SeqCst) > 0 {
            self.ran_twice.store(true, Ordering::SeqCst);
        }
    }

    pub(super) fn leave(&self) {
        self.owners.fetch_sub(1, Ordering::SeqCst);
    }

    pub(super) fn generation(&self, region: u16, page: u64) -> u64 {
        self.cell(region, page).load(Ordering::SeqCst)
    }

    /// Fills `into` with what the page holds in `generation`.
    pub(super) fn fill(&self, region: u16, page: u64, generation: u64, into: &mut Page) {
        match self.change {
            Change::Word if generation > 1 => {
                fill(region, page, 1, into);
                let (words, _) = into.as_chunks_mut();
                let at = usize::try_from(page).unwrap_or(0) % words.len();
                words[at] = generation.to_le_bytes();
            }
            Change::Page | Change::Word => fill(region, page, generation, into),
        }
    }

    /// The guest has written the page's next generation.
    pub(super) fn wrote(&self, region: u16, page: u64, generation: u64) {
        self.cell(region, page).store(generation, Ordering::SeqCst);
        self.writes.fetch_add(1, Ordering::SeqCst);
    }

    pub(super) fn found_bad(&self) {
        self.bad_pages.fetch_add(1, Ordering::SeqCst);
    }

    #[allow(clippy::cast_possible_truncation)] // a toy's RAM fits in this host's
    fn cell(&self, region: u16, page: u64) -> &AtomicU64 {
        &self.generations[usize::from(region)][page as usize]
    }
}

/// Every so many generations a page is cleared, each in its own turn: zero pages must travel as well.
const ZERO_EVERY: u64 = 16;

/// Fills `into` with what the page holds in `generation`: every word depends on all three.
fn fill(region: u16, page: u64, generation: u64, into: &mut Page) {
    let cleared = (generation + page).is_multiple_of(ZERO_EVERY) && generation > 1;
    if generation == 0 || cleared {
        into.fill(0);
        return;
    }
    let mut state = mix(u64::from(region) << 48 ^ page << 16 ^ generation.rotate_right(16));
    for word in into.chunks_exact_mut(8) {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        word.copy_from_slice(&state.to_le_bytes());
    }
}

fn mix(value: u64) -> u64 {
    let value = (value ^ value >> 31).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (value ^ value >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9) | 1
}
