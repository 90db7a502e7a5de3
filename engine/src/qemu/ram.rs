//! Finding guest RAM: which back ends it is made of, and where each lies in QEMU.
//!
//! A region is a memory back end that the guest can reach, under the back end's id: a machine's RAM,
//! one back end for each NUMA node, a DIMM. See [`flatview`](super::flatview) for how its address is
//! found. The address leads to a mapping, the mapping to device and inode, and these to one of
//! QEMU's own descriptors: no name is ever trusted.
//!
//! Only `memory-backend-file` with `share=on` will do. From QEMU 10.0 on `x-ignore-shared` leaves out
//! shared memory of that kind alone; anything else QEMU would carry itself, in the blackout.

use std::ops::Range;
use std::sync::Arc;

use ferry_qmp::commands::{Memdev, QomList, QomProperty, QueryMemdev};

use super::checks::{Problem, ProblemCode};
use super::flatview::{self, Placed};
use super::monitor::Monitor;
use crate::core::layout::{Layout, Region};
use crate::linux::maps::{self, Mapping};
use crate::linux::{
    Access, FaultRange, Process, RamFaults, RamFile, RamPart, RamPlace, RamTracker, SharedRam,
    TrackedRange,
};
use crate::vmm::{Ram, VmmError};

/// The one type of back end that can be migrated.
const FILE_BACKEND: &str = "memory-backend-file";

/// How guest RAM has to be given to QEMU.
const REMEDY: &str = "start QEMU with -object memory-backend-file,id=ID,size=SIZE,\
                      mem-path=/dev/shm/NAME,share=on and -machine memory-backend=ID \
                      (or -numa node,memdev=ID, or -device pc-dimm,memdev=ID)";

/// All guest RAM of a QEMU, and what is wrong with it.
#[derive(Debug, Default)]
pub(super) struct Survey {
    regions: Vec<Found>,
    /// Back ends that nothing uses.
    pub(super) spares: Vec<String>,
    /// Empty when all of it can be migrated.
    pub(super) problems: Vec<Problem>,
}

/// A region of guest RAM in QEMU.
#[derive(Debug)]
struct Found {
    region: Region,
    /// Where QEMU has it.
    addresses: Range<u64>,
    mapping: Mapping,
}

impl Found {
    /// Which bytes of the file it is.
    fn file_bytes(&self) -> Range<u64> {
        let start = self.mapping.offset + (self.addresses.start - self.mapping.start);
        start..start + self.region.bytes
    }

    fn shares_bytes_with(&self, other: &Self) -> bool {
        let (ours, theirs) = (self.file_bytes(), other.file_bytes());
        let file = |found: &Self| (found.mapping.device, found.mapping.inode);
        file(self) == file(other) && ours.start < theirs.end && theirs.start < ours.end
    }
}

/// Looks at a QEMU. Fails only when it cannot be looked at; what cannot be migrated is told in
/// [`Survey::problems`].
pub(super) async fn survey(monitor: &Monitor, process: &Process) -> Result<Survey, VmmError> {
    let (memdevs, objects, view, blocks) = tokio::try_join!(
        monitor.ask(QueryMemdev),
        monitor.ask(QomList::new("/objects")),
        monitor.human("info mtree -f"),
        monitor.human("info ramblock"),
    )?;
    let placed = flatview::first_pieces(&view);
    let blocks = flatview::block_names(&blocks);
    let mappings = maps::runs(maps::of_process(process)?);
    let mut survey = Survey::default();
    for memdev in &memdevs {
        let Some(id) = memdev.id.as_deref() else {
            let what = format!("a memory back end of {} bytes has no id", memdev.size);
            survey.problems.push(unusable(what));
            continue;
        };
        let is_it = |name: &str| flatview::backend_id(name) == id;
        if let Some(piece) = placed.iter().find(|piece| is_it(&piece.name)) {
            let backend = Backend {
                id,
                kind: kind_of(id, &objects),
                memdev,
                address: address_of(monitor, piece).await?,
            };
            match backend.find(process, &mappings) {
                Ok(found) => survey.regions.push(found),
                Err(problem) => survey.problems.push(problem),
            }
        } else if blocks.iter().any(|name| is_it(name)) {
            let what = format!("memory back end {id} is used, but not as plain RAM of the guest");
            survey.problems.push(unusable(what));
        } else {
            survey.spares.push(id.to_owned());
        }
    }
    survey.check_whole();
    Ok(survey)
}

fn kind_of<'a>(id: &str, objects: &'a [QomProperty]) -> &'a str {
    let object = objects.iter().find(|object| object.name == id);
    object
        .and_then(QomProperty::child_type)
        .unwrap_or("back end of unknown type")
}

impl Survey {
    /// The layout, if all RAM can be migrated.
    pub(super) fn layout(&self) -> Option<Layout> {
        let regions = self
            .regions
            .iter()
            .map(|found| found.region.clone())
            .collect();
        Layout::new(regions)
            .ok()
            .filter(|_| self.problems.is_empty())
    }

