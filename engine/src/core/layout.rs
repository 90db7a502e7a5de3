//! Guest RAM as the engine sees it: regions of pages, named as the VMM names them.
//!
//! A page number means nothing without its region, and an address means nothing in another process.
//! So nothing in the engine carries a bare integer: what travels is a [`RegionIndex`] and a
//! [`PageRange`], and only the adapters turn them into offsets and addresses.

use std::fmt;
use std::ops::Range;

/// Bytes in the unit of tracking and transfer.
///
/// Every RAM backing that the engine supports has pages of this size or a multiple of it; a backing
/// with larger pages is tracked in its own unit and reported in this one.
pub const PAGE_SIZE: usize = 4096;

/// Base-2 logarithm of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = PAGE_SIZE.trailing_zeros();

/// Most regions a layout may have: QEMU has 256 memory slots for DIMMs by default, plus NUMA nodes.
pub const MAX_REGIONS: usize = 512;

/// Longest name of a region, in bytes.
pub const MAX_REGION_NAME: usize = 255;

/// Largest region in bytes (16 TiB): bounds the page sets that a peer can make us allocate.
pub const MAX_REGION_BYTES: u64 = 1 << 44;

/// Which region of a [`Layout`], by position.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RegionIndex(pub u16);

impl fmt::Display for RegionIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "region {}", self.0)
    }
}

/// A page of a region, counted from the region's start in units of [`PAGE_SIZE`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageNumber(pub u64);

impl PageNumber {
    /// Offset of the page's first byte from the region's start.
    pub fn byte_offset(self) -> u64 {
        self.0 << PAGE_SHIFT
    }
}

/// A run of pages within one region. May be empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageRange {
    /// The first page.
    pub first: PageNumber,
    /// How many pages.
    pub count: u64,
}

impl PageRange {
    /// The run of `count` pages that starts at page `first`.
    pub fn new(first: u64, count: u64) -> Self {
        Self {
            first: PageNumber(first),
            count,
        }
    }

    /// The page after the last one. A range that no RAM can have ends at the last number there is.
    pub fn end(self) -> PageNumber {
        PageNumber(self.first.0.saturating_add(self.count))
    }

    /// Offsets of the run's bytes from the region's start.
    pub fn bytes(self) -> Range<u64> {
        self.first.byte_offset()..self.end().byte_offset()
    }

    /// Length in bytes.
    pub fn byte_len(self) -> u64 {
        self.count << PAGE_SHIFT
    }

    /// True when there is no page in it.
    pub fn is_empty(self) -> bool {
        self.count == 0
    }

    /// The smallest run of whole pages that covers the bytes `bytes` of a region.
    pub fn covering(bytes: Range<u64>) -> Self {
        let first = bytes.start >> PAGE_SHIFT;
        let end = bytes.end.div_ceil(PAGE_SIZE as u64);
        Self::new(first, end.saturating_sub(first))
    }
}

impl fmt::Display for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pages {}..{}", self.first.0, self.end().0)
    }
}

/// One region: a contiguous piece of guest RAM with a name that both sides know.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Region {
    /// The VMM's name for it, equal at source and target; for QEMU the id of the memory back end.
    pub name: String,
    /// Size in bytes, a multiple of [`PAGE_SIZE`].
    pub bytes: u64,
    /// Bytes in a page of the memory behind it: [`PAGE_SIZE`], or 2 MiB on hugetlb. Source and
    /// target may differ in it.
    pub backing_page_bytes: u32,
}

impl Region {
    /// Size in pages.
    pub fn pages(&self) -> u64 {
        self.bytes >> PAGE_SHIFT
    }

    /// The run of all its pages.
    pub fn all(&self) -> PageRange {
        PageRange::new(0, self.pages())
    }
}

