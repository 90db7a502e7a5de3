//! What the VM's threads are ordered: each order is one call of the embedder's, and one fact.

use crate::core::message::{Failure, Input, Step};
use crate::device_state::Sink;
use crate::job::Retire;
use crate::vmm::{PauseFor, RunState, VmmError};
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

    pub(super) fn throttle(&self, percent: u8) {
        self.vm.order(Step::Throttle, move |vm| {
            vm.guest
                .throttle(percent)
                .map(|()| Input::Throttled(percent))
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
