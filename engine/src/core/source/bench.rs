//! A source's machine under test: facts in, orders out as words, and the path without trouble.

use std::num::NonZeroU16;
use std::time::Duration;

use ferry_stream::frame::Generation;
use ferry_stream::message::{
    Features, LaneId, LaneIndex, Message, Mode, Round, SessionId, Versions, Welcome,
};

use super::{AtTimeout, LanePlan, Postcopy, Source, SourceConfig, SourceLimits};
use crate::core::converge::{Converge, Verdict, View};
use crate::core::layout::{Layout, PageRange, Region, RegionIndex};
use crate::core::message::{
    Action, Deltas, Failure, GuestLeft, HandedOn, Input, LaneTotals, Moment, Outcome, Pages, Phase,
    Record, Step,
};
use crate::core::pageset::PageSet;
use crate::vmm::{Inventory, RunState};

/// A rule that always says the same.
pub(super) struct Always(pub(super) Verdict);

impl Converge for Always {
    fn decide(&mut self, _: &View<'_>) -> Verdict {
        self.0
    }
}

pub(super) fn layout() -> Layout {
    let region = Region {
        name: "ram0".into(),
        bytes: 16 * 4096,
        backing_page_bytes: 4096,
    };
    Layout::new(vec![region]).unwrap()
}

pub(super) fn inventory() -> Inventory {
    Inventory {
        arch: "x86_64".into(),
        machine: "test-1.0".into(),
        vmm: "a test".into(),
        layout: layout(),
        devices: vec!["net0".into()],
    }
}

pub(super) fn config() -> SourceConfig {
    SourceConfig {
        session: SessionId([1; 16]),
        mode: Mode::Live,
        run_at_target: None,
        downtime_limit: Duration::from_millis(50),
        timeout: None,
        postcopy: Postcopy::Never,
        at_timeout: AtTimeout::Suspend,
        throttling: None,
        features: Features::NONE,
        lanes: LanePlan::Fixed(NonZeroU16::new(2).unwrap()),
        switchover_floor: Duration::from_millis(10),
        limits: SourceLimits::default(),
    }
}

/// The first `count` pages.
pub(super) fn pages(count: u64) -> PageSet {
    let mut set = PageSet::empty(&layout());
    set.insert(RegionIndex(0), PageRange::new(0, count))
        .unwrap();
    set
}

pub(super) fn lane(index: u16, generation: u16) -> LaneId {
    LaneId {
        index: LaneIndex(index),
        generation: Generation(generation),
    }
}

pub(super) const ONE: LaneId = LaneId::first(LaneIndex(1));
pub(super) const TWO: LaneId = LaneId::first(LaneIndex(2));

/// Lane 1 has sent so many pages in a round, and ended it.
pub(super) fn sent(round: u32, pages: u64) -> Input {
    lane_sent(ONE, round, pages)
}

/// Lane 2 has ended a round.
pub(super) fn idle(round: u32) -> Input {
    lane_sent(TWO, round, 0)
}

pub(super) fn lane_sent(lane: LaneId, round: u32, pages: u64) -> Input {
    Input::LaneSent {
        lane,
        round: Round(round),
        pages,
        totals: LaneTotals::default(),
    }
}

/// Tracking is on, and so many pages were handed on meanwhile.
pub(super) fn tracking(pages: u64) -> Input {
    Input::Tracking(handed_on(pages))
}

/// A scan has ended, and so many pages were handed on by it.
pub(super) fn scanned(pages: u64) -> Input {
    Input::Scanned(handed_on(pages))
}

fn handed_on(pages: u64) -> HandedOn {
    HandedOn {
        pages,
        ..HandedOn::default()
    }
}

pub(super) fn done(round: u32, pages: u64) -> Input {
    let round = Round(round);
    Input::Received(Message::RoundDone { round, pages })
}

pub(super) fn failure(step: Step) -> Input {
    Input::Failed(Failure::new(step, "as the test has it"))
}

pub(super) fn lost() -> Input {
    let what = "cut".to_owned();
    Input::LinkLost { what }
}

/// What the next round is ordered to do about deltas; all other orders are passed over.
pub(super) fn deltas(bench: &mut Bench) -> Option<Deltas> {
    std::iter::from_fn(|| bench.machine.poll_action()).find_map(|action| match action {
        Action::Copy { deltas, .. } => Some(deltas),
        _ => None,
    })
}

/// An action in a few words.
pub(super) fn word(action: &Action) -> String {
    match action {
        Action::Send(message) => format!("send {}", message.name()),
        Action::Copy {
            round,
            pages,
            zeros,
            ..
        } => match pages {
            Pages::Known(pages) => format!("copy {} in {round}, {zeros:?}", pages.len()),
            Pages::Scanned => format!("copy what is found in {round}, {zeros:?}"),
        },
        Action::Collect { .. } => "collect".to_owned(),
        Action::Scan { rearm, with } => format!("scan, and {}, rearm {rearm:?}", with.len()),
        Action::StartTracking { .. } => "track".to_owned(),
        Action::OpenLane(lane) => format!("open {lane}"),
        Action::JoinLane(lane) => format!("join {lane}"),
        Action::CutLane(lane) => format!("cut {lane}"),
        Action::Reclaim { lane, frames, .. } => format!("reclaim {lane} from {frames}"),
        Action::Journal(record) => format!("journal {record:?}"),
        Action::Tell(_) => "tell".to_owned(),
        Action::Finish(Outcome::Moved) => "finish moved".to_owned(),
        Action::Finish(Outcome::Kept { reason, guest }) => {
            let left = match guest {
                GuestLeft::As(state) => format!("{state:?}"),
                GuestLeft::Untouched => "untouched".to_owned(),
                GuestLeft::Ended => "ended".to_owned(),
                GuestLeft::Damaged(_) => "damaged".to_owned(),
            };
            format!("finish kept, {left}: {reason}")
        }
        Action::Finish(Outcome::InDoubt { .. }) => "finish in doubt".to_owned(),
        other => format!("{other:?}"),
    }
}

