//! What goes wrong, and what happens to guests without the engine's doing.

use std::time::Duration;

use ferry_engine::core::message::{Input, Inquirer, Reason};
use ferry_engine::vmm::GuestEvent;
use ferry_stream::message::{
    AbortCode, DataRun, Features, LaneId, LaneIndex, Message, Round, Verdict, Versions, Welcome,
};

use super::event::Event;
use super::guest::{Content, Power, RunBy};
use super::plan::{Fate, Mischief, Side};
use super::worker::Thread;
use super::world::World;

/// Questions of strangers are told from the source's own by their number.
const STRANGER: u64 = 1 << 32;

/// Pages that a reset writes.
const RESET_WRITES: u64 = 4;

impl World {
    pub(super) fn mischief(&mut self, mischief: Mischief) {
        self.note(|| format!("!! {mischief:?}"));
        match mischief {
            Mischief::CutControl => self.cut_control(),
            Mischief::CutLanes => self.cut_lanes(),
            Mischief::CutAll => {
                self.cut_control();
                self.cut_lanes();
            }
            Mischief::KillLane => self.kill_lane(),
            Mischief::HangLane => self.hang_lane(),
            Mischief::CorruptLane => self.corrupt_lane(),
            Mischief::SpoilBases => self.bases.spoilt = true,
            Mischief::Order(side, command) => {
                self.report(side, Thread::Reader, Input::Command(command));
            }
            Mischief::Guest(Side::Source, fate) => self.source_fate(fate),
            Mischief::Guest(Side::Target, fate) => self.target_fate(fate),
            Mischief::Plug => self.plugged = true,
            Mischief::Stranger => {
                self.truth.silenced = true;
                let inquirer = Inquirer(STRANGER);
                self.report(Side::Target, Thread::Reader, Input::Inquired(inquirer));
            }
            Mischief::Abort(side) => {
                // A peer that aborts has nothing more to say, to questions neither.
                self.truth.silenced |= side == Side::Target;
                let abort = Message::Abort {
                    code: AbortCode::Internal,
                    text: Reason::Cancelled.to_string(),
                };
                self.schedule(self.now, Event::Arrives(side, abort));
            }
            Mischief::Nonsense(side) => {
                let message = self.nonsense(side);
                self.schedule(self.now, Event::Arrives(side, message));
            }
            Mischief::Freeze(side) => {
                self.truth.silenced |= side == Side::Target;
                let frozen = Duration::from_millis(1) + self.rng.micros(1..=400_000);
                self.end(side).frozen = frozen;
            }
        }
    }

    /// A message that must not come now, or not at all; never a lie about who owns the guest.
    fn nonsense(&mut self, side: Side) -> Message {
        let welcome = Welcome {
            version: Versions::OURS.highest,
            features: Features::NONE,
            lanes: 1,
        };
        let (round, pages) = (Round(99), 7);
        let complete = Message::Complete {
            round,
            pages,
            state_bytes: 8,
            state_crc: 0,
        };
        let lane = LaneId::first(LaneIndex(1));
        // Beyond every region, or not agreed on.
        let ahead = Message::Ahead {
            region: u16::try_from(self.rng.below(4)).unwrap_or(0),
            runs: vec![DataRun {
                first: self.rng.below(80),
                count: 1 << self.rng.below(50),
            }],
        };
        let mismatch = Message::Mismatch {
            lane,
            round,
            region: 0,
            page: 0,
        };
        let both = [
            Message::Welcome(welcome),
            Message::Inquire,
            Message::Ping,
            mismatch,
        ];
        let one = match side {
            Side::Source => [
                Message::Answer(Verdict::Taken),
                Message::RoundDone { round, pages },
                Message::Fenced {
                    lane,
                    frames: 1,
                    pages,
                },
            ],
            Side::Target if self.rng.percent(50) => [complete, ahead.clone(), ahead],
            Side::Target => [complete, Message::Ready { load_us: 0 }, Message::Paused],
        };
        self.rng.pick(&[&both[..], &one].concat())
    }

    fn source_fate(&mut self, fate: Fate) {
        if !self.at(Side::Source).vm.alive || self.at(Side::Source).vm.power == Power::Off {
            return;
        }
        let runs = self.at(Side::Source).vm.runs();
        let event = match fate {
            Fate::Reset => {
                self.reset_source();
                GuestEvent::Reset
            }
            Fate::Resume if !runs => {
                self.let_run(Side::Source, RunBy::Stranger);
                GuestEvent::ForeignResume
            }
            Fate::Gone => {
                self.end(Side::Source).vm.die();
                gone()
            }
            fate if runs => self.stops(Side::Source, fate),
            _ => return,
        };
        self.heard_of(Side::Source, event);
    }

    fn reset_source(&mut self) {
        self.end(Side::Source).vm.device = 0;
        for _ in 0..RESET_WRITES {
            self.writes += 1;
            let write = Content(self.writes);
            let mut rng = self.rng.clone();
            let place = self.end(Side::Source).vm.write(&mut rng, write);
            self.rng = rng;
            self.wrote(place);
        }
    }

    /// What stops a guest that runs.
    fn stops(&mut self, side: Side, fate: Fate) -> GuestEvent {
        let vm = &mut self.end(side).vm;
        match fate {
            Fate::ShutDown | Fate::Panic => vm.power = Power::Off,
            _ => vm.pause(),
        }
        match fate {
            Fate::ShutDown => GuestEvent::ShutDown,
            Fate::Panic => GuestEvent::Panicked,
            Fate::IoError => GuestEvent::IoErrorPause {
                device: "disk0".into(),
            },
            _ => GuestEvent::ForeignPause,
        }
    }

    fn target_fate(&mut self, fate: Fate) {
        let vm = &self.at(Side::Target).vm;
        if !vm.alive || vm.power == Power::Off {
            return;
        }
        let runs = vm.runs();
        let event = match fate {
            Fate::Gone => {
                self.end(Side::Target).vm.die();
                self.unpark();
                gone()
            }
            // What is still being loaded can be neither reset nor resumed.
            _ if !self.loaded => return,
            Fate::Reset => {
                self.end(Side::Target).vm.device = 0;
                GuestEvent::Reset
            }
            Fate::Resume if !runs => {
                self.let_run(Side::Target, RunBy::Stranger);
                GuestEvent::ForeignResume
            }
            fate if runs => self.stops(Side::Target, fate),
            _ => return,
        };
        self.truth.spoilt |= self.truth.go_heard;
        self.heard_of(Side::Target, event);
    }

    fn heard_of(&mut self, side: Side, event: GuestEvent) {
        self.unheard[side as usize] += 1;
        let late = self.truth.undoing || self.at(side).outcome.is_some();
        self.truth.late_fate |= side == Side::Source && late;
        self.report(side, Thread::Reader, Input::Guest(event));
    }
}

fn gone() -> GuestEvent {
    GuestEvent::Gone {
        what: "its process ended".into(),
    }
}
