//! The pages that a guest runs without, as [`Faults`].
//!
//! A userfaultfd is made inside the process and registered on guest RAM for missing pages: whoever
//! touches a page of which the file holds nothing waits, in the kernel, until it is placed. The
//! descriptor stays open inside the process until the last page is there. When the last one of a
//! userfaultfd is closed, the kernel lets everyone go on with zeros; so, with that one open, our death
//! blocks a guest and never gives it a wrong page. Whoever comes after us takes the descriptor again:
//! [`RamFaults::adopt`].
//!
//! ```text
//!   prepare ─► arm: register, then discard what is to be missing ─► serve (Pager) ─► disarm
//!                                                                    │        ▲
//!                                                                 we die ─► adopt
//! ```
//!
//! In this order. What is discarded before it is registered would read as zeros for a moment, and be
//! there from then on: by an access of the VMM, or by the kernel's own when it makes a huge page out of
//! small ones and of holes, which it leaves alone where missing pages are registered. Registered first, a
//! page holds what it held, and then nothing.
//!
//! A page is there when the file has memory for it, however that came: also by a write or an allocation
//! of ours through a mapping. Nobody may do either from `arm` on.

mod discard;
mod pager;
mod place;
mod ranges;

use std::sync::Arc;

use super::preflight::{self, Finding};
use super::remote_uffd::{self, RemoteUffd};
use super::uffd::Features;
use super::uffd::missing::ForeignUffd;
use super::{Error, Process};
use crate::core::pageset::PageSet;
use crate::vmm::{Faults, Pager, VmmError};
use pager::Served;
pub use place::RamPlace;
pub use ranges::FaultRange;
use ranges::Ranges;

/// The missing pages of one process's guest RAM. Dropping it ends it, unless it was armed: see
/// [`Faults`].
#[derive(Debug)]
pub struct RamFaults {
    process: Arc<Process>,
    ranges: Arc<Ranges>,
    state: State,
    /// What was discarded ahead, and is watched since.
    discarded: Option<PageSet>,
}

#[derive(Debug)]
enum State {
    Idle,
    Prepared(Held),
    /// Its descriptor was left to the process.
    Armed(Held),
}

/// A userfaultfd: the process's own descriptor, and ours.
#[derive(Debug)]
struct Held {
    remote: RemoteUffd,
    served: Arc<Served>,
}

impl RamFaults {
    /// For this guest RAM of the process, all of it. Does not touch it before it is prepared.
    pub fn new(process: Arc<Process>, parts: Vec<FaultRange>) -> Self {
        Self {
            process,
            ranges: Arc::new(Ranges::new(parts)),
            state: State::Idle,
            discarded: None,
        }
    }

    /// Goes on where an engine that has died stopped: takes the descriptor that it left in the process,
    /// and has every fault told again that it had read. None when it has left none.
    ///
    /// The caller knows that it had armed it, and that it is dead: of two that are alive each would be
    /// told some of the faults alone.
    pub fn adopt(process: Arc<Process>, parts: Vec<FaultRange>) -> Result<Option<Self>, VmmError> {
        let mut faults = Self::new(process, parts);
        let left = remote_uffd::find(&faults.process, Features::SERVE_FAULTS)?;
        let fd = match left[..] {
            [] => return Ok(None),
            [fd] => fd,
            [..] => return Err(faults.left_by_others(left.len())),
        };
        faults.ranges.check()?;
        let remote = RemoteUffd::left(Arc::clone(&faults.process), fd);
        let uffd = ForeignUffd::take(&faults.process, fd)?;
        let served = faults.serve(uffd)?;
        // Again, for the proof that all of it is watched, by this very userfaultfd.
        served.register()?;
        served.wake()?;
        faults.state = State::Armed(Held { remote, served });
        Ok(Some(faults))
    }

    /// What serves the faults; none unless they are armed.
    pub fn pager(&self) -> Option<Arc<dyn Pager>> {
        match &self.state {
            State::Armed(held) => Some(Arc::clone(&held.served) as Arc<dyn Pager>),
            State::Idle | State::Prepared(_) => None,
        }
    }

