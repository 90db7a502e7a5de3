//! Whether to pack pages, and how: by what makes them arrive earlier.
//!
//! Packing pays where the link is what everybody waits for: then a second of it carries more pages. It
//! harms where the cores are, on this side or the other. So the chooser asks one thing first: are the
//! lanes' earlier bytes still queued when the next ones are ready? While they are not, nothing is
//! packed. While they are, what has left the queues tells the link's rate, and each way to pack is
//! judged by the guest's bytes that it would bring over in a second:
//!
//! ```text
//! raw       the link's rate
//! packed    the lesser of  cores × speed  and  the link's rate × ratio
//! ```
//!
//! Of ways to pack that are about as good, the one with fewer bytes is taken. Where the cores cannot keep
//! the link busy with it, single chunks are packed in a cheaper way, or where they can, harder again: what
//! is on the way of a lane decides, chunk by chunk. Both are busy then, which brings more over than either
//! way alone. Measured over 1 Gbit/s with 512 MiB of text on two cores, medians of four: 1764 ms so,
//! 2578 ms with every chunk packed alike; 188 and 140 MiB, 2.5 and 3.6 s of processor time.
//!
//! Speed and ratio are assumed until they are measured on this guest's pages, and so is the share of the
//! cores that packing gets beside the guest. A queue also grows when
//! the receiver cannot place pages fast enough, where packing gains nothing: therefore a change from
//! raw has to prove itself, and is taken back when no more pages arrive than before, each time for
//! longer.
#![expect(clippy::cast_precision_loss, reason = "rates and ratios are estimates")]

use std::time::Duration;

use ferry_stream::message::{Features, Round};
use ferry_stream::pages::Effort;

use crate::core::message::Moment;

/// What a person wants of packing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// What makes pages arrive earlier.
    #[default]
    Auto,
    /// Nothing is packed.
    None,
    /// Everything with LZ4 that becomes smaller by it.
    Lz4,
    /// Everything with Zstandard that becomes smaller by it, at the level that suits link and cores.
    Zstd,
}

impl Compression {
    /// What the target must be able to unpack. Whoever wants fewer bytes wants deltas as well.
    pub fn features(self) -> Features {
        match self {
            Self::Auto => Features::LZ4.union(Features::ZSTD).union(Features::DELTA),
            Self::None => Features::NONE,
            Self::Lz4 => Features::LZ4.union(Features::DELTA),
            Self::Zstd => Features::ZSTD.union(Features::DELTA),
        }
    }
}

/// Whom the pages keep waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Haste {
    /// Nobody: the guest runs, and has a claim to the cores.
    Throughput,
    /// The guest, which is stopped: the few pages left shall arrive soonest.
    Latency,
}

/// What to do with the next chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Advice {
    /// Send it as it is.
    Raw,
    /// Send it as it is, after packing a sample of it, to learn.
    Probe(Effort),
    /// Pack it, unless a sample of it says that it does not become smaller.
    Pack(Effort),
}

/// How a packing went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Trial {
    pub(crate) effort: Effort,
    /// Bytes that were packed.
    pub(crate) before: u64,
    /// Bytes that came of it.
    pub(crate) after: u64,
    /// What it took of a core.
    pub(crate) cpu: Duration,
    /// Time that it took, waiting for a core included.
    pub(crate) took: Duration,
}

/// A chunk as it goes to the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sending {
    /// Its round.
    pub(crate) round: Round,
    /// The lane, by any number that is its own.
    pub(crate) lane: usize,
    /// Bytes of it before they were packed.
    pub(crate) data_bytes: u64,
    /// Bytes of it on the link.
    pub(crate) wire_bytes: u64,
    /// Bytes that the lane wrote earlier and that have not been acknowledged yet.
    pub(crate) queued: u64,
}

/// What packing did, of all lanes together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct EncodingTotals {
    /// Pages whose bytes went as they are.
    pub raw_pages: u64,
    /// Pages packed with LZ4.
    pub lz4_pages: u64,
    /// Pages packed with Zstandard.
    pub zstd_pages: u64,
    /// Pages told by how they differ from what was sent before, none of which is among the others.
    pub delta_pages: u64,
    /// Bytes that those were shorter by, before packing.
    pub delta_saved_bytes: u64,
    /// Bytes of all these pages, before anything was done to make them fewer.
    pub data_bytes: u64,
    /// Bytes that were sent for them.
    pub sent_bytes: u64,
    /// What looking and packing took of the cores.
    pub cpu: Duration,
}

