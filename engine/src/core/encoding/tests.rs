//! The chooser in a world of one lane, one link and one target.
#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "simulated bytes are few and never negative"
)]

use std::time::Duration;

use super::*;

/// Where a simulated second goes.
#[derive(Clone, Copy)]
struct World {
    /// Bytes a second that the link carries.
    link: f64,
    /// Bytes of pages a second that the target places.
    target: f64,
    /// By how much slower cores are than usual.
    slow: f64,
    ratio: f64,
    /// The same for LZ4.
    lz4_ratio: f64,
}

impl World {
    fn ratio_of(&self, effort: Effort) -> f64 {
        match effort {
            Effort::Lz4 => self.lz4_ratio,
            Effort::Zstd(_) => self.ratio,
        }
    }
}

const GIGABIT: World = World {
    link: 118e6,
    target: 3e9,
    slow: 1.0,
    ratio: 4.0,
    lz4_ratio: 4.0,
};

const CHUNK: f64 = 512.0 * 1024.0;

/// What a sender can have on the way.
const QUEUE: f64 = 2.0 * 1024.0 * 1024.0;

struct Run {
    chooser: Chooser,
    now: f64,
    queued: f64,
    /// How much of the wire's bytes pages were, lately.
    density: f64,
    packed: u32,
    sent: u32,
}

impl Run {
    fn new(compression: Compression) -> Self {
        Self {
            chooser: Chooser::new(compression, 1, |_| true),
            now: 0.0,
            queued: 0.0,
            density: 1.0,
            packed: 0,
            sent: 0,
        }
    }

    fn pass(&mut self, seconds: f64, world: World) {
        self.now += seconds;
        let rate = world.link.min(world.target / self.density);
        self.queued = (self.queued - seconds * rate).max(0.0);
    }

    fn moment(&self) -> Moment {
        Moment(Duration::from_secs_f64(self.now))
    }

    /// One lane sends chunks for `seconds`; returns the bytes of pages a second.
    fn send(&mut self, seconds: f64, world: World) -> f64 {
        let (end, mut data) = (self.now + seconds, 0.0);
        (self.packed, self.sent) = (0, 0);
        while self.now < end {
            // To read it from guest RAM.
            self.pass(CHUNK / 6e9, world);
            let mut wire = CHUNK;
            match self.chooser.advise(self.moment(), Haste::Throughput) {
                Advice::Raw => {}
                Advice::Probe(effort) => self.pack(effort, PROBE_BYTES as f64, world),
                Advice::Pack(effort) if world.ratio > 1.0 => {
                    let queued = self.queued as u64;
                    let effort = self.chooser.relieve(effort, CHUNK as u64, queued);
                    self.pack(effort, CHUNK, world);
                    self.packed += 1;
                    wire = CHUNK / world.ratio_of(effort);
                }
                Advice::Pack(_) => self.pass(20e-6, world),
            }
            self.chooser.sending(
                self.moment(),
                Sending {
                    round: Round(1),
                    lane: 0,
                    data_bytes: CHUNK as u64,
                    wire_bytes: wire as u64,
                    queued: self.queued as u64,
                },
            );
            self.density += (CHUNK / wire - self.density) * 0.3;
            self.queued += wire;
            // The write returns when the rest fits into the queue, and costs a copy.
            let over = (self.queued - QUEUE).max(0.0);
            let rate = world.link.min(world.target / self.density);
            self.pass((over / rate).max(wire / 5e9), world);
            self.sent += 1;
            data += CHUNK;
        }
        data / (self.now - end + seconds)
    }

    fn pack(&mut self, effort: Effort, bytes: f64, world: World) {
        let usual = USUAL.iter().find(|c| c.effort == effort).unwrap();
        let took = bytes * world.slow / usual.speed;
        self.pass(took, world);
        self.chooser.tried(Trial {
            effort,
            before: bytes as u64,
            after: (bytes / world.ratio_of(effort)) as u64,
            cpu: Duration::from_secs_f64(took),
            took: Duration::from_secs_f64(took),
        });
    }
}