    /// Everything that stands in the way of post-copy here. Changes nothing.
    ///
    /// # Errors
    /// Only when the process cannot be looked at.
    pub fn problems(&self) -> Result<Vec<Finding>, Error> {
        preflight::check_post_copy(&self.process, self.ranges.files())
    }

    fn check(&self) -> Result<(), VmmError> {
        let problems = self.problems()?;
        if !problems.is_empty() {
            let texts: Vec<_> = problems.iter().map(ToString::to_string).collect();
            return Err(VmmError::Unfit {
                what: texts.join("; "),
            });
        }
        self.ranges.check()?;
        self.ranges.check_mapped(&self.process)?;
        // It is never closed: should a guest run there, it would be given zeros.
        match remote_uffd::find(&self.process, Features::SERVE_FAULTS)?.len() {
            0 => Ok(()),
            count => Err(self.left_by_others(count)),
        }
    }

    fn left_by_others(&self, count: usize) -> VmmError {
        VmmError::Unfit {
            what: format!(
                "process {} has {count} userfaultfd of an engine that serves, or served, the faults of \
                 its guest: let that migration end, or start a new target",
                self.process.pid()
            ),
        }
    }

    fn serve(&self, uffd: ForeignUffd) -> Result<Arc<Served>, Error> {
        let (process, ranges) = (Arc::clone(&self.process), Arc::clone(&self.ranges));
        Ok(Arc::new(Served::new(process, ranges, uffd)?))
    }

    /// Nothing of ours is in the process any more.
    fn check_clean(&self) -> Result<(), VmmError> {
        match remote_uffd::find(&self.process, Features::SERVE_FAULTS) {
            Ok(left) if left.is_empty() => Ok(()),
            Ok(left) => Err(self.left_by_others(left.len())),
            Err(Error::Gone { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

impl Faults for RamFaults {
    fn prepare(&mut self) -> Result<(), VmmError> {
        if !matches!(self.state, State::Idle) {
            return Ok(());
        }
        self.check()?;
        // Closed in the process on every error below.
        let remote = RemoteUffd::new(Arc::clone(&self.process))?;
        let uffd = ForeignUffd::take(&self.process, remote.fd())?;
        uffd.api(Features::SERVE_FAULTS)?;
        let served = self.serve(uffd)?;
        self.state = State::Prepared(Held { remote, served });
        Ok(())
    }

    fn discard(&mut self, pages: &PageSet) -> Result<(), VmmError> {
        let State::Prepared(held) = &self.state else {
            return Err(VmmError::Unfit {
                what: "pages are discarded ahead before they are armed, when that was prepared"
                    .into(),
            });
        };
        held.served.arm(pages, pages)?;
        match &mut self.discarded {
            Some(discarded) => discarded.union(pages),
            discarded @ None => *discarded = Some(pages.clone()),
        }
        Ok(())
    }

    fn arm(&mut self, missing: &PageSet) -> Result<Arc<dyn Pager>, VmmError> {
        let mut rest = missing.clone();
        for (region, range) in self.discarded.iter().flat_map(PageSet::ranges) {
            let gone = rest.remove(region, range);
            gone.map_err(|error| VmmError::failed("pages that were discarded ahead", error))?;
        }
        match std::mem::replace(&mut self.state, State::Idle) {
            State::Prepared(mut held) => {
                if let Err(error) = held.served.arm(missing, &rest) {
                    self.state = State::Prepared(held);
                    return Err(error);
                }
                held.remote.leave();
                let pager = Arc::clone(&held.served) as Arc<dyn Pager>;
                self.state = State::Armed(held);
                Ok(pager)
            }
            other => {
                self.state = other;
                Err(VmmError::Unfit {
                    what: "missing pages are armed once, when that was prepared".into(),
                })
            }
        }
    }

    fn disarm(&mut self) -> Result<(), VmmError> {
        match &mut self.state {
            State::Idle => return Ok(()),
            State::Prepared(held) => held.remote.close()?,
            State::Armed(held) => {
                held.served.unregister()?;
                held.remote.close()?;
            }
        }
        self.check_clean()?;
        self.state = State::Idle;
        Ok(())
    }
}