/// A machine under test.
pub(super) struct Bench {
    pub(super) machine: Source,
    pub(super) now: Moment,
}

impl Bench {
    pub(super) fn with(config: SourceConfig, guest: RunState, verdict: Verdict) -> Self {
        Self::ruled(config, guest, Box::new(Always(verdict)))
    }

    /// The same, with a rule that looks.
    pub(super) fn ruled(config: SourceConfig, guest: RunState, rule: Box<dyn Converge>) -> Self {
        let machine = Source::new(config, inventory(), guest, rule);
        let now = Moment::default();
        let mut bench = Self { machine, now };
        assert_eq!(bench.orders(), ["send Hello"]);
        bench
    }

    pub(super) fn orders(&mut self) -> Vec<String> {
        std::iter::from_fn(|| self.machine.poll_action())
            .map(|action| word(&action))
            .collect()
    }

    pub(super) fn tell(&mut self, input: Input) -> Vec<String> {
        self.now = self.now.after(Duration::from_millis(1));
        self.machine.handle(self.now, input);
        self.orders()
    }

    /// Lets time pass until the machine's deadline.
    pub(super) fn wait(&mut self) -> Vec<String> {
        self.now = self.machine.poll_timeout().expect("something is awaited");
        self.machine.handle_timeout(self.now);
        self.orders()
    }

    /// A live migration that has come to `phase`, with everything going well.
    pub(super) fn at(phase: Phase) -> Self {
        let mut bench = Self::with(config(), RunState::Running, Verdict::Stop);
        let mut facts = happy_path().into_iter();
        while bench.machine.phase() != phase {
            let (fact, _) = facts.next().expect("the happy path comes by every phase");
            bench.tell(fact);
        }
        bench
    }

    /// Answers an undo, to the end.
    pub(super) fn undone(&mut self) -> Vec<String> {
        self.tell(Input::Undone(Ok(RunState::Running)));
        assert_eq!(self.tell(Input::TrackingStopped), ["journal Kept"]);
        self.tell(Input::Journaled(Record::Kept))
    }
}

/// Every fact of a migration without trouble, with what it leads to, until the guest has moved.
pub(super) fn happy_path() -> Vec<(Input, Vec<&'static str>)> {
    let welcome = Message::Welcome(Welcome {
        version: Versions::OURS.highest,
        features: Features::NONE,
        lanes: 2,
    });
    let got = Input::Received;
    let found = |count| Input::Collected {
        found: pages(count),
    };
    let at = Moment(Duration::from_millis(9));
    vec![
        (
            got(welcome),
            vec![
                "journal Migrating",
                "open lane 1",
                "open lane 2",
                "OpenState",
                "track",
            ],
        ),
        (Input::Journaled(Record::Migrating), vec![]),
        (Input::LaneOpen(ONE), vec!["join lane 1"]),
        (Input::LaneOpen(TWO), vec!["join lane 2"]),
        (Input::StateOpen, vec![]),
        (tracking(3), vec![]),
        (
            got(Message::Prepared),
            vec!["Flush", "copy what is found in round 1, Skip"],
        ),
        (Input::Flushed, vec![]),
        (idle(1), vec![]),
        (sent(1, 3), vec![]),
        (done(1, 3), vec!["collect"]),
        (found(1), vec!["Pause(Switchover)"]),
        (
            Input::Paused { at, drained: at },
            vec![
                "send Paused",
                "Save",
                "scan, and 1, rearm Yes",
                "copy what is found in round 2, Tell",
            ],
        ),
        (scanned(2), vec![]),
        (Input::Saved { bytes: 9, crc: 7 }, vec!["Inventory"]),
        (sent(2, 2), vec![]),
        (idle(2), vec![]),
        (
            done(2, 2),
            vec![
                "scan, and 0, rearm No",
                "copy what is found in round 3, Tell",
            ],
        ),
        (scanned(1), vec!["send Complete"]),
        (sent(3, 1), vec![]),
        (idle(3), vec![]),
        (done(3, 1), vec![]),
        (got(Message::Ready { load_us: 0 }), vec![]),
        (
            Input::Inventoried(Box::new(inventory())),
            vec!["journal Given"],
        ),
        (Input::Journaled(Record::Given), vec!["send Go"]),
        (
            got(Message::Running { resume_us: 0 }),
            vec!["send Finished", "journal Moved"],
        ),
        (Input::Journaled(Record::Moved), vec![]),
    ]
}

pub(super) const BEFORE_GO: [Phase; 6] = [
    Phase::Preparing,
    Phase::Copying,
    Phase::Stopping,
    Phase::Draining,
    Phase::Offering,
    Phase::Giving,
];

pub(super) const AFTER_GO: [Phase; 2] = [Phase::Given, Phase::Leaving];

/// How trouble before Go begins to be put right.
pub(super) fn gives_up(bench: &Bench, orders: &[String]) {
    assert!(orders.contains(&"StopTracking".to_owned()), "{orders:?}");
    assert!(!orders.contains(&"send Go".to_owned()), "{orders:?}");
    assert_eq!(bench.machine.phase(), Phase::Undoing);
}