    /// Opens the files and makes ready to track the memory.
    pub(super) fn open(
        &self,
        process: &Arc<Process>,
        access: Access,
    ) -> Result<(SharedRam, RamTracker), VmmError> {
        let mut parts = Vec::new();
        for found in &self.regions {
            parts.push(RamPart {
                name: found.region.name.clone(),
                file: RamFile::open(process, &found.mapping, access)?,
                bytes: found.file_bytes(),
            });
        }
        let ram = SharedRam::new(parts, access)
            .map_err(|error| VmmError::failed("guest RAM cannot be opened", error))?;
        let tracked = ram
            .layout()
            .iter()
            .filter_map(|(index, region)| {
                let found = self
                    .regions
                    .iter()
                    .find(|found| found.region.name == region.name)?;
                Some(TrackedRange {
                    region: index,
                    addresses: found.addresses.clone(),
                })
            })
            .collect();
        let tracker = RamTracker::new(Arc::clone(process), tracked);
        Ok((ram, tracker))
    }

    /// Where it is, for an engine that comes after this one.
    pub(super) fn places(&self) -> Vec<RamPlace> {
        let place = |found: &Found| RamPlace {
            name: found.region.name.clone(),
            address: found.addresses.start,
            bytes: found.region.bytes,
            file: (
                found.mapping.device.major,
                found.mapping.device.minor,
                found.mapping.inode,
            ),
        };
        self.regions.iter().map(place).collect()
    }

    /// Makes ready to have the memory waited for, at a target.
    pub(super) fn faults(
        &self,
        process: &Arc<Process>,
        layout: &Layout,
    ) -> Result<RamFaults, VmmError> {
        let mut ranges = Vec::new();
        for (region, named) in layout.iter() {
            let found = self.regions.iter().find(|it| it.region.name == named.name);
            let Some(found) = found else { continue };
            ranges.push(FaultRange {
                region,
                name: named.name.clone(),
                addresses: found.addresses.clone(),
                file: RamFile::open(process, &found.mapping, Access::ReadWrite)?,
                bytes: found.file_bytes(),
            });
        }
        Ok(RamFaults::new(Arc::clone(process), ranges))
    }

    /// Whose RAM a target's is besides: it is about to be cleared.
    pub(super) fn shared_with_others(&self, process: &Process) -> Vec<Problem> {
        let shared = self.regions.iter().filter_map(|found| {
            let Mapping { device, inode, .. } = found.mapping;
            let others = maps::writers_of(device, inode, process.pid());
            let others: Vec<_> = others.iter().map(ToString::to_string).collect();
            (!others.is_empty()).then(|| Problem {
                code: ProblemCode::Ram,
                found: format!(
                    "the file of guest RAM {} is written by process {} as well: the target's is cleared \
                     before a guest comes, and would clear that",
                    found.region.name,
                    others.join(", ")
                ),
                remedy: "start the target's QEMU with a mem-path of its own".to_owned(),
            })
        });
        shared.collect()
    }

    /// What only all regions together show.
    fn check_whole(&mut self) {
        for (index, found) in self.regions.iter().enumerate() {
            for other in &self.regions[..index] {
                if found.shares_bytes_with(other) {
                    self.problems.push(unusable(format!(
                        "memory back ends {} and {} share a part of one file",
                        other.region.name, found.region.name
                    )));
                }
            }
        }
        let regions = self
            .regions
            .iter()
            .map(|found| found.region.clone())
            .collect();
        if self.problems.is_empty()
            && let Err(error) = Layout::new(regions)
        {
            self.problems.push(unusable(error.to_string()));
        }
    }
}

async fn address_of(monitor: &Monitor, piece: &Placed) -> Result<u64, VmmError> {
    let line = format!("gpa2hva {:#x}", piece.guest_address);
    let text = monitor.human(&line).await?;
    let first = flatview::host_address(&text)
        .filter(|(name, _)| *name == piece.name)
        .and_then(|(_, address)| address.checked_sub(piece.offset));
    match first {
        Some(address) => Ok(address),
        None => Err(VmmError::Unfit {
            what: format!(
                "QEMU does not tell where {} lies: it answered {text:?} to {line}; try again if a \
                 device was being plugged",
                piece.name
            ),
        }),
    }
}

/// A back end that is guest RAM.
struct Backend<'a> {
    id: &'a str,
    kind: &'a str,
    memdev: &'a Memdev,
    /// Where QEMU has its first byte.
    address: u64,
}

impl Backend<'_> {
    /// Its region, or what is wrong with it.
    fn find(&self, process: &Process, mappings: &[Mapping]) -> Result<Found, Problem> {
        let Self { id, kind, .. } = self;
        if *kind != FILE_BACKEND {
            return Err(unusable(format!(
                "guest RAM {id} is a {kind}, not a shared named file"
            )));
        }
        if !self.memdev.share {
            return Err(unusable(format!(
                "guest RAM {id} is a {kind} without share=on"
            )));
        }
        let addresses = self.address..self.address.saturating_add(self.memdev.size);
        let mapping = mappings
            .iter()
            .find(|mapping| mapping.start <= addresses.start && addresses.end <= mapping.end)
            .filter(|mapping| mapping.is_shared_named_file() && mapping.permissions.write)
            .ok_or_else(|| {
                let what = "not one writable, shared mapping of a named file";
                unusable(format!("guest RAM {id} is {what}"))
            })?;
        let file = RamFile::open(process, mapping, Access::Read)
            .map_err(|error| unusable(format!("guest RAM {id} cannot be opened: {error}")))?;
        Ok(Found {
            region: Region {
                name: (*id).to_owned(),
                bytes: self.memdev.size,
                backing_page_bytes: file.backing_page_bytes(),
            },
            addresses,
            mapping: mapping.clone(),
        })
    }
}

fn unusable(found: String) -> Problem {
    Problem {
        code: ProblemCode::Ram,
        found,
        remedy: REMEDY.to_owned(),
    }
}
