//! What a seed decides beforehand: the job, the speed of everything, and what will go wrong.

use std::num::NonZeroU16;
use std::ops::RangeInclusive;
use std::time::Duration;

use ferry_engine::core::converge::{Converge, DowntimeLimit, Verdict, View};
use ferry_engine::core::growth::Room;
use ferry_engine::core::message::{Command, Phase};
use ferry_engine::core::source::{AtTimeout, LanePlan, Postcopy, SourceConfig, SourceLimits};
use ferry_engine::core::target::{TargetConfig, TargetLimits};
use ferry_engine::core::throttle::Throttling;
use ferry_engine::vmm::RunState;
use ferry_stream::message::{Features, Mode, SessionId};

use super::guest::Pattern;
use super::rng::Rng;

/// One of the two ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Where the guest comes from.
    Source,
    /// Where it goes.
    Target,
}

impl Side {
    /// The other one.
    pub(super) fn other(self) -> Self {
        match self {
            Self::Source => Self::Target,
            Self::Target => Self::Source,
        }
    }
}

/// Something that disturbs a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mischief {
    /// The control lane is cut.
    CutControl,
    /// All page lanes are cut.
    CutLanes,
    /// Everything between the two is cut.
    CutAll,
    /// One page lane dies.
    KillLane,
    /// One page lane hangs: nobody is told.
    HangLane,
    /// Wrong bytes come on a page lane.
    CorruptLane,
    /// What the source keeps of what it sent goes bad.
    SpoilBases,
    /// A person's order.
    Order(Side, Command),
    /// Something happens to a guest.
    Guest(Side, Fate),
    /// A device is plugged into the source's guest.
    Plug,
    /// Somebody asks the target, who is not the source.
    Stranger,
    /// A side is told that its peer gave up.
    Abort(Side),
    /// A side is sent what must not come now.
    Nonsense(Side),
    /// What a side does next takes very long.
    Freeze(Side),
}

/// What happens to a guest without the engine's doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It is reset.
    Reset,
    /// It shuts down.
    ShutDown,
    /// It panics.
    Panic,
    /// An I/O error pauses it.
    IoError,
    /// Somebody pauses it.
    Pause,
    /// Somebody resumes it.
    Resume,
    /// Its VMM dies.
    Gone,
}

/// When mischief happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum When {
    /// So long after the start.
    After(Duration),
    /// So long after a side reached a phase.
    In(Side, Phase, Duration),
}

/// Whether a source that lost its link can reach the target again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reach {
    /// At once.
    Always,
    /// This long after the first attempt.
    Later(Duration),
    /// Never.
    Never,
}

/// Everything that a seed decides before the world begins.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    /// What the source is told.
    pub(super) source: SourceConfig,
    /// What the target is told.
    pub(super) target: TargetConfig,
    /// Whether the guest runs in the beginning.
    pub(super) guest: RunState,
    /// Which pages it writes.
    pub(super) pattern: Pattern,
    /// Time between two bursts of writes.
    pub(super) tick: Duration,
    /// Pages in a burst, at most.
    pub(super) burst: u64,
    /// What an action takes, in microseconds.
    pub(super) work_us: RangeInclusive<u64>,
    /// What a message or frame takes to arrive, in microseconds.
    pub(super) wire_us: RangeInclusive<u64>,
    /// Until a side notices that its link is gone, in microseconds.
    pub(super) notice_us: RangeInclusive<u64>,
    /// One action in so many fails; 0 for none.
    pub(super) failing: u64,
    /// One late fact in so many comes twice; 0 for none.
    pub(super) repeating: u64,
    /// Bytes that a page counts on the wire.
    pub(super) page_bytes: u64,
    /// Whether the target can be asked.
    pub(super) reach: Reach,
    /// What goes wrong, and when.
    pub(super) mischief: Vec<(When, Mischief)>,
    /// Which rule stops the guest.
    pub(super) rule: Rule,
}

/// A convergence rule of the world.
#[derive(Clone, Copy, Debug)]
pub(super) enum Rule {
    /// The engine's own.
    Engine,
    /// Stops after so many rounds, and slows the guest in every one before, where it may.
    After(u32),
}

impl Rule {
    /// The rule itself.
    pub(super) fn boxed(self) -> Box<dyn Converge> {
        match self {
            // Worlds last for milliseconds.
            Self::Engine => Box::new(DowntimeLimit::with_patience(Duration::ZERO)),
            Self::After(rounds) => Box::new(AfterRounds(rounds)),
        }
    }
}

