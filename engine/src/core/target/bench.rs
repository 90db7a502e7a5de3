//! A target's machine under test: facts in, orders out as words, and the path without trouble.

use std::time::Duration;

use ferry_stream::frame::Generation;
use ferry_stream::message::{
    AbortCode, Features, Hello, LaneId, LaneIndex, Message, Mode, Offer, Purpose, RegionInfo,
    Round, Run, SessionId, Versions,
};

use super::{Target, TargetConfig, TargetLimits};
use crate::core::layout::{Layout, Region};
use crate::core::message::{
    Action, Failure, GuestLeft, Input, Moment, Outcome, Phase, Record, Step,
};
use crate::vmm::{GuestEvent, Inventory};

pub(super) fn inventory() -> Inventory {
    let region = Region {
        name: "ram0".into(),
        bytes: 16 * 4096,
        backing_page_bytes: 4096,
    };
    Inventory {
        arch: "x86_64".into(),
        machine: "test-1.0".into(),
        vmm: "a test".into(),
        layout: Layout::new(vec![region]).unwrap(),
        devices: vec![],
    }
}

pub(super) fn hello() -> Hello {
    let region = RegionInfo {
        name: "ram0".into(),
        bytes: 16 * 4096,
        backing_page_bytes: 4096,
    };
    Hello {
        versions: Versions::OURS,
        features: Features::NONE,
        session: SessionId([1; 16]),
        purpose: Purpose::Migrate,
        offer: Some(Offer {
            arch: "x86_64".into(),
            machine: "test-1.0".into(),
            vmm: "a test".into(),
            regions: vec![region],
            lanes: 2,
            mode: Mode::Live,
        }),
    }
}

pub(super) fn complete(round: u32, pages: u64) -> Input {
    Input::Received(Message::Complete {
        round: Round(round),
        pages,
        state_bytes: 9,
        state_crc: 7,
    })
}

pub(super) fn ended(round: u32, pages: u64) -> Input {
    ended_by(ONE, round, pages)
}

pub(super) fn lane(index: u16, generation: u16) -> LaneId {
    LaneId {
        index: LaneIndex(index),
        generation: Generation(generation),
    }
}

pub(super) const ONE: LaneId = LaneId::first(LaneIndex(1));
pub(super) const TWO: LaneId = LaneId::first(LaneIndex(2));

/// A lane's end of a round: its frame number `round`, one being an end as well.
pub(super) fn ended_by(lane: LaneId, round: u32, pages: u64) -> Input {
    Input::RoundEnded {
        lane,
        round: Round(round),
        pages,
        frames: u64::from(round) * 2,
    }
}

pub(super) fn failure(step: Step) -> Input {
    Input::Failed(Failure::new(step, "as the test has it"))
}

pub(super) fn lost() -> Input {
    let what = "cut".to_owned();
    Input::LinkLost { what }
}

pub(super) fn aborted() -> Input {
    let (code, text) = (AbortCode::Cancelled, "enough".to_owned());
    Input::Received(Message::Abort { code, text })
}

pub(super) fn gone() -> Input {
    let what = "killed".to_owned();
    Input::Guest(GuestEvent::Gone { what })
}

/// An action in a few words.
pub(super) fn word(action: &Action) -> String {
    match action {
        Action::Send(message) => format!("send {}", message.name()),
        Action::Journal(record) => format!("journal {record:?}"),
        Action::Answer { to, verdict } => format!("answer {}: {verdict:?}", to.0),
        Action::Allocate(room) => {
            let room: Vec<_> = room
                .iter()
                .map(|(region, range)| (region.0, range.first.0, range.count))
                .collect();
            format!("allocate {room:?}")
        }
        Action::ReleaseLoad { .. } => "ReleaseLoad".to_owned(),
        Action::Tell(_) => "tell".to_owned(),
        Action::Finish(Outcome::Moved) => "finish moved".to_owned(),
        Action::Finish(Outcome::Kept { guest, .. }) => match guest {
            GuestLeft::Untouched => "finish untouched".to_owned(),
            _ => "finish ended".to_owned(),
        },
        Action::Finish(Outcome::InDoubt { .. }) => "finish in doubt".to_owned(),
        other => format!("{other:?}"),
    }
}

