//! Links that are cut, corrupted, stalled or slow, at any byte of any connection: the guest has one
//! owner, who has every page, and everybody knows.

use std::num::NonZeroU16;
use std::time::Duration;

use ferry_engine::core::message::{Outcome, Phase, Reason};
use ferry_engine::core::source::LanePlan;
use ferry_engine::job::{Job, StartError, TargetJob};
use ferry_engine::journal::JournalError;
use ferry_engine::vmm::RunState;
use ferry_stream::frame::{HEADER_BYTES, Header, Kind};
use ferry_testbed::toy::{
    At, Call, Change, Ended, Fault, Model, Pair, Proxy, Recorded, Rule, Scope, Shape, Way, What,
};
use tokio::time::timeout;

/// Longer than one move may take, whatever happens to it.
const BOUND: Duration = Duration::from_secs(30);

type Outcomes = Result<(), Box<dyn std::error::Error>>;

/// The control lane, and the first page lane.
const CONTROL: usize = 0;
const FIRST_LANE: usize = 1;

/// A guest that is quick to move.
fn small() -> Model {
    let shape = Shape {
        name: "ram",
        pages: 64,
        filled: 24,
        busy: 8,
    };
    Model {
        shapes: vec![shape],
        vcpus: 1,
        change: Change::Page,
        rate_pages_per_s: 500,
        early_bytes: 300,
        late_bytes: 100,
    }
}

struct Moved {
    pair: Pair,
    ended: Ended,
    recorded: Vec<Recorded>,
}

/// Moves a guest over a link with these rules.
async fn over(rules: Vec<Rule>) -> Moved {
    over_lanes(1, rules).await
}

async fn over_lanes(lanes: u16, rules: Vec<Rule>) -> Moved {
    let pair = Pair::new(&small()).unwrap();
    let (target, address) = pair.listening().await.unwrap();
    let target = target.start().await.unwrap();
    let proxy = Proxy::start(address, rules).await.unwrap();
    let lanes = NonZeroU16::new(lanes).unwrap();
    let source = pair
        .sending_to(proxy.address())
        .with_lanes(LanePlan::Fixed(lanes));
    let job = source.start().await.unwrap();
    let ended = ends(job, target).await;
    let recorded = proxy.recorded();
    Moved {
        pair,
        ended,
        recorded,
    }
}

/// Waits for both ends. A target that no source has reached would wait for ever, and rightly so.
async fn ends(job: Job, target: TargetJob) -> Ended {
    let both = async {
        let source = job.finish().await;
        if *target.phase().borrow() == Phase::Waiting {
            target.cancel();
        }
        let target = target.finish().await;
        Ended { source, target }
    };
    timeout(BOUND, both).await.expect("every wait is bounded")
}

fn rule(connection: usize, way: Way, at: usize, what: What) -> Rule {
    Rule {
        connection,
        way,
        at: At::Byte(at),
        what,
    }
}

/// A rule for the control lane, just before a message.
fn before(kind: Kind, way: Way, what: What) -> Rule {
    Rule {
        connection: CONTROL,
        way,
        at: At::Frame(kind),
        what,
    }
}

/// What must hold after a link went wrong: as [`Pair::check`], but a target that never heard of a
/// source may still wait, and one that a stranger reached has nothing to end.
fn check(moved: &Moved, rule: Rule) -> bool {
    let Moved { pair, ended, .. } = moved;
    match (&ended.source.outcome, &ended.target.outcome) {
        (Outcome::InDoubt { .. }, _) | (_, Outcome::InDoubt { .. }) => {
            panic!("{rule:?}: the target could be asked: {ended:?}")
        }
        _ => pair.check(ended),
    }
    matches!(ended.source.outcome, Outcome::Moved)
}

/// Offsets at which to try a stream of `bytes`: every frame's boundary, one byte into each and one
/// before its end, and `step` apart.
fn offsets(bytes: &[u8], step: usize) -> Vec<usize> {
    let mut at = 0;
    let mut offsets: Vec<usize> = (0..bytes.len()).step_by(step).collect();
    while let Some(header) = bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk::<HEADER_BYTES>())
    {
        let (header, _) = Header::parse(header).expect("the stream is clean");
        let end = at + HEADER_BYTES + header.length as usize;
        offsets.extend([
            at,
            at + 1,
            at + HEADER_BYTES - 1,
            at + HEADER_BYTES,
            end.saturating_sub(1),
        ]);
        at = end;
    }
    offsets.retain(|offset| *offset < bytes.len());
    offsets.sort_unstable();
    offsets.dedup();
    offsets
}

