//! Page lanes that die, hang and corrupt, at any byte and at any moment: the move goes on over the
//! others, and not a page is lost.

use std::num::{NonZeroU16, NonZeroU64};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ferry_engine::core::message::{Outcome, Phase, Reason};
use ferry_engine::core::meter::Progress;
use ferry_engine::core::outcome::in_full;
use ferry_engine::core::source::LanePlan;
use ferry_engine::job::{Job, TargetJob};
use ferry_engine::{Bandwidth, Compression};
use ferry_testbed::toy::{
    At, Call, Ended, Fault, Model, Pair, Proxy, Recorded, Rule, Scope, Shape, Until, Way, What,
};
use tokio::sync::watch;
use tokio::time::timeout;

/// Longer than one move may take, whatever happens to it.
const BOUND: Duration = Duration::from_secs(30);

/// Deaths in one move.
const DEATHS: u32 = 10;

/// Places of a stream at which its lane dies.
const PLACES: usize = 16;

type Outcomes = Result<(), Box<dyn std::error::Error>>;

/// The connections of the first two page lanes, in whichever order they came.
const LANES: [usize; 2] = [1, 2];

fn lanes(count: u16) -> LanePlan {
    LanePlan::Fixed(NonZeroU16::new(count).unwrap())
}

async fn ends(job: Job, target: TargetJob) -> Ended {
    let both = async {
        let (source, target) = tokio::join!(job.finish(), target.finish());
        Ended { source, target }
    };
    timeout(BOUND, both).await.expect("every wait is bounded")
}

async fn reaches(progress: &mut watch::Receiver<Progress>, what: impl Fn(&Progress) -> bool) {
    let reached = timeout(BOUND, progress.wait_for(|look| what(look))).await;
    drop(reached.expect("a bounded wait").expect("the move goes on"));
}

/// Moves a guest over two lanes, with these rules.
async fn over(rules: Vec<Rule>) -> (Pair, Ended, Vec<Recorded>) {
    let pair = Pair::new(&Model::default()).unwrap();
    let (target, address) = pair.listening().await.unwrap();
    let target = target.start().await.unwrap();
    let proxy = Proxy::start(address, rules).await.unwrap();
    let source = pair.sending_to(proxy.address()).with_lanes(lanes(2));
    let job = source.start().await.unwrap();
    let ended = ends(job, target).await;
    (pair, ended, proxy.recorded())
}

fn rule(connection: usize, at: usize, what: What) -> Rule {
    let way = Way::ToTarget;
    let at = At::Byte(at);
    Rule {
        connection,
        way,
        at,
        what,
    }
}

