//! Ten thousand worlds, and the proof that a broken one would be noticed.
//!
//! `FERRY_SIM_SEEDS` says how many seeds are tried, `FERRY_SIM_SEED` which one is replayed with a
//! trace of what happened.

use std::collections::BTreeMap;
use std::env;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use ferry_testbed::sim::{self, Ending, Flaw, Summary, Violation};

/// Seeds that are tried when nobody says how many.
const SEEDS: u64 = 10_000;

/// Lines of a trace that are shown of a world that failed.
const LAST_LINES: usize = 80;

fn number(name: &str) -> Option<u64> {
    let text = env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name} must be a number, not {text:?}")),
    )
}

/// Fails with the seed, what it broke, and the end of its story.
fn fail(seed: u64, violation: &Violation) -> ! {
    let (_, trace) = sim::trace(seed, None);
    let from = trace.len().saturating_sub(LAST_LINES);
    panic!(
        "seed {seed}: {violation}\n{}\nreplay: FERRY_SIM_SEED={seed} cargo test -p ferry-testbed --test sim",
        trace[from..].join("\n")
    );
}

/// Every seed below `seeds`, on all processors.
fn worlds(seeds: u64) -> Vec<Summary> {
    let next = AtomicU64::new(0);
    let work = || {
        let mut done = Vec::new();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds {
                return done;
            }
            match sim::run(seed, None) {
                Ok(summary) => done.push(summary),
                Err(violation) => fail(seed, &violation),
            }
        }
    };
    let threads = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let join = |worker: thread::ScopedJoinHandle<'_, Vec<Summary>>| {
            worker
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        workers.into_iter().flat_map(join).collect()
    })
}

#[test]
fn every_world_has_one_owner_and_loses_nothing() {
    if let Some(seed) = number("FERRY_SIM_SEED") {
        let (result, trace) = sim::trace(seed, None);
        println!("{}\n{result:?}", trace.join("\n"));
        assert!(result.is_ok(), "seed {seed}: {result:?}");
        return;
    }
    let seeds = number("FERRY_SIM_SEEDS").unwrap_or(SEEDS);
    let summaries = worlds(seeds);
    let mut endings = BTreeMap::new();
    let mut reasons = BTreeMap::new();
    for summary in &summaries {
        *endings
            .entry((summary.source, summary.target))
            .or_insert(0u64) += 1;
        *reasons
            .entry(summary.reason.unwrap_or("moved"))
            .or_insert(0u64) += 1;
    }
    let steps: u64 = summaries.iter().map(|summary| summary.steps).sum();
    println!("{seeds} worlds, {steps} steps: {endings:?}\n{reasons:?}");
    let moved = summaries
        .iter()
        .filter(|summary| summary.source == Ending::Moved);
    let survivors = moved.filter(|summary| summary.lanes_lost > 0).count() as u64;
    println!("{survivors} moved though they lost lanes");
    let sum = |count: fn(&Summary) -> u64| summaries.iter().map(count).sum::<u64>();
    let (deltas, mismatches) = (sum(|one| one.deltas), sum(|one| one.mismatches));
    let mended = summaries
        .iter()
        .filter(|one| one.source == Ending::Moved && one.mismatches > 0);
    let mended = mended.count() as u64;
    println!("{deltas} deltas, {mismatches} did not fit; {mended} moved all the same");
    let shared = sum(|one| one.shared);
    println!("{shared} pages taken from the source's RAM");
    let slowed = summaries.iter().filter(|one| one.throttled_percent > 0);
    let slowed_and_moved = slowed.clone().filter(|one| one.source == Ending::Moved);
    let (slowed, slowed_and_moved) = (slowed.count(), slowed_and_moved.count() as u64);
    println!("{slowed} guests were slowed, {slowed_and_moved} of them moved");
    if seeds >= SEEDS {
        assert!(
            shared > seeds,
            "hardly a page is taken from the source's RAM"
        );
        assert!(
            slowed_and_moved * 50 >= seeds,
            "hardly a guest that was slowed has moved"
        );
        assert!(deltas > seeds, "hardly a page is told as a delta");
        assert!(mended * 2000 >= seeds, "hardly a world had to mend a page");
        assert!(
            survivors * 100 >= seeds,
            "hardly a world moved without a lane"
        );
        covers_everything(&endings, &reasons, seeds);
    }
}