impl EncodingTotals {
    /// Bytes of pages for each byte sent of them, to three digits; 1 when there were none.
    pub fn ratio(&self) -> f64 {
        let ratio = self.data_bytes.max(1) as f64 / self.sent_bytes.max(1) as f64;
        (ratio * 1e3).round() / 1e3
    }

    /// The way in which most of the packed pages went; none when none were packed.
    pub fn most_used(&self) -> Option<&'static str> {
        match (self.lz4_pages, self.zstd_pages) {
            (0, 0) => None,
            (lz4, zstd) if lz4 > zstd => Some("lz4"),
            _ => Some("zstd"),
        }
    }
}

/// How long the link is looked at before its rate counts.
const WINDOW: Duration = Duration::from_millis(10);

/// Least bytes that make a window: less measures the queues.
const WINDOW_BYTES: u64 = 1 << 20;

/// Bytes in a lane's queue from which it counts as waiting for the link.
const QUEUE_BYTES: u64 = 64 << 10;

/// Part of a window's sends that must have found a queue for the link to be the bottleneck.
const BUSY_SHARE: f64 = 0.5;

/// How many windows in a row must find the link busy before its rate is believed.
const BUSY_WINDOWS: u32 = 2;

/// How much better another way must promise to be.
const MARGIN: f64 = 1.1;

/// How much better another way to pack must be than the present one: two that are about as good would
/// else take turns with every change of what is known of them.
const SWITCH_MARGIN: f64 = 1.15;

/// What fewer bytes on the link are worth beside pages that arrive earlier: half as many count as
/// twice as fast. A link is seldom one's own, and bytes cost both hosts cores in the kernel, which no
/// packer's time shows.
const THRIFT: f64 = 1.0;

/// How much of an estimate a new measurement replaces.
const WEIGHT: f64 = 0.3;

/// By how much the link is thought faster with every window in which it was not busy.
const OPTIMISM: f64 = 1.002;

/// How many trials let what is known of a way stand by itself. Until then it follows the others: what
/// this guest's pages do to one way to pack, they do to all.
const ENOUGH_TRIALS: u32 = 8;

/// Time in packing after which what was known of the cores counts for nothing.
const SHARE_SPAN: Duration = Duration::from_millis(200);

/// How much of the way to cores that are all free again is gone with every window of raw pages: nobody
/// measures them then.
const SHARE_RECOVERY: f64 = 0.01;

/// How long packing has to prove itself. The first half does not count: raw pages are queued still.
const PROOF: Duration = Duration::from_millis(100);

/// For how long packing that proved nothing is left alone the first time; doubled at every other.
const FIRST_REST: Duration = Duration::from_millis(100);

/// How often pages are probed while all are sent raw. A probe packs [`PROBE_BYTES`], which takes about
/// 0.1 ms: a two-thousandth of one core.
const PROBE_PERIOD: Duration = Duration::from_millis(200);

/// Bytes of a chunk that a probe packs.
pub(crate) const PROBE_BYTES: usize = 64 << 10;

/// Bytes of pages of which one core finds the differences in a second, and keeps them for next time:
/// what is left of that with a guest and others at work. A link that carries as many needs no deltas.
const DELTA_SPEED: f64 = 400e6;

/// What is known of a way to pack: at first what is usual for a mixture of a guest's pages.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    effort: Effort,
    /// Bytes that one core packs in a second.
    speed: f64,
    /// By how much it makes bytes fewer.
    ratio: f64,
    /// How often it was measured.
    trials: u32,
}

const fn usual(effort: Effort, speed: f64, ratio: f64) -> Candidate {
    Candidate {
        effort,
        speed,
        ratio,
        trials: 0,
    }
}

const USUAL: [Candidate; 4] = [
    usual(Effort::Lz4, 700e6, 2.0),
    usual(Effort::Zstd(1), 450e6, 2.6),
    usual(Effort::Zstd(3), 280e6, 2.8),
    usual(Effort::Zstd(6), 110e6, 3.1),
];