/// Why a list of regions is not a layout.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// There is no region.
    #[error("the guest has no RAM region")]
    Empty,
    /// More regions than [`MAX_REGIONS`].
    #[error("{count} RAM regions, at most {MAX_REGIONS} are supported")]
    TooManyRegions {
        /// How many there are.
        count: usize,
    },
    /// A size that is zero, no multiple of a page, or above [`MAX_REGION_BYTES`].
    #[error("RAM region {name:?} has an impossible size of {bytes} bytes")]
    BadSize {
        /// The region.
        name: String,
        /// Its size in bytes.
        bytes: u64,
    },
    /// A backing page size that is no power of two or smaller than [`PAGE_SIZE`].
    #[error("RAM region {name:?} has an impossible page size of {bytes} bytes")]
    BadBackingPage {
        /// The region.
        name: String,
        /// The page size in bytes.
        bytes: u32,
    },
    /// An empty name, or one longer than [`MAX_REGION_NAME`].
    #[error("a RAM region has a name of {bytes} bytes, 1 to {MAX_REGION_NAME} are allowed")]
    BadName {
        /// Length of the name in bytes.
        bytes: usize,
    },
    /// Two regions of one name.
    #[error("two RAM regions are named {name:?}")]
    DuplicateName {
        /// The name.
        name: String,
    },
}

/// How two layouts differ.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutDifference {
    /// A region of the source that the target lacks.
    #[error("RAM region {name:?} ({bytes} bytes) exists at the source alone")]
    MissingAtTarget {
        /// The region.
        name: String,
        /// Its size in bytes.
        bytes: u64,
    },
    /// A region of the target that the source lacks.
    #[error("RAM region {name:?} ({bytes} bytes) exists at the target alone")]
    MissingAtSource {
        /// The region.
        name: String,
        /// Its size in bytes.
        bytes: u64,
    },
    /// A region whose sizes differ.
    #[error(
        "RAM region {name:?} has {source_bytes} bytes at the source and {target_bytes} at the target"
    )]
    Size {
        /// The region.
        name: String,
        /// Size at the source, in bytes.
        source_bytes: u64,
        /// Size at the target, in bytes.
        target_bytes: u64,
    },
}

/// All guest RAM: a checked, ordered list of regions.
///
/// Made by parsing: whoever holds one knows that names are unique, sizes are whole pages and nothing
/// exceeds the named limits. Regions are ordered by name, so that two sides that name the same
/// regions give them the same [`RegionIndex`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Layout {
    regions: Box<[Region]>,
}

impl Layout {
    /// Checks the regions and orders them by name.
    pub fn new(mut regions: Vec<Region>) -> Result<Self, LayoutError> {
        if regions.is_empty() {
            return Err(LayoutError::Empty);
        }
        if regions.len() > MAX_REGIONS {
            return Err(LayoutError::TooManyRegions {
                count: regions.len(),
            });
        }
        regions.iter().try_for_each(check_region)?;
        regions.sort_by(|a, b| a.name.cmp(&b.name));
        if let Some(pair) = regions.windows(2).find(|pair| pair[0].name == pair[1].name) {
            return Err(LayoutError::DuplicateName {
                name: pair[0].name.clone(),
            });
        }
        Ok(Self {
            regions: regions.into(),
        })
    }

    /// The regions in order, each with its index.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (RegionIndex, &Region)> {
        self.regions.iter().enumerate().map(|(index, region)| {
            let index = u16::try_from(index).expect("a layout has at most MAX_REGIONS regions");
            (RegionIndex(index), region)
        })
    }

    /// The region at `index`, if there is one.
    pub fn region(&self, index: RegionIndex) -> Option<&Region> {
        self.regions.get(usize::from(index.0))
    }

    /// How many regions.
    pub fn len(&self) -> usize {
        self.regions.len()
    }

    /// Never true: a layout has at least one region.
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    /// Size of all regions together, in pages.
    pub fn pages(&self) -> u64 {
        self.regions.iter().map(Region::pages).sum()
    }

    /// Size of all regions together, in bytes.
    pub fn bytes(&self) -> u64 {
        self.regions.iter().map(|region| region.bytes).sum()
    }

    /// True when `range` lies within the region at `index`.
    pub fn contains(&self, index: RegionIndex, range: PageRange) -> bool {
        let end = range.first.0.checked_add(range.count);
        self.region(index)
            .zip(end)
            .is_some_and(|(region, end)| end <= region.pages())
    }

    /// Every way in which `target` differs from this layout of the source. Backing page sizes may
    /// differ; names and sizes may not.
    pub fn differences(&self, target: &Self) -> Vec<LayoutDifference> {
        let here = self
            .regions
            .iter()
            .filter_map(|source| match target.named(&source.name) {
                None => Some(LayoutDifference::MissingAtTarget {
                    name: source.name.clone(),
                    bytes: source.bytes,
                }),
                Some(other) if other.bytes != source.bytes => Some(LayoutDifference::Size {
                    name: source.name.clone(),
                    source_bytes: source.bytes,
                    target_bytes: other.bytes,
                }),
                Some(_) => None,
            });
        let there = target
            .regions
            .iter()
            .filter(|region| self.named(&region.name).is_none())
            .map(|region| LayoutDifference::MissingAtSource {
                name: region.name.clone(),
                bytes: region.bytes,
            });
        here.chain(there).collect()
    }

    fn named(&self, name: &str) -> Option<&Region> {
        self.regions.iter().find(|region| region.name == name)
    }
}