struct AfterRounds(u32);

impl Converge for AfterRounds {
    fn decide(&mut self, view: &View<'_>) -> Verdict {
        if view.rounds.len() >= self.0 as usize {
            Verdict::Stop
        } else {
            Verdict::Throttle
        }
    }
}

const PHASES: [(Side, Phase); 19] = [
    (Side::Source, Phase::Greeting),
    (Side::Source, Phase::Preparing),
    (Side::Source, Phase::Copying),
    (Side::Source, Phase::Stopping),
    (Side::Source, Phase::Draining),
    (Side::Source, Phase::Offering),
    (Side::Source, Phase::Giving),
    (Side::Source, Phase::Given),
    (Side::Source, Phase::Asking),
    (Side::Source, Phase::Leaving),
    (Side::Source, Phase::Undoing),
    (Side::Target, Phase::Waiting),
    (Side::Target, Phase::Preparing),
    (Side::Target, Phase::Receiving),
    (Side::Target, Phase::Loading),
    (Side::Target, Phase::Offered),
    (Side::Target, Phase::Taking),
    (Side::Target, Phase::Taken),
    (Side::Target, Phase::Refusing),
];

impl Plan {
    /// Whether pages are told by name alone, and taken from the source's RAM.
    pub(super) fn shares(&self) -> bool {
        self.source.features.contains(Features::NEAR)
    }

    /// Draws a plan.
    pub(super) fn draw(rng: &mut Rng) -> Self {
        let fastest_us = rng.pick(&[2, 10, 50]);
        let calm = rng.percent(15);
        Self {
            source: source_config(rng),
            target: target_config(rng),
            guest: rng.pick(&[
                RunState::Running,
                RunState::Running,
                RunState::Running,
                RunState::Paused,
            ]),
            pattern: rng.pick(&[Pattern::Uniform, Pattern::Hot, Pattern::Sequential]),
            tick: rng.micros(20..=2000),
            burst: rng.within(1..=6),
            work_us: fastest_us..=fastest_us * rng.pick(&[4, 16, 64]),
            wire_us: 1..=rng.pick(&[4, 32, 256]),
            notice_us: 5..=rng.pick(&[50, 5000, 20_000]),
            failing: if calm {
                0
            } else {
                rng.pick(&[0, 0, 0, 20, 100])
            },
            repeating: rng.pick(&[0, 0, 4, 20]),
            page_bytes: rng.pick(&[4112, 4112, 1 << 16]),
            reach: reach(rng),
            mischief: if calm { Vec::new() } else { mischief(rng) },
            rule: rng.pick(&[Rule::Engine, Rule::After(1), Rule::After(3)]),
        }
    }
}

/// Bounds a thousandth of the engine's own, so that a world in which everybody waits for them is
/// still a short one.
fn source_config(rng: &mut Rng) -> SourceConfig {
    let ms = Duration::from_millis;
    SourceConfig {
        session: SessionId([7; 16]),
        mode: rng.pick(&[Mode::Live, Mode::Live, Mode::Paused]),
        run_at_target: rng.pick(&[None, None, Some(RunState::Paused), Some(RunState::Running)]),
        downtime_limit: rng.micros(1..=4000),
        postcopy: Postcopy::Never,
        at_timeout: AtTimeout::Suspend,
        throttling: throttling(rng),
        timeout: rng.percent(30).then(|| rng.micros(100..=50_000)),
        lanes: lanes(rng),
        features: features(rng),
        switchover_floor: rng.micros(1..=1000),
        limits: SourceLimits {
            greeting: ms(20),
            preparing: ms(60),
            flushing: ms(5),
            stopping: ms(30),
            draining: ms(60),
            standing: ms(20),
            offering: ms(60),
            given: ms(15),
            asking: ms(60),
            ask_again: ms(1),
            redial: rng.micros(1..=2000),
            growing: rng.micros(10..=1000),
            last_word: rng.micros(1..=500),
            settling: rng.micros(0..=2000),
        },
    }
}

/// As often as not; in small steps, large ones and those that are usual.
fn throttling(rng: &mut Rng) -> Option<Throttling> {
    let mut percent = || rng.pick(&[1, 10, 20, 50, 99]);
    let steps = Throttling {
        initial_percent: percent(),
        increment_percent: percent(),
    };
    rng.percent(50).then_some(steps)
}

