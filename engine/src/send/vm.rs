//! What the VM's threads are ordered: each order is one call of the embedder's, and one fact.

use std::sync::Arc;

use crate::core::layout::Layout;
use crate::core::message::{Failure, Input, Step};
use crate::core::pageset::PageSet;
use crate::device_state::Sink;
use crate::job::Retire;
use crate::vmm::{PauseFor, Ram, Rearm, RunState, VmmError};
use crate::worker::guarded;

use super::{Driver, VmSide};

impl Driver {
    pub(super) fn pause(&self, why: PauseFor) {
        if why == PauseFor::Switchover {
            self.outfit.encoder.hurry();
        }
        let clock = self.clock;
        self.vm.order(Step::Pause, move |vm| {
            vm.guest.pause(why).map(|stopped| Input::Paused {
                at: clock.moment(stopped.at),
                drained: clock.moment(stopped.drained_at),
            })
        });
    }

    pub(super) fn inventory(&self) {
        self.vm.order(Step::Inventory, |vm| {
            vm.guest
                .inventory()
                .map(|now| Input::Inventoried(Box::new(now)))
        });
    }

    pub(super) fn undo(&self, guest: RunState) {
        self.sink.close();
        self.vm.order(Step::Undo, move |vm| {
            Ok::<_, VmmError>(Input::Undone(undo(vm, guest)))
        });
    }

    pub(super) fn start_tracking(&self, into: PageSet) {
        let fresh = Arc::clone(&self.outfit.fresh);
        self.tracker.order(Step::StartTracking, move |side| {
            side.tracker.start()?;
            // Tracking begins once: nobody has set it before.
            drop(fresh.set(side.tracker.fresh()?));
            populated(&*side.ram, into)
        });
    }

    pub(super) fn collect(&self, rearm: Rearm, mut into: PageSet) {
        self.tracker.order(Step::Collect, move |side| {
            let mut outside = None;
            side.tracker.collect(rearm, &mut |region, range| {
                outside = into.insert(region, range).err().or(outside);
            })?;
            match outside {
                Some(outside) => Err(VmmError::failed("a tracker reported", outside)),
                None => Ok(Input::Collected { found: into }),
            }
        });
    }

    pub(super) fn open_state(&mut self) {
        let (sink, watch) = Sink::new(self.control.outgoing());
        self.sink = watch;
        self.vm.order(Step::OpenState, move |vm| {
            vm.state.open(Box::new(sink)).map(|()| Input::StateOpen)
        });
    }

    pub(super) fn save(&self) {
        let sink = self.sink.clone();
        self.vm.order(Step::Save, move |vm| {
            vm.state.save()?;
            let tally = sink.tally();
            Ok::<_, VmmError>(Input::Saved {
                bytes: tally.bytes,
                crc: tally.crc(),
            })
        });
    }

    pub(super) fn order_retire(&self) {
        let retire = self.retire;
        self.vm.order(Step::Retire, move |vm| {
            match retire {
                Retire::Quit => vm.guest.quit()?,
                Retire::LeaveStopped => vm.guest.restore()?,
            }
            Ok::<_, VmmError>(Input::Retired)
        });
    }
}

/// Every page that may hold anything but zeros.
fn populated(ram: &dyn Ram, mut into: PageSet) -> Result<Input, VmmError> {
    let layout: &Layout = ram.layout();
    for (region, _) in layout.iter() {
        let mut outside = None;
        ram.populated(region, &mut |range| {
            outside = into.insert(region, range).err().or(outside);
        })?;
        if let Some(outside) = outside {
            return Err(VmmError::failed("guest RAM reported", outside));
        }
    }
    Ok(Input::Tracking { populated: into })
}

/// Puts the VM back. Every step is tried, whatever became of the one before; the first failure is
/// told.
fn undo(vm: &mut VmSide, wanted: RunState) -> Result<RunState, Failure> {
    let abandoned = guarded(Step::Undo, || vm.state.abandon());
    let resumed = guarded(Step::Undo, || {
        let state = vm.guest.run_state()?;
        if wanted == RunState::Running && state == RunState::Paused {
            vm.guest.resume()?;
        }
        vm.guest.run_state()
    });
    let restored = guarded(Step::Undo, || vm.guest.restore());
    abandoned.and(restored).and(resumed)
}