#[test]
fn a_slow_link_gets_packed_pages_soon() {
    let mut run = Run::new(Compression::Auto);
    run.send(0.1, GIGABIT);
    assert!(run.packed > 0);
    let rate = run.send(1.0, GIGABIT);
    assert!(rate > 350e6, "{rate}");
    assert_eq!(run.packed, run.sent);
}

#[test]
fn deltas_are_for_a_link_that_is_known_to_be_slow() {
    let mut run = Run::new(Compression::Auto);
    assert!(!run.chooser.is_slower_than_deltas(), "nobody knows yet");
    run.send(0.1, GIGABIT);
    assert!(run.chooser.is_slower_than_deltas());
    let fast = World {
        link: 2.5e9,
        ..GIGABIT
    };
    let mut run = Run::new(Compression::Auto);
    run.send(2.0, fast);
    assert!(!run.chooser.is_slower_than_deltas());
    // A limit says what the link is worth before a byte was sent.
    run.chooser.limit(Some(50_000_000));
    assert!(run.chooser.is_slower_than_deltas());
    run.chooser.limit(None);
    assert!(!run.chooser.is_slower_than_deltas());
    let mut none = Run::new(Compression::None);
    none.chooser.limit(Some(1_000_000));
    assert!(!none.chooser.is_slower_than_deltas());
}

#[test]
fn a_link_faster_than_the_cores_gets_them_raw() {
    let world = World {
        link: 2.5e9,
        ..GIGABIT
    };
    let mut run = Run::new(Compression::Auto);
    run.send(2.0, world);
    assert_eq!(run.packed, 0);
}

#[test]
fn a_slow_target_is_not_taken_for_a_slow_link() {
    let world = World {
        link: 2.5e9,
        target: 400e6,
        ..GIGABIT
    };
    let mut run = Run::new(Compression::Auto);
    let rate = run.send(4.0, world);
    assert!(rate > 0.95 * world.target, "{rate}");
    assert!(run.packed * 4 < run.sent, "{} {}", run.packed, run.sent);
}

#[test]
fn slow_cores_do_not_pack() {
    let world = World {
        slow: 10.0,
        ..GIGABIT
    };
    let mut run = Run::new(Compression::Auto);
    run.send(1.0, world);
    let rate = run.send(2.0, world);
    assert!(rate > 0.95 * world.link, "{rate}");
}

#[test]
fn what_does_not_become_smaller_costs_a_look() {
    let world = World {
        ratio: 1.0,
        ..GIGABIT
    };
    let mut run = Run::new(Compression::Auto);
    run.send(0.5, world);
    let rate = run.send(2.0, world);
    assert!(rate > 0.99 * world.link, "{rate}");
}

#[test]
fn follows_a_link_that_changes() {
    let mut run = Run::new(Compression::Auto);
    run.send(1.0, GIGABIT);
    assert!(run.packed * 2 > run.sent);
    let fast = World {
        link: 2.5e9,
        ..GIGABIT
    };
    run.send(10.0, fast);
    let rate = run.send(1.0, fast);
    assert!(rate > 1.5e9, "{rate}");
    run.send(1.0, GIGABIT);
    run.send(1.0, GIGABIT);
    assert!(run.packed * 2 > run.sent);
}

#[test]
fn a_very_slow_link_is_worth_a_higher_level() {
    let world = World {
        link: 5e6,
        ..GIGABIT
    };
    let mut run = Run::new(Compression::Zstd);
    run.send(2.0, world);
    assert_eq!(run.packed, run.sent);
    let Advice::Pack(Effort::Zstd(level)) = run.chooser.advise(run.moment(), Haste::Throughput)
    else {
        panic!("zstd was asked for");
    };
    assert!(level >= 1);
}

#[test]
fn the_settings_are_kept() {
    let mut none = Run::new(Compression::None);
    none.send(1.0, GIGABIT);
    assert_eq!(none.packed, 0);
    assert!(none.chooser.is_idle());
    let mut lz4 = Run::new(Compression::Lz4);
    lz4.send(
        1.0,
        World {
            link: 5e9,
            ..GIGABIT
        },
    );
    assert_eq!(lz4.packed, lz4.sent);
    let mut unable = Chooser::new(Compression::Zstd, 1, |_| false);
    assert_eq!(
        unable.advise(Moment::default(), Haste::Throughput),
        Advice::Raw
    );
}