/// What was seen of the link since the last verdict.
#[derive(Clone, Copy, Debug, Default)]
struct Window {
    /// None before the first send of a round: what happens between rounds says nothing of the link.
    began: Option<Moment>,
    /// Bytes of pages that were handed to the lanes, before packing.
    data_bytes: u64,
    /// The same on the link.
    wire_bytes: u64,
    /// Bytes that left the queues.
    left_bytes: u64,
    sends: u32,
    busy_sends: u32,
}

/// A change from raw that is not proved yet.
#[derive(Clone, Copy, Debug)]
struct Proof {
    /// Bytes of pages a second that arrived before it.
    before: f64,
    took: Duration,
    /// The sum of the rates at which they arrived since, and of how many windows.
    arrived: f64,
    windows: u32,
}

/// Chooses. See the module's documentation.
#[derive(Debug)]
pub(crate) struct Chooser {
    /// Cheapest first.
    candidates: Vec<Candidate>,
    /// Whether raw is a choice.
    raw_allowed: bool,
    /// How many chunks are packed at a time.
    packers: f64,
    /// How much of a core a packer gets, of 1: the guest, its VMM and others want them too.
    share: f64,
    current: Option<Effort>,
    /// What the link carries, in bytes a second, once it was seen busy.
    link: Option<f64>,
    /// The rate that lanes are held to, in bytes a second.
    limit: Option<f64>,
    round: Round,
    /// What each lane had queued when last seen in this round.
    queued: Vec<Option<u64>>,
    window: Window,
    /// Windows in a row in which the link was busy.
    busy_windows: u32,
    proof: Option<Proof>,
    rest_until: Moment,
    rest: Duration,
    probe_at: Moment,
}

impl Chooser {
    /// For `packers` chunks at a time, among the ways that `allows` lets through.
    pub(crate) fn new(
        compression: Compression,
        packers: usize,
        allows: impl Fn(Effort) -> bool,
    ) -> Self {
        let wanted = |effort| match compression {
            Compression::Auto => true,
            Compression::None => false,
            Compression::Lz4 => effort == Effort::Lz4,
            Compression::Zstd => effort != Effort::Lz4,
        };
        let candidates: Vec<_> = USUAL
            .into_iter()
            .filter(|candidate| wanted(candidate.effort) && allows(candidate.effort))
            .collect();
        let raw_allowed = compression == Compression::Auto || candidates.is_empty();
        Self {
            current: candidates
                .first()
                .filter(|_| !raw_allowed)
                .map(|candidate| candidate.effort),
            candidates,
            raw_allowed,
            packers: f64::from(u32::try_from(packers.max(1)).unwrap_or(u32::MAX)),
            share: 1.0,
            link: None,
            limit: None,
            round: Round(0),
            queued: Vec::new(),
            window: Window::default(),
            busy_windows: 0,
            proof: None,
            rest_until: Moment::default(),
            rest: FIRST_REST,
            probe_at: Moment(PROBE_PERIOD),
        }
    }

    /// True when nothing can ever be packed.
    pub(crate) fn is_idle(&self) -> bool {
        self.candidates.is_empty()
    }

    /// Whether the link is known, and carries fewer pages than the cores could tell as deltas.
    pub(crate) fn is_slower_than_deltas(&self) -> bool {
        let cores = self.packers * self.share;
        let link = self.link_rate().filter(|_| !self.is_idle());
        link.is_some_and(|link| link * MARGIN < cores * DELTA_SPEED)
    }

    /// How chunks are packed now; none when they are sent as they are.
    pub(crate) fn current(&self) -> Option<Effort> {
        self.current
    }

    /// What to do with the next chunk.
    pub(crate) fn advise(&mut self, now: Moment, haste: Haste) -> Advice {
        if haste == Haste::Latency {
            let soonest = self.soonest();
            return soonest.map_or(Advice::Raw, Advice::Pack);
        }
        match self.current {
            Some(effort) => Advice::Pack(effort),
            None if self.link.is_some() && now >= self.probe_at => {
                self.probe_at = now.after(PROBE_PERIOD);
                let cheapest = self.candidates.first();
                cheapest.map_or(Advice::Raw, |candidate| Advice::Probe(candidate.effort))
            }
            None => Advice::Raw,
        }
    }