/// Each of them at least as often as not.
fn features(rng: &mut Rng) -> Features {
    let deltas = rng.pick(&[Features::DELTA, Features::DELTA, Features::NONE]);
    let ahead = rng.pick(&[Features::NONE, Features::AHEAD]);
    // Both on one host.
    let near = rng.pick(&[
        Features::NONE,
        Features::NONE,
        Features::NONE,
        Features::NEAR,
    ]);
    deltas.union(ahead).union(near)
}

fn lanes(rng: &mut Rng) -> LanePlan {
    let few = |most: u64, rng: &mut Rng| {
        let lanes = u16::try_from(rng.within(1..=most)).ok();
        lanes.and_then(NonZeroU16::new).unwrap_or(NonZeroU16::MIN)
    };
    if rng.percent(50) {
        return LanePlan::Fixed(few(4, rng));
    }
    LanePlan::Grow {
        first: few(2, rng),
        room: Room {
            most: few(4, rng),
            cores: few(4, rng),
        },
    }
}

fn target_config(rng: &mut Rng) -> TargetConfig {
    let ms = Duration::from_millis;
    TargetConfig {
        lanes: rng.pick(&[1, 2, 3, 4, 4, 4]),
        limits: TargetLimits {
            preparing: ms(60),
            offered: ms(120),
            linger: ms(200),
            parting: ms(8),
            lane_silence: rng.micros(500..=20_000),
            settling: rng.micros(0..=2000),
        },
    }
}

fn reach(rng: &mut Rng) -> Reach {
    match rng.below(10) {
        0 => Reach::Never,
        1..=3 => Reach::Later(rng.micros(100..=80_000)),
        _ => Reach::Always,
    }
}

fn mischief(rng: &mut Rng) -> Vec<(When, Mischief)> {
    let count = rng.pick(&[0, 1, 1, 2, 3, 5]);
    let killed = rng.pick(&[0, 0, 1, 3, 10]);
    let mixed = (0..count).map(|_| one_mischief as fn(&mut Rng) -> Mischief);
    let kills = (0..killed).map(|_| one_kill as fn(&mut Rng) -> Mischief);
    mixed
        .chain(kills)
        .map(|draw| (when(rng), draw(rng)))
        .collect()
}

fn when(rng: &mut Rng) -> When {
    if rng.percent(25) {
        return When::After(rng.micros(1..=30_000));
    }
    let (side, phase) = rng.pick(&PHASES);
    let after = if rng.percent(30) {
        Duration::ZERO
    } else {
        rng.micros(1..=2000)
    };
    When::In(side, phase, after)
}

fn one_kill(rng: &mut Rng) -> Mischief {
    rng.pick(&[Mischief::KillLane, Mischief::KillLane, Mischief::HangLane])
}

fn one_mischief(rng: &mut Rng) -> Mischief {
    let side = rng.pick(&[Side::Source, Side::Target]);
    match rng.below(24) {
        0..=2 => Mischief::CutControl,
        3 => Mischief::CutLanes,
        4..=6 => Mischief::CutAll,
        7 => Mischief::CorruptLane,
        8 | 9 => Mischief::Order(side, Command::Cancel),
        10 => Mischief::Order(Side::Source, Command::Suspend),
        11 => Mischief::Order(Side::Source, Command::SetDowntimeLimit(downtime_limit(rng))),
        12..=14 => Mischief::Guest(
            rng.pick(&[Side::Source, Side::Source, Side::Target]),
            fate(rng),
        ),
        15 => Mischief::Plug,
        16 => Mischief::Stranger,
        17 => Mischief::Abort(side),
        18 => Mischief::Nonsense(side),
        19..=22 => Mischief::SpoilBases,
        _ => Mischief::Freeze(side),
    }
}

/// From what nothing fits into to what everything fits into.
fn downtime_limit(rng: &mut Rng) -> Duration {
    let usual = rng.micros(1..=5000);
    rng.pick(&[usual, usual, usual, Duration::ZERO, Duration::MAX])
}

fn fate(rng: &mut Rng) -> Fate {
    rng.pick(&[
        Fate::Reset,
        Fate::ShutDown,
        Fate::Panic,
        Fate::IoError,
        Fate::Pause,
        Fate::Pause,
        Fate::Resume,
        Fate::Resume,
        Fate::Gone,
    ])
}
