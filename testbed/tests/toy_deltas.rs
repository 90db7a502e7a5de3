//! Pages told by how they differ from what was sent before: far fewer bytes on a slow link, and not a
//! page lost, whatever becomes of a lane or of what the target has.

use std::num::{NonZeroU16, NonZeroU64};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ferry_engine::Bandwidth;
use ferry_engine::core::encoding::Compression;
use ferry_engine::core::message::{Notice, Outcome};
use ferry_engine::core::meter::{Progress, Report};
use ferry_engine::core::source::LanePlan;
use ferry_engine::job::{Job, SourceBuilder, TargetJob};
use ferry_testbed::toy::{Change, Ended, Model, Pair, Proxy, Shape, Until};
use ferry_testbed::wait_until;
use tokio::sync::watch;
use tokio::time::timeout;

/// Longer than one move may take, whatever happens to it.
const BOUND: Duration = Duration::from_secs(60);

/// Pages that the guest writes in turn.
const BUSY: u64 = 512;

/// Bytes a second: a round of all busy pages takes an eighth of a second.
const RATE: u64 = 16 << 20;

type Outcomes = Result<(), Box<dyn std::error::Error>>;

/// A guest that changes a word in each of its pages, one after the other.
fn counting() -> Model {
    let shape = Shape {
        name: "dimm0",
        pages: 2048,
        filled: 1024,
        busy: BUSY,
    };
    Model {
        shapes: vec![shape],
        change: Change::Word,
        rate_pages_per_s: 4000,
        ..Model::default()
    }
}

fn paced(source: SourceBuilder, stop: &Arc<AtomicBool>) -> SourceBuilder {
    let rate = NonZeroU64::new(RATE).expect("it is not zero");
    source
        .with_bandwidth(Bandwidth::BytesPerSecond(rate))
        .with_converge(Box::new(Until(Arc::clone(stop))))
}

async fn reaches(progress: &mut watch::Receiver<Progress>, what: impl Fn(&Progress) -> bool) {
    let reached = timeout(BOUND, progress.wait_for(|look| what(look))).await;
    drop(reached.expect("a bounded wait").expect("the move goes on"));
}

async fn ends(job: Job, target: TargetJob) -> Ended {
    let both = async {
        let (source, target) = tokio::join!(job.finish(), target.finish());
        Ended { source, target }
    };
    timeout(BOUND, both).await.expect("every wait is bounded")
}

fn assert_moved(pair: &Pair, ended: &Ended) {
    let moved = matches!(ended.source.outcome, Outcome::Moved);
    assert!(moved, "{ended:?}");
    pair.check(ended);
}

/// Waits until the guest has written each of its pages so many times more.
fn wait_for_turns(pair: &Pair, turns: u64) -> Outcomes {
    let enough = pair.world.writes() + turns * BUSY;
    wait_until("the guest writes its pages", BOUND, || {
        (pair.world.writes() >= enough).then_some(())
    })?;
    Ok(())
}

/// Moves a counting guest after a good many rounds.
async fn report_of(compression: Compression) -> Result<Report, Box<dyn std::error::Error>> {
    let pair = Pair::new(&counting())?;
    let (target, address) = pair.listening().await?;
    let target = target.start().await?;
    let stop = Arc::new(AtomicBool::new(false));
    let source = paced(pair.sending_to(address), &stop).with_compression(compression);
    let job = source.start().await?;
    reaches(&mut job.progress(), |look| look.round >= 8).await;
    stop.store(true, Ordering::Release);
    let ended = ends(job, target).await;
    assert_moved(&pair, &ended);
    Ok(ended.source.report)
}

/// Pages and bytes of the third round and of those after it.
fn of_later_rounds(report: &Report) -> (u64, u64) {
    let later = report.rounds.iter().skip(2);
    later.fold((0, 0), |(pages, bytes), round| {
        (pages + round.pages, bytes + round.bytes)
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_word_for_each_page_is_little_on_the_wire() -> Outcomes {
    let report = report_of(Compression::Auto).await?;
    let (pages, bytes) = of_later_rounds(&report);
    println!("{pages} pages in {bytes} bytes: {:?}", report.encoding);
    assert!(bytes * 2 < pages * 4096, "{pages} pages, {bytes} bytes");
    let totals = report.encoding;
    assert!(totals.delta_pages * 2 > pages, "{totals:?}");
    let whole = totals.delta_pages * 4096;
    assert!(totals.delta_saved_bytes * 20 > whole * 19, "{totals:?}");

    let report = report_of(Compression::None).await?;
    let (pages, bytes) = of_later_rounds(&report);
    assert!(bytes > pages * 4000, "{pages} pages, {bytes} bytes");
    assert_eq!(report.encoding.delta_pages, 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn lanes_die_and_what_they_took_is_not_relied_on() -> Outcomes {
    let pair = Pair::new(&counting())?;
    let (target, address) = pair.listening().await?;
    let target = target.start().await?;
    let proxy = Proxy::start(address, vec![]).await?;
    let stop = Arc::new(AtomicBool::new(false));
    let lanes = LanePlan::Fixed(NonZeroU16::new(3).expect("it is not zero"));
    let source = paced(pair.sending_to(proxy.address()), &stop).with_lanes(lanes);
    let mut job = source.start().await?;
    let mut progress = job.progress();
    for death in 0..4 {
        let round = progress.borrow().round;
        reaches(&mut progress, |look| {
            look.lanes == 3 && look.round >= round + 3
        })
        .await;
        proxy.kill(death as usize + 1);
        reaches(&mut progress, |look| look.lanes_lost == death + 1).await;
    }
    wait_for_turns(&pair, 2)?;
    stop.store(true, Ordering::Release);
    let notices = all_notices(&mut job).await;
    let ended = ends(job, target).await;
    assert_moved(&pair, &ended);
    assert!(ended.source.report.encoding.delta_pages > 0, "{ended:?}");
    let unfit = |notice: &Notice| matches!(notice, Notice::Mismatch { .. });
    assert!(!notices.iter().any(unfit), "{notices:?}");
    Ok(())
}

/// What the user is told up to the end.
async fn all_notices(job: &mut Job) -> Vec<Notice> {
    let told = async {
        let mut notices = Vec::new();
        while let Some(notice) = job.notice().await {
            notices.push(notice);
        }
        notices
    };
    timeout(BOUND, told).await.expect("every wait is bounded")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_that_is_not_what_was_sent_is_sent_whole() -> Outcomes {
    let pair = Pair::new(&counting())?;
    let (target, address) = pair.listening().await?;
    let target = target.start().await?;
    let stop = Arc::new(AtomicBool::new(false));
    let mut job = paced(pair.sending_to(address), &stop).start().await?;
    reaches(&mut job.progress(), |look| look.round >= 5).await;
    pair.target.spoil(0, 7);
    wait_for_turns(&pair, 3)?;
    stop.store(true, Ordering::Release);
    let notices = all_notices(&mut job).await;
    let ended = ends(job, target).await;
    assert_moved(&pair, &ended);
    let unfit = |notice: &&Notice| matches!(notice, Notice::Mismatch { page, .. } if page.0 == 7);
    assert_eq!(notices.iter().filter(unfit).count(), 1, "{notices:?}");
    Ok(())
}