/// Runs one move for every offset, a few at a time.
async fn sweep(connection: usize, way: Way, step: usize, what: What) -> (usize, usize) {
    let clean = over(vec![]).await;
    assert!(
        matches!(clean.ended.source.outcome, Outcome::Moved),
        "{:?}",
        clean.ended
    );
    let stream = &clean.recorded[connection];
    let bytes = match way {
        Way::ToTarget => &stream.to_target,
        Way::ToSource => &stream.to_source,
    };
    let (mut moved, mut kept) = (0, 0);
    for offsets in offsets(bytes, step).chunks(8) {
        let mut runs = tokio::task::JoinSet::new();
        for at in offsets {
            let rule = rule(connection, way, *at, what);
            runs.spawn(async move { (over(vec![rule]).await, rule) });
        }
        while let Some(run) = runs.join_next().await {
            let (run, rule) = run.unwrap();
            if check(&run, rule) {
                moved += 1;
            } else {
                kept += 1;
            }
        }
    }
    (moved, kept)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_control_lane_is_cut_on_its_way_to_the_target() {
    let cut = What::Cut(Scope::Connection);
    let (moved, kept) = sweep(CONTROL, Way::ToTarget, 97, cut).await;
    assert!(kept > 20, "{moved} moved, {kept} kept");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_control_lane_is_cut_on_its_way_to_the_source() {
    let cut = What::Cut(Scope::Connection);
    let (moved, kept) = sweep(CONTROL, Way::ToSource, 29, cut).await;
    assert!(kept > 5 && moved > 1, "{moved} moved, {kept} kept");
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_is_cut_at_once() {
    let cut = What::Cut(Scope::Everything);
    let (moved, kept) = sweep(CONTROL, Way::ToSource, 61, cut).await;
    assert!(kept > 5 && moved > 1, "{moved} moved, {kept} kept");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_lane_is_cut() {
    let cut = What::Cut(Scope::Connection);
    let (moved, kept) = sweep(FIRST_LANE, Way::ToTarget, 4099, cut).await;
    assert!(kept > 5, "{moved} moved, {kept} kept");
    for at in [3, 70, 120] {
        let second = rule(FIRST_LANE + 1, Way::ToTarget, at, cut);
        check(&over_lanes(3, vec![second]).await, second);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_of_the_control_lane_are_corrupted() {
    let (moved, kept) = sweep(CONTROL, Way::ToTarget, 97, What::Corrupt).await;
    assert!(kept > 20, "{moved} moved, {kept} kept");
    let (moved, kept) = sweep(CONTROL, Way::ToSource, 29, What::Corrupt).await;
    assert!(kept > 5, "{moved} moved, {kept} kept");
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_of_a_page_lane_are_corrupted() {
    let (_, kept) = sweep(FIRST_LANE, Way::ToTarget, 4099, What::Corrupt).await;
    assert!(kept > 5, "{kept} kept");
    // The greeting is the first frame on it; the pages are what follows.
    let clean = over(vec![]).await;
    let at = clean.recorded[FIRST_LANE].to_target.len() / 2;
    let run = over(vec![rule(FIRST_LANE, Way::ToTarget, at, What::Corrupt)]).await;
    let Outcome::Kept { reason, .. } = &run.ended.target.outcome else {
        panic!("{:?}", run.ended);
    };
    assert!(
        matches!(reason, Reason::Failed(_)),
        "it is named: {reason:?}"
    );
    run.pair.check(&run.ended);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_that_stands_still_is_taken_for_lost() {
    let clean = over(vec![]).await;
    let control = &clean.recorded[CONTROL];
    for at in [0, 40, control.to_target.len() / 2] {
        let run = over(vec![rule(CONTROL, Way::ToTarget, at, What::Stall)]).await;
        assert!(!check(&run, rule(CONTROL, Way::ToTarget, at, What::Stall)));
    }
    for at in [0, 40, control.to_source.len() / 2] {
        let run = over(vec![rule(CONTROL, Way::ToSource, at, What::Stall)]).await;
        check(&run, rule(CONTROL, Way::ToSource, at, What::Stall));
    }
    // A page lane alone, with the control lane alive: no page moves.
    let at = clean.recorded[FIRST_LANE].to_target.len() / 2;
    let run = over(vec![rule(FIRST_LANE, Way::ToTarget, at, What::Stall)]).await;
    assert!(!check(
        &run,
        rule(FIRST_LANE, Way::ToTarget, at, What::Stall)
    ));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_save_into_a_link_that_stands_still_can_be_cancelled() -> Outcomes {
    let model = Model {
        late_bytes: 64 << 20,
        ..small()
    };
    let pair = Pair::new(&model)?;
    let (target, address) = pair.listening().await?;
    let target = target.start().await?;
    // Well within the late state, which is more than all buffers on the way hold.
    let stall = rule(CONTROL, Way::ToTarget, 1 << 20, What::Stall);
    let proxy = Proxy::start(address, vec![stall]).await?;
    let job = pair.sending_to(proxy.address()).start().await?;
    let ended = ends(job, target).await;
    assert!(
        matches!(ended.source.outcome, Outcome::Kept { .. }),
        "{ended:?}"
    );
    pair.check(&ended);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_link_is_only_slow() {
    let late = What::Delay(Duration::from_millis(5));
    let rules = [CONTROL, FIRST_LANE].into_iter().flat_map(|lane| {
        [
            rule(lane, Way::ToTarget, 0, late),
            rule(lane, Way::ToSource, 0, late),
        ]
    });
    let run = over(rules.collect()).await;
    assert!(
        matches!(run.ended.source.outcome, Outcome::Moved),
        "{:?}",
        run.ended
    );
    run.pair.check(&run.ended);
}

#[tokio::test(flavor = "multi_thread")]
async fn after_go_the_target_is_asked() -> Outcomes {
    // Go has arrived, its answer is lost: the target has the guest, and says so when asked.
    let answer_lost = before(Kind::Running, Way::ToSource, What::Cut(Scope::Everything));
    let run = over(vec![answer_lost]).await;
    assert!(check(&run, answer_lost), "{:?}", run.ended);
    assert_eq!(run.recorded.len(), 3, "control, a lane, and who asks");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_go_that_is_lost_is_void_once_the_target_was_asked() -> Outcomes {
    let pair = Pair::new(&small())?;
    let (target, address) = pair.listening().await?;
    let target = target.start().await?;
    let lost = before(Kind::Go, Way::ToTarget, What::Cut(Scope::Everything));
    let proxy = Proxy::start(address, vec![lost]).await?;
    let job = pair.sending_to(proxy.address()).start().await?;
    let ended = ends(job, target).await;
    let Outcome::Kept { reason, .. } = &ended.source.outcome else {
        panic!("{ended:?}");
    };
    assert!(matches!(reason, Reason::Refused), "{reason:?}");
    pair.check(&ended);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn who_cannot_ask_leaves_both_alone() -> Outcomes {
    let gone = before(Kind::Running, Way::ToSource, What::Cut(Scope::ForEver));
    let run = over(vec![gone]).await;
    let (pair, ended) = (&run.pair, &run.ended);
    assert!(
        matches!(ended.source.outcome, Outcome::InDoubt { .. }),
        "{ended:?}"
    );
    assert!(matches!(ended.target.outcome, Outcome::Moved), "{ended:?}");
    assert!(!pair.source.has_quit(), "a person may need it");
    assert_eq!(pair.source.state(), RunState::Paused);
    assert_eq!(pair.source.faults().count(Call::Resume), 0);
    assert_eq!(pair.journals()?, ["source.journal"]);
    let again = pair.sending_to("127.0.0.1:9".parse()?).start().await;
    let refused = matches!(
        again,
        Err(StartError::Journal(JournalError::InDoubt { .. }))
    );
    assert!(refused, "{again:?}");
    assert!(!pair.world.ran_twice());
    pair.check_ram(&pair.target);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_resumes_slowly_is_waited_for_after_a_cut() -> Outcomes {
    let pair = Pair::new(&small())?;
    let hang = Fault::Hang(Duration::from_millis(200));
    pair.target.faults().plan(Call::Resume, 1, hang);
    let (target, address) = pair.listening().await?;
    let target = target.start().await?;
    let mut phase = target.phase();
    let proxy = Proxy::start(address, vec![]).await?;
    let job = pair.sending_to(proxy.address()).start().await?;
    timeout(BOUND, phase.wait_for(|now| *now == Phase::Taking)).await??;
    proxy.cut(Scope::Everything);
    let ended = ends(job, target).await;
    assert!(matches!(ended.source.outcome, Outcome::Moved), "{ended:?}");
    pair.check(&ended);
    Ok(())
}