fn check_region(region: &Region) -> Result<(), LayoutError> {
    if region.name.is_empty() || region.name.len() > MAX_REGION_NAME {
        return Err(LayoutError::BadName {
            bytes: region.name.len(),
        });
    }
    let whole_pages = region.bytes.is_multiple_of(PAGE_SIZE as u64);
    if region.bytes == 0 || !whole_pages || region.bytes > MAX_REGION_BYTES {
        return Err(LayoutError::BadSize {
            name: region.name.clone(),
            bytes: region.bytes,
        });
    }
    let backing = region.backing_page_bytes;
    if !backing.is_power_of_two() || (backing as usize) < PAGE_SIZE {
        return Err(LayoutError::BadBackingPage {
            name: region.name.clone(),
            bytes: backing,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(name: &str, bytes: u64) -> Region {
        Region {
            name: name.into(),
            bytes,
            backing_page_bytes: 4096,
        }
    }

    #[test]
    fn orders_regions_by_name() {
        let layout = Layout::new(vec![region("ram1", 8192), region("ram0", 4096)]).unwrap();
        let names: Vec<_> = layout
            .iter()
            .map(|(index, region)| (index.0, &*region.name))
            .collect();
        assert_eq!(names, [(0, "ram0"), (1, "ram1")]);
        assert_eq!(layout.pages(), 3);
    }

    #[test]
    fn refuses_what_is_no_layout() {
        assert_eq!(Layout::new(vec![]), Err(LayoutError::Empty));
        let twice = Layout::new(vec![region("a", 4096), region("a", 4096)]);
        assert_eq!(twice, Err(LayoutError::DuplicateName { name: "a".into() }));
        for bytes in [0, 4095, MAX_REGION_BYTES + 4096] {
            let sized = Layout::new(vec![region("a", bytes)]);
            assert_eq!(
                sized,
                Err(LayoutError::BadSize {
                    name: "a".into(),
                    bytes
                })
            );
        }
        let named = Layout::new(vec![region("", 4096)]);
        assert_eq!(named, Err(LayoutError::BadName { bytes: 0 }));
    }

    #[test]
    fn tells_every_difference() {
        let source = Layout::new(vec![region("a", 4096), region("b", 4096)]).unwrap();
        let target = Layout::new(vec![region("b", 8192), region("c", 4096)]).unwrap();
        assert_eq!(
            source.differences(&target),
            [
                LayoutDifference::MissingAtTarget {
                    name: "a".into(),
                    bytes: 4096
                },
                LayoutDifference::Size {
                    name: "b".into(),
                    source_bytes: 4096,
                    target_bytes: 8192
                },
                LayoutDifference::MissingAtSource {
                    name: "c".into(),
                    bytes: 4096
                },
            ]
        );
        assert_eq!(source.differences(&source), []);
    }

    #[test]
    fn bounds_ranges_without_overflow() {
        let layout = Layout::new(vec![region("a", 8192)]).unwrap();
        assert!(layout.contains(RegionIndex(0), PageRange::new(0, 2)));
        assert!(!layout.contains(RegionIndex(0), PageRange::new(1, 2)));
        assert!(!layout.contains(RegionIndex(0), PageRange::new(u64::MAX, 2)));
        assert!(!layout.contains(RegionIndex(1), PageRange::new(0, 1)));
    }
}
