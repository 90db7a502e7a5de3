//! The page lanes as the target sees them: which take part in the open round, and which are fenced.
//!
//! A lane takes part from the moment its hello is answered. The open round is done when every lane
//! that takes part has ended it, those that were fenced excepted. A lane that lags behind the others
//! and brings nothing at all is dead without having died: a connection in a black hole tells nobody.

use std::time::Duration;

use ferry_stream::message::{LaneId, LaneIndex, Round};

use crate::core::message::{LaneSeen, Moment, Phase, Reason};

/// Looks at a lagging lane within the time after which it counts as dead.
const LOOKS: u32 = 4;

/// Every lane of a migration, and the count of pages.
#[derive(Default)]
pub(super) struct Lanes {
    slots: Vec<Slot>,
    /// The round that is over.
    done: Round,
    /// Pages of the next round, on lanes that have ended it or are fenced.
    pages: u64,
    /// Pages of all rounds that are over.
    total: u64,
    /// When lanes that lag are looked at.
    look_at: Option<Moment>,
}

struct Slot {
    /// The connection in this place, or the next that may come.
    lane: LaneId,
    state: Lane,
}

enum Lane {
    /// None is here.
    Absent,
    /// The last generation was fenced.
    Exhausted,
    Up(Up),
    /// Its worker is being ended.
    Ending,
}

#[derive(Clone, Copy, Default)]
struct Up {
    /// The last round that it has ended.
    ended: Round,
    /// Frames up to that end.
    frames: u64,
    /// What had come when it was last looked at, and since when no more came.
    seen: Option<(u64, Moment)>,
    lost: Told,
}

/// Whether the source was told that a lane is dead.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Told {
    #[default]
    Nothing,
    Lost,
}

/// What a fence found.
pub(super) enum Fence {
    /// A worker that is to be ended.
    Worker,
    /// Nothing to end: so many frames had come, and no page after the last end of a round.
    Answer { frames: u64 },
}

impl Lanes {
    /// None yet of `most` that may come.
    pub(super) fn none_of(most: u16) -> Self {
        let slot = |index| Slot {
            lane: LaneId::first(LaneIndex(index)),
            state: Lane::Absent,
        };
        Self {
            slots: (1..=most).map(slot).collect(),
            ..Self::default()
        }
    }

    /// The most that may stand at one time.
    pub(super) fn most(&self) -> u16 {
        u16::try_from(self.slots.len()).unwrap_or(u16::MAX)
    }

    /// Pages of all rounds that are over, and the last of those.
    pub(super) fn total(&self) -> (Round, u64) {
        (self.done, self.total)
    }

    fn slot(&mut self, index: LaneIndex) -> Option<&mut Slot> {
        self.slots.iter_mut().find(|slot| slot.lane.index == index)
    }