    /// How to pack a chunk of `bytes` that was to be packed by `effort`, for a lane that has `queued` bytes
    /// on the way: the hardest way, up to that one, that is done before they are gone, or else the cheapest.
    /// A lane that runs dry waits for the cores, and the link has time for more bytes.
    pub(crate) fn relieve(&self, effort: Effort, bytes: u64, queued: u64) -> Effort {
        let at = self.candidates.iter().position(|it| it.effort == effort);
        // A lane that is held back by a limit has nothing on the way because of it.
        let link = self.link.filter(|_| self.limit.is_none());
        let (Some(at), Some(link)) = (at, link) else {
            return effort;
        };
        // Of the link each of the lanes at work has its part.
        let lanes = self.queued.iter().flatten().count().max(1);
        let lasts = queued as f64 * lanes as f64 / link;
        let in_time = |it: &&Candidate| bytes as f64 / (it.speed * self.share) <= lasts;
        // What a way leaves as it is would fill the link with nothing else.
        let mut ways = self.candidates[..=at].iter().filter(|it| it.ratio > MARGIN);
        let hardest = ways.clone().rev().find(in_time);
        hardest.or(ways.next()).map_or(effort, |it| it.effort)
    }

    /// Notes how a packing went.
    pub(crate) fn tried(&mut self, trial: Trial) {
        let (cpu, took) = (trial.cpu.as_secs_f64(), trial.took.as_secs_f64());
        let weight = (took / SHARE_SPAN.as_secs_f64()).min(1.0);
        self.share += ((cpu / took.max(1e-9)).min(1.0) - self.share) * weight;
        let found = |candidate: &&mut Candidate| candidate.effort == trial.effort;
        let Some(candidate) = self.candidates.iter_mut().find(found) else {
            return;
        };
        candidate.trials += 1;
        let (speed, ratio) = (candidate.speed, candidate.ratio);
        candidate.speed += (trial.before as f64 / cpu.max(1e-9) - speed) * WEIGHT;
        candidate.ratio += (trial.before as f64 / trial.after.max(1) as f64 - ratio) * WEIGHT;
        let (faster, smaller) = (candidate.speed / speed, candidate.ratio / ratio);
        for other in &mut self.candidates {
            if other.effort != trial.effort && other.trials < ENOUGH_TRIALS {
                other.speed *= faster;
                other.ratio = (other.ratio * smaller).max(1.0);
            }
        }
    }

    /// Holds the lanes to a rate, in bytes a second, or no longer.
    pub(crate) fn limit(&mut self, bytes_per_s: Option<u64>) {
        self.limit = bytes_per_s.map(|rate| rate as f64);
    }

    /// Notes that a chunk is about to be sent, and changes the choice when that is due.
    pub(crate) fn sending(&mut self, now: Moment, sending: Sending) {
        if sending.round != self.round {
            self.round = sending.round;
            self.queued.clear();
            self.window = Window::default();
        }
        if self.queued.len() <= sending.lane {
            self.queued.resize(sending.lane + 1, None);
        }
        let queued = &mut self.queued[sending.lane];
        let window = &mut self.window;
        if let Some(before) = *queued {
            window.left_bytes += before.saturating_sub(sending.queued);
        }
        *queued = Some(sending.queued + sending.wire_bytes);
        window.sends += 1;
        window.busy_sends += u32::from(sending.queued >= QUEUE_BYTES);
        window.data_bytes += sending.data_bytes;
        window.wire_bytes += sending.wire_bytes;
        let began = *window.began.get_or_insert(now);
        if now.since(began) >= WINDOW && window.data_bytes >= WINDOW_BYTES {
            let window = *window;
            self.window = Window {
                began: Some(now),
                ..Window::default()
            };
            self.close(now, now.since(began), window);
        }
    }