fn assert_moved(pair: &Pair, ended: &Ended) {
    let moved = matches!(ended.source.outcome, Outcome::Moved);
    assert!(moved, "{ended:?}");
    pair.check(ended);
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_lanes_die_in_one_move() -> Outcomes {
    let model = Model {
        rate_pages_per_s: 4000,
        ..Model::default()
    };
    let pair = Pair::new(&model)?;
    let (target, address) = pair.listening().await?;
    let target = target.start().await?;
    let proxy = Proxy::start(address, vec![]).await?;
    let stop = Arc::new(AtomicBool::new(false));
    let source = pair
        .sending_to(proxy.address())
        .with_lanes(lanes(3))
        .with_converge(Box::new(Until(Arc::clone(&stop))));
    let job = source.start().await?;
    let mut progress = job.progress();
    for death in 0..DEATHS {
        reaches(&mut progress, |look| look.lanes == 3 && look.round > 0).await;
        // The control lane, the lanes, and one more connection for each that died: the oldest that
        // stands, the newest, and the one between.
        proxy.kill(death as usize + 1);
        reaches(&mut progress, |look| look.lanes_lost == death + 1).await;
    }
    reaches(&mut progress, |look| look.lanes == 3).await;
    stop.store(true, Ordering::Release);
    let ended = ends(job, target).await;
    assert_moved(&pair, &ended);
    assert_eq!(ended.source.report.lanes_lost, DEATHS);
    assert_eq!(ended.source.report.lanes, 3);
    Ok(())
}

/// Lanes among which a bandwidth is shared.
const SHARING: u16 = 4;

/// What the guest has: 16 MiB, which take a second at this bandwidth.
const SHARED_PAGES: u64 = 4096;
const SHARED_BYTES_PER_S: NonZeroU64 = NonZeroU64::new(16 << 20).unwrap();

#[tokio::test(flavor = "multi_thread")]
async fn lanes_share_a_bandwidth_evenly() -> Outcomes {
    let shape = Shape {
        name: "dimm0",
        pages: 2 * SHARED_PAGES,
        filled: SHARED_PAGES,
        busy: 1,
    };
    let model = Model {
        shapes: vec![shape],
        rate_pages_per_s: 10,
        ..Model::default()
    };
    let pair = Pair::new(&model)?;
    let (target, address) = pair.listening().await?;
    let target = target.start().await?;
    let proxy = Proxy::start(address, vec![]).await?;
    let source = pair
        .sending_to(proxy.address())
        .with_lanes(lanes(SHARING))
        .with_compression(Compression::None)
        .with_bandwidth(Bandwidth::BytesPerSecond(SHARED_BYTES_PER_S));
    let ended = ends(source.start().await?, target).await;
    assert_moved(&pair, &ended);
    let recorded = proxy.recorded();
    let sent: Vec<usize> = (1..=usize::from(SHARING))
        .map(|lane| recorded[lane].to_target.len())
        .collect();
    // A quarter more or less: the lanes do not come at the same moment, and none splits a chunk.
    let share = sent.iter().sum::<usize>() / sent.len();
    for bytes in &sent {
        assert!(share.abs_diff(*bytes) <= share / 4, "{sent:?}");
    }
    assert!(share >= 3 << 20, "{sent:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lane_may_die_at_any_byte() {
    let (pair, ended, recorded) = over(vec![]).await;
    assert_moved(&pair, &ended);
    let mut died = 0;
    for lane in LANES {
        let length = recorded[lane].to_target.len();
        for place in 0..PLACES {
            let at = place * length / PLACES;
            let dies = rule(lane, at, What::Cut(Scope::Connection));
            let (pair, ended, _) = over(vec![dies]).await;
            assert_moved(&pair, &ended);
            died += ended.source.report.lanes_lost;
        }
    }
    // A stream may be shorter than the one that was measured; hardly every other time.
    assert!(died as usize >= PLACES, "{died}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lane_may_die_while_the_guest_stands() -> Outcomes {
    // While the state is saved, and before the last pages: whoever comes first notices.
    for (call, nth) in [(Call::Save, 1), (Call::Collect, 3)] {
        let pair = Pair::new(&Model::default())?;
        let hang = Fault::Hang(Duration::from_millis(100));
        pair.source.faults().plan(call, nth, hang);
        let (target, address) = pair.listening().await?;
        let target = target.start().await?;
        let proxy = Proxy::start(address, vec![]).await?;
        let source = pair.sending_to(proxy.address()).with_lanes(lanes(2));
        let job = source.start().await?;
        let mut progress = job.progress();
        reaches(&mut progress, |look| look.phase == Phase::Draining).await;
        proxy.kill(LANES[1]);
        let ended = ends(job, target).await;
        assert_moved(&pair, &ended);
        assert_eq!(ended.source.report.lanes_lost, 1, "{call:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lane_that_hangs_is_given_up() {
    let (_, _, recorded) = over(vec![]).await;
    for lane in LANES {
        let half = recorded[lane].to_target.len() / 2;
        for at in [0, 40, half] {
            let (pair, ended, _) = over(vec![rule(lane, at, What::Stall)]).await;
            assert_moved(&pair, &ended);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn all_lanes_dead_is_a_lost_link() -> Outcomes {
    let pair = Pair::new(&Model::default())?;
    let (target, address) = pair.listening().await?;
    let target = target.start().await?;
    let proxy = Proxy::start(address, vec![]).await?;
    let never = Arc::new(AtomicBool::new(false));
    let source = pair
        .sending_to(proxy.address())
        .with_lanes(lanes(2))
        .with_converge(Box::new(Until(never)));
    let job = source.start().await?;
    let mut progress = job.progress();
    reaches(&mut progress, |look| look.round > 1).await;
    for lane in LANES {
        proxy.kill(lane);
    }
    let ended = ends(job, target).await;
    let Outcome::Kept { reason, .. } = &ended.source.outcome else {
        panic!("{ended:?}");
    };
    assert!(matches!(reason, Reason::LinkLost { .. }), "{reason:?}");
    pair.check(&ended);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_bytes_on_any_lane_are_found_and_the_lane_is_named() {
    let (_, _, recorded) = over(vec![]).await;
    for lane in LANES {
        // Behind the greeting: a header, a table, data.
        let length = recorded[lane].to_target.len();
        for at in [200, 260, length / 2, length - 100] {
            let (pair, ended, recorded) = over(vec![rule(lane, at, What::Corrupt)]).await;
            if recorded[lane].to_target.len() <= at {
                // It never came to that byte: the other lane has taken nearly everything.
                continue;
            }
            let Outcome::Kept { reason, .. } = &ended.target.outcome else {
                panic!("at byte {at} of {lane}: {ended:?}");
            };
            let told = in_full(reason);
            assert!(told.contains("moving pages failed: page lane"), "{told}");
            pair.check(&ended);
        }
    }
}