/// Worlds in which nothing gets far, or nothing goes wrong, would prove nothing.
fn covers_everything(
    endings: &BTreeMap<(Ending, Ending), u64>,
    reasons: &BTreeMap<&str, u64>,
    seeds: u64,
) {
    use Ending::{InDoubt, Kept, Moved};
    let share = |pair| endings.get(&pair).copied().unwrap_or(0) * 100 / seeds;
    assert!(share((Moved, Moved)) >= 20, "{endings:?}");
    assert!(share((Kept, Kept)) >= 20, "{endings:?}");
    for pair in [(InDoubt, Moved), (InDoubt, Kept), (InDoubt, InDoubt)] {
        assert!(endings.contains_key(&pair), "no world ended as {pair:?}");
    }
    for reason in [
        "cancelled",
        "link lost",
        "peer aborted",
        "protocol",
        "inventory changed",
        "guest gone",
        "guest shut down",
        "guest panicked",
        "guest I/O error",
        "foreign resume",
        "not converging",
        "timed out",
        "refused",
        "returned",
        "failed",
    ] {
        assert!(
            reasons.contains_key(reason),
            "no guest was kept because: {reason}"
        );
    }
}

/// The first violation that a flaw leads to, and how many seeds it took.
fn first_violation(flaw: Flaw) -> Option<(u64, Violation)> {
    (0..20_000).find_map(|seed| Some((seed, sim::run(seed, Some(flaw)).err()?)))
}

#[test]
fn every_flaw_is_noticed_for_what_it_is() {
    for flaw in Flaw::ALL {
        let Some((seed, violation)) = first_violation(flaw) else {
            panic!("{flaw:?} went unnoticed");
        };
        println!("{flaw:?}: seed {seed}: {violation}");
        let fits = match flaw {
            Flaw::ForgottenPage
            | Flaw::UnseenWrite
            | Flaw::EarlyLastCollection
            | Flaw::TargetNotBlank
            | Flaw::ZerosSkipped
            | Flaw::ForgottenChunk
            | Flaw::LeftOutForGood
            | Flaw::FramesClaimed
            | Flaw::MismatchUntold
            | Flaw::EndBeforeScan
            | Flaw::ReadBeforeWatched
            | Flaw::ReadBeforeScanned => matches!(violation, Violation::Pages { .. }),
            Flaw::EndBeforePages | Flaw::FencedInName => matches!(
                violation,
                Violation::Pages { .. } | Violation::PlacedAfterRun | Violation::UnfitDelta { .. }
            ),
            Flaw::BasesKept => matches!(violation, Violation::UnfitDelta { .. }),
            Flaw::PauseInName => matches!(
                violation,
                Violation::Pages { .. }
                    | Violation::Device { .. }
                    | Violation::TwoRun
                    | Violation::SourceRanAfterGo
            ),
            Flaw::GivenInName => matches!(violation, Violation::GoBeforeGiven { .. }),
            Flaw::TakenInName => matches!(
                violation,
                Violation::RanBeforeTaken { .. } | Violation::SaidBeforeWritten { .. }
            ),
            Flaw::RunUntold | Flaw::ImaginedGo => {
                matches!(violation, Violation::RanWithoutGo | Violation::TwoRun)
            }
            Flaw::RunAgain => matches!(violation, Violation::SourceRanAfterGo | Violation::TwoRun),
            Flaw::LostFact => matches!(violation, Violation::Stuck { .. }),
            Flaw::LiftInName => matches!(violation, Violation::PausedSlow),
            Flaw::LeftSlow => matches!(violation, Violation::LeftSlow { .. }),
            Flaw::LeftBehind => matches!(violation, Violation::LeftBehind { .. }),
        };
        assert!(fits, "{flaw:?} was noticed as: {violation}");
    }
}

#[test]
fn a_seed_makes_the_same_world_twice() {
    for seed in 0..50 {
        assert_eq!(sim::run(seed, None), sim::run(seed, None));
    }
}