    /// Draws the conclusions from a window.
    fn close(&mut self, now: Moment, took: Duration, window: Window) {
        let rate = window.left_bytes as f64 / took.as_secs_f64();
        let busy = f64::from(window.busy_sends) >= f64::from(window.sends) * BUSY_SHARE;
        self.busy_windows = if busy { self.busy_windows + 1 } else { 0 };
        self.link = match self.link {
            // The first window of a connection that is still speeding up says too little.
            None if self.busy_windows >= BUSY_WINDOWS => Some(rate),
            Some(link) if busy => Some(link + (rate - link) * WEIGHT),
            Some(link) => Some(link * OPTIMISM),
            None => None,
        };
        // Not what was handed to the lanes: queues of packed pages are deeper than of raw ones.
        let arrived = rate * window.data_bytes as f64 / window.wire_bytes.max(1) as f64;
        // What could not be packed proves nothing of packing.
        let shrank = window.wire_bytes as f64 * MARGIN <= window.data_bytes as f64;
        if shrank && self.is_disproved(took, arrived, busy) {
            self.current = None;
            self.rest_until = now.after(self.rest);
            self.rest *= 2;
            return;
        }
        let before = self.current;
        if before.is_none() {
            self.share += (1.0 - self.share) * SHARE_RECOVERY;
        }
        self.choose(now);
        if before.is_none() && self.current.is_some() {
            self.proof = Some(Proof {
                before: self.link_rate().map_or(arrived, |link| link.min(arrived)),
                took: Duration::ZERO,
                arrived: 0.0,
                windows: 0,
            });
        }
    }

    /// Whether packing is known to bring no more pages over than before.
    fn is_disproved(&mut self, took: Duration, arrived: f64, busy: bool) -> bool {
        let Some(proof) = &mut self.proof else {
            return false;
        };
        proof.took += took;
        if proof.took <= PROOF / 2 {
            return false;
        }
        proof.arrived += arrived;
        proof.windows += 1;
        let failed = proof.arrived / f64::from(proof.windows) < proof.before * MARGIN;
        // Where no queue holds it up, more time would not make it better.
        if proof.took >= PROOF || (failed && !busy) {
            self.proof = None;
            return failed && self.raw_allowed;
        }
        false
    }

    fn choose(&mut self, now: Moment) {
        let Some(link) = self.link_rate() else { return };
        if self.raw_allowed && now < self.rest_until {
            return;
        }
        let raw = if self.raw_allowed { link } else { 0.0 };
        let worth = |candidate: &Candidate| {
            let cores = self.packers * self.share;
            let promise = (cores * candidate.speed).min(link * candidate.ratio);
            // Of ways that are about as fast, the one that leaves the link to others.
            let needed = if self.current == Some(candidate.effort) {
                raw
            } else {
                raw * MARGIN
            };
            (promise > needed).then(|| promise * candidate.ratio.powf(THRIFT))
        };
        // Whatever is chosen now is given up only for something clearly better.
        let current = self.current;
        let current = self.candidates.iter().find(|c| current == Some(c.effort));
        let (mut best, mut most) = match current.map(|current| (current.effort, worth(current))) {
            Some((effort, Some(worth))) => (Some(effort), worth),
            _ => (None, 0.0),
        };
        for candidate in &self.candidates {
            let worth = worth(candidate).unwrap_or(0.0);
            if worth > most * SWITCH_MARGIN {
                (best, most) = (Some(candidate.effort), worth);
            }
        }
        self.current = best.or(self.current.filter(|_| !self.raw_allowed));
    }

    /// What brings a few pages over soonest: packing, sending and unpacking happen one after the
    /// other then. Unpacking is taken to be three times as fast as packing.
    fn soonest(&self) -> Option<Effort> {
        let forced = self.current.filter(|_| !self.raw_allowed);
        let Some(link) = self.link_rate() else {
            return forced;
        };
        // What has not shown its worth on this guest is not tried now.
        let measured = self
            .candidates
            .iter()
            .filter(|candidate| candidate.trials > 0);
        let ways = measured.map(|candidate| {
            let cores = 4.0 / 3.0 / (candidate.speed * self.packers * self.share);
            (cores + 1.0 / (link * candidate.ratio), candidate.effort)
        });
        let best = ways.min_by(|(one, _), (other, _)| one.total_cmp(other));
        match best {
            Some((cost, effort)) if cost * MARGIN < 1.0 / link => Some(effort),
            _ => forced,
        }
    }

    fn link_rate(&self) -> Option<f64> {
        match (self.link, self.limit) {
            (Some(link), Some(limit)) => Some(link.min(limit)),
            (link, limit) => link.or(limit),
        }
    }
}

#[cfg(test)]
mod tests;