    /// Lets a lane take part. Refused are those that are there, and those fenced before they came.
    pub(super) fn enlist(&mut self, lane: LaneId) -> Result<(), &'static str> {
        let slot = self
            .slot(lane.index)
            .ok_or("no page lane of that number was agreed on")?;
        if !matches!(slot.state, Lane::Absent) || lane.generation < slot.lane.generation {
            return Err("that page lane is not due");
        }
        *slot = Slot {
            lane,
            state: Lane::Up(Up::default()),
        };
        Ok(())
    }

    /// The lane, while it is up.
    fn up(&mut self, lane: LaneId) -> Option<&mut Up> {
        match self.slots.iter_mut().find(|slot| slot.lane == lane)? {
            Slot {
                state: Lane::Up(up),
                ..
            } => Some(up),
            _ => None,
        }
    }

    /// True when the source is to be told that a lane is dead: once.
    pub(super) fn lose(&mut self, lane: LaneId) -> bool {
        let told = self.up(lane).map(|up| &mut up.lost);
        told.is_some_and(|told| std::mem::replace(told, Told::Lost) == Told::Nothing)
    }

    /// A lane ends a round. What it brought counts even when it is being fenced by now.
    pub(super) fn end_round(
        &mut self,
        lane: LaneId,
        round: Round,
        pages: u64,
        frames: u64,
    ) -> Result<(), Reason> {
        let done = self.done;
        let Some(slot) = self.slots.iter_mut().find(|slot| slot.lane == lane) else {
            return Ok(());
        };
        let what = match &mut slot.state {
            Lane::Absent | Lane::Exhausted => return Ok(()),
            // A lane that has joined while its first round was being done by the others.
            _ if round <= done && pages == 0 => return Ok(()),
            _ if round <= done => "pages of a round that was done",
            _ if round.0 > done.0 + 1 => "the end of another round",
            Lane::Up(up) if up.ended >= round => "the end of a round twice",
            Lane::Up(up) => {
                (up.ended, up.frames) = (round, frames);
                self.pages = self.pages.saturating_add(pages);
                return Ok(());
            }
            Lane::Ending => {
                self.pages = self.pages.saturating_add(pages);
                return Ok(());
            }
        };
        let phase = Phase::Receiving;
        Err(Reason::Protocol { what, phase })
    }

    /// The source wants a lane ended. `None` for one that was fenced already.
    pub(super) fn fence(&mut self, lane: LaneId) -> Option<Fence> {
        let slot = self.slot(lane.index)?;
        match &slot.state {
            Lane::Up(_) if slot.lane == lane => {
                slot.state = Lane::Ending;
                Some(Fence::Worker)
            }
            // Its hello is still on its way, or never left.
            Lane::Absent if lane.generation >= slot.lane.generation => {
                slot.pass(lane);
                Some(Fence::Answer { frames: 0 })
            }
            _ => None,
        }
    }

    /// The same once RAM is complete: every worker has ended, after its end of the last round.
    pub(super) fn fence_late(&mut self, lane: LaneId) -> Option<Fence> {
        let up = self.up(lane).copied();
        match up {
            None => self.fence(lane),
            Some(up) => {
                self.slot(lane.index)?.pass(lane);
                Some(Fence::Answer { frames: up.frames })
            }
        }
    }

    /// The worker of a lane has ended. False for one that nobody waits for.
    pub(super) fn ended(&mut self, lane: LaneId, pages: u64) -> bool {
        let Some(slot) = self.slot(lane.index) else {
            return false;
        };
        let awaited = slot.lane == lane && matches!(slot.state, Lane::Ending);
        if awaited {
            slot.pass(lane);
            self.pages = self.pages.saturating_add(pages);
        }
        awaited
    }

    /// The open round, with its pages, once it is done.
    pub(super) fn finish_round(&mut self) -> Option<(Round, u64)> {
        let open = Round(self.done.0 + 1);
        let ended = |slot: &Slot| match &slot.state {
            Lane::Up(up) => up.ended >= open,
            Lane::Ending => false,
            Lane::Absent | Lane::Exhausted => true,
        };
        let stands = |slot: &Slot| matches!(slot.state, Lane::Up(_));
        if !self.slots.iter().any(stands) || !self.slots.iter().all(ended) {
            return None;
        }
        let pages = std::mem::take(&mut self.pages);
        self.done = open;
        self.total = self.total.saturating_add(pages);
        Some((open, pages))
    }

    /// When lanes that lag want to be looked at.
    pub(super) fn look_at(&self) -> Option<Moment> {
        self.look_at
    }

    /// True when it is time to look.
    pub(super) fn looks(&mut self, now: Moment) -> bool {
        self.look_at.take_if(|at| *at <= now).is_some()
    }

    /// Plans a look while some lanes have ended the open round and others have not.
    pub(super) fn watch(&mut self, now: Moment, silence: Duration) {
        let open = Round(self.done.0 + 1);
        let up = self.slots.iter().filter_map(|slot| match &slot.state {
            Lane::Up(up) => Some(up.ended >= open),
            _ => None,
        });
        let (ended, lagging): (Vec<bool>, Vec<bool>) = up.partition(|ended| *ended);
        if ended.is_empty() || lagging.is_empty() {
            self.look_at = None;
            for slot in &mut self.slots {
                if let Lane::Up(up) = &mut slot.state {
                    up.seen = None;
                }
            }
        } else {
            self.look_at.get_or_insert(now.after(silence / LOOKS));
        }
    }

    /// Lanes on which nothing has come for `silence`, while others have ended the round.
    pub(super) fn silent(
        &mut self,
        now: Moment,
        silence: Duration,
        looked: &[LaneSeen],
    ) -> Vec<LaneId> {
        let open = Round(self.done.0 + 1);
        let mut silent = Vec::new();
        for LaneSeen { lane, bytes } in looked {
            let Some(up) = self.up(*lane).filter(|up| up.ended < open) else {
                continue;
            };
            match up.seen {
                Some((before, since)) if before == *bytes => {
                    if now.since(since) >= silence {
                        silent.push(*lane);
                    }
                }
                _ => up.seen = Some((*bytes, now)),
            }
        }
        silent
    }
}

impl Slot {
    /// Nothing of `lane` or of those before it may come any more.
    fn pass(&mut self, lane: LaneId) {
        let Some(next) = lane.successor() else {
            self.state = Lane::Exhausted;
            return;
        };
        self.lane = next;
        self.state = Lane::Absent;
    }
}

#[cfg(test)]
mod tests {
    use ferry_stream::frame::Generation;

    use super::*;

    fn lane(index: u16, generation: u16) -> LaneId {
        LaneId {
            index: LaneIndex(index),
            generation: Generation(generation),
        }
    }

    #[test]
    fn the_last_generation_is_the_last() {
        let mut lanes = Lanes::none_of(1);
        let last = lane(1, u16::MAX);
        lanes.enlist(last).unwrap();
        assert!(matches!(lanes.fence(last), Some(Fence::Worker)));
        assert!(lanes.ended(last, 0));
        assert!(lanes.enlist(last).is_err());
        assert!(lanes.fence(last).is_none());
    }

    #[test]
    fn only_a_lane_that_lags_and_brings_nothing_is_silent() {
        let ms = Duration::from_millis;
        let at = |ms| Moment(Duration::from_millis(ms));
        let mut lanes = Lanes::none_of(2);
        let (one, two) = (lane(1, 0), lane(2, 0));
        lanes.enlist(one).unwrap();
        lanes.enlist(two).unwrap();
        lanes.watch(at(0), ms(400));
        assert_eq!(lanes.look_at(), None, "nobody has ended the round");
        lanes.end_round(one, Round(1), 5, 2).unwrap();
        lanes.watch(at(0), ms(400));
        assert_eq!(lanes.look_at(), Some(at(100)));
        let seen = |bytes| [one, two].map(|lane| LaneSeen { lane, bytes });
        assert!(lanes.silent(at(100), ms(400), &seen(7)).is_empty());
        assert!(lanes.silent(at(450), ms(400), &seen(8)).is_empty());
        assert!(lanes.silent(at(849), ms(400), &seen(8)).is_empty());
        assert_eq!(lanes.silent(at(850), ms(400), &seen(8)), [two]);
    }
}
