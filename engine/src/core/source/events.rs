//! What happens without the engine's doing, and what people order while it works.

use ferry_stream::message::Mode;

use super::{Shared, State};
use crate::core::message::{Action, Command, Notice, Reason};
use crate::vmm::{GuestEvent, PauseFor, RunState};

impl Shared {
    pub(super) fn guest_event(&mut self, state: State, event: GuestEvent) -> State {
        let reason = match event {
            // What was saved is not the guest any more.
            GuestEvent::Reset if state.is_switching() => {
                return state.trouble(self, Reason::GuestReset);
            }
            GuestEvent::Reset => {
                self.tell(Notice::GuestReset);
                return state;
            }
            GuestEvent::ForeignPause => return self.foreign_pause(state),
            GuestEvent::ForeignResume => return self.foreign_resume(state),
            GuestEvent::ShutDown => Reason::GuestShutDown,
            GuestEvent::Panicked => Reason::GuestPanicked,
            GuestEvent::IoErrorPause { device } => Reason::GuestIoError { device },
            GuestEvent::Gone { what } => Reason::GuestGone { what },
        };
        self.wanted = RunState::Paused;
        state.trouble(self, reason)
    }

    fn foreign_pause(&mut self, state: State) -> State {
        self.wanted = RunState::Paused;
        self.tell(Notice::GuestStateChanged(RunState::Paused));
        state
    }

    /// Somebody lets the guest run. While RAM is copied that is their right, and the move goes on
    /// live; while it is handed over it spoils what was saved; afterwards it is a second owner.
    fn foreign_resume(&mut self, state: State) -> State {
        if matches!(
            state,
            State::Given(_) | State::Asking(_) | State::Serving | State::Leaving(_)
        ) {
            self.tell(Notice::ResumedAfterGiven);
            self.actions.push_back(Action::Pause(PauseFor::Copy));
            return state;
        }
        self.wanted = RunState::Running;
        if state.is_switching() {
            return state.trouble(self, Reason::ForeignResume);
        }
        if self.held.take().is_some() && self.asked == Mode::Live {
            self.actions.push_back(Action::Pace);
        }
        self.hold_ordered = false;
        self.meter.went_on();
        self.tell(Notice::GuestStateChanged(RunState::Running));
        match state {
            State::Holding(holding) => holding.go_live(self),
            state => state,
        }
    }

    pub(super) fn command(&mut self, state: State, command: Command) -> State {
        match command {
            Command::Cancel
                if matches!(state, State::Given(_) | State::Asking(_) | State::Serving) =>
            {
                self.tell(Notice::TooLateToCancel);
                state
            }
            Command::Cancel if matches!(state, State::Leaving(_) | State::Undoing(_)) => state,
            Command::Cancel => state.trouble(self, Reason::Cancelled),
            Command::SetDowntimeLimit(limit) => {
                self.config.downtime_limit = limit;
                // What was said of the old one does not hold for it.
                self.floor_told = false;
                state
            }
            Command::Suspend => {
                self.suspend(&state);
                state
            }
            Command::Postcopy => {
                self.order_postcopy(&state);
                state
            }
        }
    }

    /// Pauses the guest now, so that what is left is copied without it running. Before the first
    /// round that is what a move without `--live` does.
    pub(super) fn suspend(&mut self, state: &State) {
        if state.is_copying() && !self.hold_ordered {
            self.tell(Notice::TimeoutSuspends);
            self.order_hold();
        } else if matches!(state, State::Greeting | State::Preparing(_)) {
            self.config.mode = Mode::Paused;
        }
    }

    pub(super) fn order_hold(&mut self) {
        self.hold_ordered = true;
        self.pause(PauseFor::Copy);
    }
}
