//! Where guest RAM lies: in the process and in its files.

use std::ops::Range;

use crate::core::layout::{PAGE_SIZE, PageNumber, PageRange, RegionIndex};
use crate::linux::{Error, Process, RamFile, maps};
use crate::vmm::VmmError;

const PAGE_BYTES: u64 = PAGE_SIZE as u64;

/// A region of guest RAM that can miss pages.
#[derive(Debug)]
pub struct FaultRange {
    /// Which region.
    pub region: RegionIndex,
    /// Its name, for people.
    pub name: String,
    /// Its addresses in the process, whole pages.
    pub addresses: Range<u64>,
    /// The file that the process has mapped there, shared, open for writing.
    pub file: RamFile,
    /// Which bytes of the file: as many.
    pub bytes: Range<u64>,
}

impl FaultRange {
    /// Where pages of the region are in the process; none when it has not all of them.
    pub(super) fn addresses_of(&self, range: PageRange) -> Option<Range<u64>> {
        place(&self.addresses, range)
    }

    /// Where pages of the region are in the file; none when it has not all of them.
    pub(super) fn bytes_of(&self, range: PageRange) -> Option<Range<u64>> {
        place(&self.bytes, range)
    }

    fn is_sound(&self) -> bool {
        let whole_pages = |range: &Range<u64>| {
            range.start < range.end
                && range.start.is_multiple_of(PAGE_BYTES)
                && range.end.is_multiple_of(PAGE_BYTES)
        };
        whole_pages(&self.addresses)
            && whole_pages(&self.bytes)
            && self.addresses.end - self.addresses.start == self.bytes.end - self.bytes.start
            && self.bytes.end <= self.file.byte_len()
            && self.file.is_writable()
    }

    fn not_mapped_once(&self) -> Error {
        Error::NotMappedOnce {
            name: self.name.clone(),
            start: self.addresses.start,
            end: self.addresses.end,
        }
    }
}

fn place(whole: &Range<u64>, range: PageRange) -> Option<Range<u64>> {
    let pages = (whole.end - whole.start) / PAGE_BYTES;
    let end = range.first.0.checked_add(range.count)?;
    (end <= pages).then(|| whole.start + range.first.0 * PAGE_BYTES..whole.start + end * PAGE_BYTES)
}

/// All guest RAM.
#[derive(Debug)]
pub(super) struct Ranges {
    /// By region.
    parts: Vec<FaultRange>,
}

impl Ranges {
    pub(super) fn new(mut parts: Vec<FaultRange>) -> Self {
        parts.sort_by_key(|part| part.region);
        Self { parts }
    }

    pub(super) fn iter(&self) -> std::slice::Iter<'_, FaultRange> {
        self.parts.iter()
    }

    pub(super) fn files(&self) -> impl Iterator<Item = (&str, &RamFile)> {
        self.parts.iter().map(|part| (&*part.name, &part.file))
    }

    pub(super) fn of(&self, region: RegionIndex) -> Result<&FaultRange, VmmError> {
        let index = self.parts.binary_search_by_key(&region, |part| part.region);
        index
            .map(|index| &self.parts[index])
            .map_err(|_| VmmError::Unfit {
                what: format!("{region} is no part of guest RAM that can miss pages"),
            })
    }

    /// Which page is at an address; none outside of guest RAM.
    pub(super) fn page_at(&self, address: u64) -> Option<(RegionIndex, PageNumber)> {
        let part = self
            .parts
            .iter()
            .find(|part| part.addresses.contains(&address))?;
        let page = (address - part.addresses.start) / PAGE_BYTES;
        Some((part.region, PageNumber(page)))
    }

    /// The ranges make sense, whatever the process has mapped.
    pub(super) fn check(&self) -> Result<(), VmmError> {
        let twice = self
            .parts
            .windows(2)
            .find(|pair| pair[0].region == pair[1].region)
            .map(|pair| &pair[0]);
        match self.parts.iter().find(|part| !part.is_sound()).or(twice) {
            None => Ok(()),
            Some(FaultRange { name, .. }) => Err(VmmError::Unfit {
                what: format!(
                    "guest RAM {name:?} is given twice, or not as whole pages of a file that can be \
                     written and as many addresses"
                ),
            }),
        }
    }

    /// The process has every file mapped at the addresses given, and nowhere else. Addresses of which
    /// something else is, or nothing, could be registered all the same.
    pub(super) fn check_mapped(&self, process: &Process) -> Result<(), Error> {
        let mappings = maps::runs(maps::of_process(process)?);
        for part in &self.parts {
            let mut is_whole = false;
            let identity = part.file.identity()?;
            for mapping in &mappings {
                if (mapping.device, mapping.inode) != identity {
                    continue;
                }
                let end = mapping.offset + mapping.byte_len();
                if mapping.offset >= part.bytes.end || end <= part.bytes.start {
                    continue;
                }
                // The same distance from the addresses to the bytes, or the bytes are here and there.
                let distance = mapping.start.wrapping_sub(mapping.offset);
                let expected = part.addresses.start.wrapping_sub(part.bytes.start);
                if distance != expected || !mapping.permissions.shared {
                    return Err(part.not_mapped_once());
                }
                is_whole |=
                    mapping.start <= part.addresses.start && part.addresses.end <= mapping.end;
            }
            if !is_whole {
                return Err(part.not_mapped_once());
            }
        }
        Ok(())
    }
}