/// A machine under test.
pub(super) struct Bench {
    pub(super) machine: Target,
    pub(super) now: Moment,
}

impl Bench {
    pub(super) fn new() -> Self {
        let config = TargetConfig {
            lanes: 2,
            limits: TargetLimits::default(),
        };
        let machine = Target::new(config, inventory());
        let now = Moment::default();
        Self { machine, now }
    }

    pub(super) fn orders(&mut self) -> Vec<String> {
        std::iter::from_fn(|| self.machine.poll_action())
            .map(|action| word(&action))
            .collect()
    }

    pub(super) fn tell(&mut self, input: Input) -> Vec<String> {
        self.now = self.now.after(Duration::from_millis(1));
        let greets = matches!(input, Input::Received(Message::Hello(_)));
        self.machine.handle(self.now, input);
        if greets && self.machine.phase() == Phase::Preparing {
            for lane in [ONE, TWO] {
                self.machine.enlist(lane).unwrap();
            }
        }
        self.orders()
    }

    /// Lets time pass until the machine's deadline.
    pub(super) fn wait(&mut self) -> Vec<String> {
        self.now = self.machine.poll_timeout().expect("something is awaited");
        self.machine.handle_timeout(self.now);
        self.orders()
    }

    /// A migration that has come to `phase`, with everything going well.
    pub(super) fn at(phase: Phase) -> Self {
        let mut bench = Self::new();
        let mut facts = happy_path().into_iter();
        while bench.machine.phase() != phase {
            let (fact, _) = facts.next().expect("the happy path comes by every phase");
            bench.tell(fact);
        }
        bench
    }

    /// "Taken" is in the journal, and the guest is being resumed.
    pub(super) fn resuming() -> Self {
        let mut bench = Self::at(Phase::Taking);
        assert_eq!(bench.tell(Input::Journaled(Record::Taken)), ["Resume"]);
        bench
    }

    /// The VMM has ended, and "returned" is in the journal.
    pub(super) fn returned(&mut self) -> Vec<String> {
        assert_eq!(self.tell(Input::Quit), ["journal Returned"]);
        self.tell(Input::Journaled(Record::Returned))
    }
}

/// Every fact of a migration without trouble, with what it leads to, until the guest has moved.
pub(super) fn happy_path() -> Vec<(Input, Vec<&'static str>)> {
    let got = Input::Received;
    vec![
        (
            got(Message::Hello(hello())),
            vec!["send Welcome", "journal Receiving", "Prepare"],
        ),
        (Input::Journaled(Record::Receiving), vec![]),
        (Input::Prepared, vec!["BeginLoad", "send Prepared"]),
        (ended(1, 5), vec![]),
        (ended_by(TWO, 1, 6), vec!["send RoundDone"]),
        (got(Message::Paused), vec![]),
        (complete(2, 14), vec![]),
        (ended(2, 3), vec![]),
        (ended_by(TWO, 2, 0), vec!["send RoundDone", "ReleaseLoad"]),
        (Input::Loaded, vec!["send Ready"]),
        (got(Message::Go { run: Run::Run }), vec!["journal Taken"]),
        (Input::Journaled(Record::Taken), vec!["Resume"]),
        (Input::Resumed, vec!["send Running"]),
        (got(Message::Finished), vec![]),
    ]
}

pub(super) const BEFORE_GO: [Phase; 4] = [
    Phase::Preparing,
    Phase::Receiving,
    Phase::Loading,
    Phase::Offered,
];

pub(super) const REFUSAL: [&str; 2] = ["journal Refused", "Quit"];
