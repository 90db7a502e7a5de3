//! A toy guest that writes faster than the link carries, and is slowed until it can move.

use std::num::NonZeroU64;
use std::time::Duration;

use ferry_engine::core::message::{Notice, Outcome, Reason};
use ferry_engine::job::{Job, SourceBuilder, TargetJob};
use ferry_engine::{Bandwidth, Throttling};
use ferry_testbed::toy::{Call, Ended, Fault, Model, Pair, Shape};
use tokio::time::timeout;

/// Longer than any test here may take.
const BOUND: Duration = Duration::from_secs(30);

type Outcomes = Result<(), Box<dyn std::error::Error>>;

/// It dirties all of its 4 MiB in 50 ms, which the link carries in 100.
fn restless() -> Model {
    let shape = Shape {
        name: "dimm0",
        pages: 1024,
        filled: 1024,
        busy: 1000,
    };
    Model {
        shapes: vec![shape],
        rate_pages_per_s: 20_000,
        ..Model::default()
    }
}

fn slow(source: SourceBuilder) -> SourceBuilder {
    let rate = NonZeroU64::new(40 << 20).unwrap();
    source
        .with_bandwidth(Bandwidth::BytesPerSecond(rate))
        .with_downtime_limit(Duration::from_millis(20))
}

async fn begun(pair: &Pair, throttling: Throttling) -> (Job, TargetJob) {
    let (target, address) = pair.listening().await.unwrap();
    let target = target.start().await.unwrap();
    let source = slow(pair.sending_to(address)).with_auto_converge(throttling);
    (source.start().await.unwrap(), target)
}

/// Both ends, and what was told on the way.
async fn ends((mut job, target): (Job, TargetJob)) -> (Ended, Vec<Notice>) {
    let all = async {
        let mut notices = Vec::new();
        while let Some(notice) = job.notice().await {
            notices.push(notice);
        }
        let (source, target) = tokio::join!(job.finish(), target.finish());
        (Ended { source, target }, notices)
    };
    timeout(BOUND, all).await.expect("a toy moves in seconds")
}

/// Waits until the guest is slow by what its VMM says.
async fn slowed(job: &mut Job) {
    let told = async {
        while let Some(notice) = job.notice().await {
            if matches!(notice, Notice::Throttled(_)) {
                return;
            }
        }
        panic!("it is never slowed");
    };
    timeout(BOUND, told).await.expect("rounds do not shrink");
}

#[tokio::test(flavor = "multi_thread")]
async fn it_converges_once_it_is_slow_enough() -> Outcomes {
    let pair = Pair::new(&restless())?;
    let job = begun(&pair, Throttling::default()).await;
    let (ended, notices) = ends(job).await;
    assert!(matches!(ended.source.outcome, Outcome::Moved), "{ended:?}");
    pair.check(&ended);
    let steps: Vec<u8> = notices
        .iter()
        .filter_map(|notice| match notice {
            Notice::Throttled(percent) => Some(*percent),
            _ => None,
        })
        .collect();
    assert!(steps.is_sorted() && steps[0] >= 20, "{steps:?}");
    let report = &ended.source.report;
    assert_eq!(report.throttled_percent, 0);
    assert_eq!(Some(&report.throttled_percent_max), steps.last());
    // Each step, and once to give everything back.
    let calls = usize::try_from(pair.source.faults().count(Call::Throttle))?;
    assert_eq!(calls, steps.len() + 1);
    assert_eq!(pair.source.throttled_percent(), 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn it_is_not_slow_any_more_when_the_move_is_given_up() -> Outcomes {
    let pair = Pair::new(&restless())?;
    let (mut job, target) = begun(&pair, Throttling::default()).await;
    slowed(&mut job).await;
    assert!(pair.source.throttled_percent() >= 20);
    job.steering().cancel();
    let (ended, _) = ends((job, target)).await;
    let reason = reason(&ended);
    assert!(matches!(reason, Reason::Cancelled), "{reason:?}");
    // All of its time again is a part of that.
    pair.check(&ended);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn it_is_not_slow_any_more_when_it_is_suspended() -> Outcomes {
    let pair = Pair::new(&restless())?;
    let (mut job, target) = begun(&pair, Throttling::default()).await;
    slowed(&mut job).await;
    job.steering().suspend();
    let (ended, _) = ends((job, target)).await;
    assert!(matches!(ended.source.outcome, Outcome::Moved), "{ended:?}");
    pair.check(&ended);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vmm_that_cannot_slow_its_guest_keeps_it() -> Outcomes {
    for fault in [Fault::Refuse, Fault::Panic] {
        let pair = Pair::new(&restless())?;
        pair.source.faults().plan(Call::Throttle, 1, fault);
        let job = begun(&pair, Throttling::default()).await;
        let (ended, notices) = ends(job).await;
        let told = notices
            .iter()
            .filter(|notice| matches!(notice, Notice::NotThrottled { .. }));
        assert_eq!(told.count(), 1, "{notices:?}");
        let text = reason(&ended).to_string();
        assert!(text.starts_with("not converging"), "{text}");
        assert!(
            !text.contains("--auto-converge"),
            "it was asked for: {text}"
        );
        pair.check(&ended);
    }
    Ok(())
}

/// What could not be given back before the pause is by putting everything back.
#[tokio::test(flavor = "multi_thread")]
async fn time_that_could_not_be_given_back_is_in_the_end() -> Outcomes {
    let pair = Pair::new(&restless())?;
    // The second call undoes the first.
    pair.source.faults().plan(Call::Throttle, 2, Fault::Refuse);
    let (mut job, target) = begun(&pair, Throttling::default()).await;
    slowed(&mut job).await;
    job.steering().cancel();
    let (ended, _) = ends((job, target)).await;
    pair.check(&ended);
    Ok(())
}

fn reason(ended: &Ended) -> &Reason {
    match &ended.source.outcome {
        Outcome::Kept { reason, .. } => reason,
        outcome => panic!("{outcome:?}"),
    }
}