#[test]
fn the_last_pages_are_packed_when_they_arrive_sooner_by_it() {
    let mut run = Run::new(Compression::Auto);
    assert_eq!(
        run.chooser.advise(run.moment(), Haste::Latency),
        Advice::Raw
    );
    run.send(1.0, GIGABIT);
    let advice = run.chooser.advise(run.moment(), Haste::Latency);
    assert!(matches!(advice, Advice::Pack(_)), "{advice:?}");
    let mut fast = Run::new(Compression::Auto);
    fast.send(
        1.0,
        World {
            link: 2.5e9,
            ..GIGABIT
        },
    );
    assert_eq!(
        fast.chooser.advise(fast.moment(), Haste::Latency),
        Advice::Raw
    );
}

#[test]
fn a_limit_is_as_good_as_a_slow_link() {
    let mut run = Run::new(Compression::Auto);
    run.chooser.limit(Some(50_000_000));
    run.send(
        0.1,
        World {
            link: 2.5e9,
            ..GIGABIT
        },
    );
    assert!(run.packed > 0);
}

/// Cores too slow for the one way and a link too slow for the other: both together bring more over
/// than either alone.
#[test]
fn cores_that_are_too_slow_are_relieved() {
    let world = World {
        slow: 1.5,
        lz4_ratio: 2.5,
        ratio: 4.5,
        ..GIGABIT
    };
    let alone = |compression| {
        let mut run = Run::new(compression);
        run.send(1.0, world);
        run.send(2.0, world)
    };
    let (auto, lz4) = (alone(Compression::Auto), alone(Compression::Lz4));
    let zstd = USUAL[1].speed / world.slow;
    assert!(auto > 1.05 * lz4, "{auto} of {lz4}");
    assert!(auto > 1.05 * zstd, "{auto} of {zstd}");
}

/// Each of several lanes has its part of the link, and of time.
#[test]
fn a_lane_among_others_has_more_time() {
    let queued = 256 << 10;
    let chunk = CHUNK as u64;
    let way = |others: usize| {
        let mut run = Run::new(Compression::Auto);
        run.send(1.0, GIGABIT);
        run.chooser.queued = vec![Some(queued); others];
        run.chooser.relieve(Effort::Zstd(6), chunk, queued)
    };
    let [alone, among_four] = [way(1), way(4)];
    let speed = |effort| {
        let found = USUAL.iter().find(|it| it.effort == effort);
        found.unwrap().speed
    };
    assert!(
        speed(among_four) < speed(alone),
        "{among_four:?}, {alone:?}"
    );
}

#[test]
fn what_does_not_become_smaller_relieves_nobody() {
    let mut run = Run::new(Compression::Auto);
    run.send(1.0, GIGABIT);
    let wanted = Effort::Zstd(3);
    for candidate in &mut run.chooser.candidates {
        if candidate.effort == Effort::Lz4 {
            candidate.ratio = 1.0;
        }
    }
    for queued in [0, QUEUE as u64] {
        let way = run.chooser.relieve(wanted, CHUNK as u64, queued);
        assert_ne!(way, Effort::Lz4, "with {queued} on the way");
    }
}

#[test]
fn a_limit_is_no_reason_for_more_bytes() {
    let mut run = Run::new(Compression::Auto);
    run.send(1.0, GIGABIT);
    let wanted = Effort::Zstd(3);
    let [dry, full] = [0, QUEUE as u64];
    let way = |run: &Run, queued| run.chooser.relieve(wanted, CHUNK as u64, queued);
    assert_eq!(way(&run, dry), Effort::Lz4);
    assert_eq!(way(&run, full), wanted);
    run.chooser.limit(Some(50_000_000));
    assert_eq!(way(&run, dry), wanted);
}
