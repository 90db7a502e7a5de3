//! Where guest RAM is, in words that outlive an engine.

use std::sync::Arc;

use super::{FaultRange, RamFaults};
use crate::core::layout::{Layout, PAGE_SIZE, PageRange, Region, RegionIndex};
use crate::core::pageset::PageSet;
use crate::linux::{Access, Error, Process, RamFile, maps};
use crate::vmm::VmmError;

/// Where a region of guest RAM is: a VMM whose pages are missing may not be able to say so.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "host", derive(serde::Serialize, serde::Deserialize))]
pub struct RamPlace {
    /// The region's name.
    pub name: String,
    /// Its first address in the process.
    pub address: u64,
    /// Its length in bytes.
    pub bytes: u64,
    /// Of the file that holds it: major and minor number of its device, and its inode there.
    pub file: (u64, u64, u64),
}

impl RamPlace {
    /// Finds it again: the mapping must be of the same file still.
    fn find(&self, process: &Process, region: RegionIndex) -> Result<FaultRange, Error> {
        let addresses = self.address..self.address.saturating_add(self.bytes);
        let is_it = |mapping: &maps::Mapping| {
            let maps::Device { major, minor } = mapping.device;
            mapping.start <= addresses.start
                && addresses.end <= mapping.end
                && (major, minor, mapping.inode) == self.file
        };
        let mappings = maps::runs(maps::of_process(process)?);
        let mapping = mappings.into_iter().find(is_it);
        let mapping = mapping.ok_or(Error::Unwatched {
            start: addresses.start,
            end: addresses.end,
        })?;
        let first = mapping.offset + (addresses.start - mapping.start);
        Ok(FaultRange {
            region,
            name: self.name.clone(),
            file: RamFile::open(process, &mapping, Access::ReadWrite)?,
            bytes: first..first + self.bytes,
            addresses,
        })
    }
}

/// All guest RAM in these places, with its layout.
pub(super) fn find(
    process: &Process,
    places: &[RamPlace],
) -> Result<(Vec<FaultRange>, Layout), VmmError> {
    let region = |place: &RamPlace| Region {
        name: place.name.clone(),
        bytes: place.bytes,
        // No others are ever armed.
        backing_page_bytes: u32::try_from(PAGE_SIZE).unwrap_or(u32::MAX),
    };
    let layout = Layout::new(places.iter().map(region).collect())
        .map_err(|error| VmmError::failed("guest RAM as it was written down", error))?;
    let mut ranges = Vec::new();
    for (index, region) in layout.iter() {
        let place = places.iter().find(|place| place.name == region.name);
        let range = place.map(|place| place.find(process, index));
        ranges.extend(range.transpose()?);
    }
    Ok((ranges, layout))
}

impl RamFaults {
    /// [`RamFaults::adopt`], of guest RAM in these places; with its layout.
    pub fn adopt_at(
        process: Arc<Process>,
        places: &[RamPlace],
    ) -> Result<Option<(Self, Layout)>, VmmError> {
        let (ranges, layout) = find(&process, places)?;
        let adopted = Self::adopt(process, ranges)?;
        Ok(adopted.map(|faults| (faults, layout)))
    }

    /// The pages that have no memory.
    pub fn without_memory(&self, layout: &Layout) -> Result<PageSet, VmmError> {
        let failed = |error| VmmError::io("looking for holes in guest RAM", error);
        let mut missing = PageSet::full(layout);
        for range in self.ranges.iter() {
            let first = range.bytes.start;
            let found = range.file.data_extents(range.bytes.clone(), |extent| {
                let pages = PageRange::covering(extent.start - first..extent.end - first);
                let taken = missing.remove(range.region, pages);
                taken.map(drop).map_err(std::io::Error::other)
            });
            found.map_err(failed)?;
        }
        Ok(missing)
    }
}
