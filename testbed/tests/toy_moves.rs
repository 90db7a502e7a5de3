//! Moves of the toy guest that succeed, and what they cost.

use std::num::{NonZeroU16, NonZeroU64};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ferry_engine::Bandwidth;
use ferry_engine::core::converge::{Converge, Verdict, View};
use ferry_engine::core::message::{Notice, Outcome, Phase, Reason};
use ferry_engine::core::source::LanePlan;
use ferry_engine::job::{Job, Retire, SourceBuilder, TargetJob};
use ferry_engine::link::local;
use ferry_engine::message::Mode;
use ferry_engine::vmm::RunState;
use ferry_testbed::toy::{Call, Ended, Model, Pair, Shape};
use ferry_testbed::{TestbedError, wait_until};
use tokio::time::timeout;

/// Longer than any test here may take.
const BOUND: Duration = Duration::from_secs(30);

type Outcomes = Result<(), Box<dyn std::error::Error>>;

/// Waits for both ends.
async fn ends(job: Job, target: TargetJob) -> Ended {
    let both = async { tokio::join!(job.finish(), target.finish()) };
    let (source, target) = timeout(BOUND, both)
        .await
        .expect("a toy moves in milliseconds");
    Ended { source, target }
}

/// A move over TCP, set up by `set_up`.
async fn moved(pair: &Pair, set_up: impl FnOnce(SourceBuilder) -> SourceBuilder) -> Ended {
    let (target, address) = pair.listening().await.unwrap();
    let target = target.start().await.unwrap();
    let job = set_up(pair.sending_to(address)).start().await.unwrap();
    ends(job, target).await
}

fn wait_for_writes(pair: &Pair, more: u64) -> Result<u64, TestbedError> {
    let from = pair.world.writes();
    wait_until("the guest to go on", BOUND, || {
        let done = pair.world.writes() - from;
        (done >= more).then_some(done)
    })
}

fn rate(bytes_per_s: u64) -> Bandwidth {
    Bandwidth::BytesPerSecond(NonZeroU64::new(bytes_per_s).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_live_guest_moves_and_goes_on() -> Outcomes {
    let pair = Pair::new(&Model::default())?;
    wait_for_writes(&pair, 20)?;
    let ended = moved(&pair, |source| source).await;
    wait_for_writes(&pair, 200)?;
    pair.check(&ended);
    assert!(matches!(ended.source.outcome, Outcome::Moved), "{ended:?}");
    assert_eq!(pair.target.faults().count(Call::Resume), 1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn it_moves_over_any_number_of_lanes_and_both_links() -> Outcomes {
    for lanes in [1, 2, 4, 40] {
        let pair = Pair::new(&Model::default())?;
        let lanes = NonZeroU16::new(lanes).unwrap();
        let ended = moved(&pair, |source| source.with_lanes(LanePlan::Fixed(lanes))).await;
        wait_for_writes(&pair, 50)?;
        pair.check(&ended);
        assert!(
            matches!(ended.source.outcome, Outcome::Moved),
            "{lanes} lanes: {ended:?}"
        );

        let pair = Pair::new(&Model::default())?;
        let (connector, acceptor) = local();
        let target = pair.receiving(Box::new(acceptor)).start().await?;
        let source = pair
            .sending(Arc::new(connector))
            .with_lanes(LanePlan::Fixed(lanes));
        let ended = ends(source.start().await?, target).await;
        pair.check(&ended);
        assert!(
            matches!(ended.source.outcome, Outcome::Moved),
            "{lanes} lanes: {ended:?}"
        );
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_move_without_live_copies_a_guest_that_stands() -> Outcomes {
    let model = Model::default();
    let pair = Pair::new(&model)?;
    let ended = moved(&pair, |source| source.with_mode(Mode::Paused)).await;
    wait_for_writes(&pair, 50)?;
    pair.check(&ended);
    let report = ended.source.report;
    let (total, downtime) = (report.total, report.downtime.unwrap());
    let copied: Duration = report.rounds.iter().map(|round| round.took).sum();
    assert!(
        downtime >= copied && downtime <= total,
        "{downtime:?} of {total:?}"
    );
    let later: u64 = report.rounds[1..].iter().map(|round| round.pages).sum();
    // It stands before the first round. Until then each vCPU writes a page every millisecond, also after
    // the first look; one may be under way, and the save writes a page.
    let setup_ms = u64::try_from(report.setup.as_millis()).unwrap();
    let most = (setup_ms + 1) * model.vcpus as u64 + 1;
    assert!(
        later <= most,
        "a guest that stands writes nothing: {report:?}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn it_can_be_left_paused_and_a_paused_guest_stays_so() -> Outcomes {
    let suspended = Pair::new(&Model::default())?;
    let ended = moved(&suspended, |source| {
        source.with_run_at_target(RunState::Paused)
    })
    .await;
    assert!(matches!(ended.target.outcome, Outcome::Moved), "{ended:?}");
    assert_eq!(suspended.target.faults().count(Call::Resume), 0);
    suspended.check_ram(&suspended.target);

    let paused = Pair::new(&Model::default())?;
    paused.source.pause();
    let ended = moved(&paused, |source| source).await;
    assert!(matches!(ended.target.outcome, Outcome::Moved), "{ended:?}");
    assert_eq!(paused.target.state(), RunState::Paused);
    paused.check_ram(&paused.target);

    let woken = Pair::new(&Model::default())?;
    woken.source.pause();
    let ended = moved(&woken, |source| {
        source.with_run_at_target(RunState::Running)
    })
    .await;
    woken.check(&ended);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_can_be_left_stopped_and_never_moves_again() -> Outcomes {
    let pair = Pair::new(&Model::default())?;
    let ended = moved(&pair, |source| source.with_retire(Retire::LeaveStopped)).await;
    assert!(matches!(ended.source.outcome, Outcome::Moved), "{ended:?}");
    assert!(!pair.source.has_quit());
    assert_eq!(pair.source.state(), RunState::Paused);
    assert!(pair.source.is_clean(), "settings are put back");
    let again = pair.sending_to("127.0.0.1:9".parse()?).start().await;
    let error = again.expect_err("the guest lives elsewhere").to_string();
    assert!(
        error.contains("given away by an earlier migration"),
        "{error}"
    );
    pair.check_ram(&pair.target);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_report_adds_up() -> Outcomes {
    let model = Model {
        rate_pages_per_s: 2000,
        ..Model::default()
    };
    let pair = Pair::new(&model)?;
    let ended = moved(&pair, |source| source.with_bandwidth(rate(20 << 20))).await;
    pair.check(&ended);
    let report = &ended.source.report;
    let rounds = &report.rounds;
    let numbers: Vec<u32> = rounds.iter().map(|round| round.round.0).collect();
    let in_order: Vec<u32> = (1..).take(rounds.len()).collect();
    assert_eq!(numbers, in_order);
    assert!(
        rounds.len() >= 3,
        "a copy, what was dirty, and what the save wrote: {rounds:?}"
    );
    // 256 pages are filled; the busy pages and the device's are the others that may hold something.
    assert!((240..=275).contains(&rounds[0].pages), "{:?}", rounds[0]);
    assert!(
        rounds[1].pages > 0,
        "2000 page writes a second leave something dirty"
    );
    let lanes: u64 = rounds.iter().map(|round| round.bytes).sum();
    assert!(report.bytes_wire > lanes, "device state travels as well");
    let pages: u64 = rounds.iter().map(|round| round.pages).sum();
    assert!(lanes > (pages - report.zero_pages) * 4096, "{report:?}");
    let took: Duration = rounds.iter().map(|round| round.took).sum();
    assert!(report.setup + took <= report.total, "{report:?}");
    assert!(report.downtime.unwrap() < report.total);
    let blackout = report.blackout.unwrap();
    assert_eq!(Some(blackout.total()), report.downtime);
    // A scan costs nothing of its own when the lanes had something to send all the while.
    let beyond_doubt = [blackout.state_load, blackout.resume];
    assert!(
        beyond_doubt.iter().all(|part| !part.is_zero()),
        "{blackout:?}"
    );
    assert!(report.throughput_bytes_per_s() > 0);
    assert!(report.dirty_bytes_per_s() > 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn zeros_cost_nothing_in_the_first_round() -> Outcomes {
    let shape = Shape {
        name: "ram",
        pages: 4096,
        filled: 0,
        busy: 0,
    };
    let model = Model {
        shapes: vec![shape],
        rate_pages_per_s: 0,
        ..Model::default()
    };
    let pair = Pair::new(&model)?;
    let ended = moved(&pair, |source| source).await;
    pair.check(&ended);
    let report = &ended.source.report;
    assert_eq!(report.rounds[0].pages, 0);
    assert!(
        report.rounds[0].bytes < 100,
        "an end of round and no more: {report:?}"
    );
    let device_page: u64 = report.rounds.iter().map(|round| round.pages).sum();
    assert_eq!(device_page, 1, "what the save wrote");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn progress_is_seen_while_it_moves() -> Outcomes {
    let pair = Pair::new(&Model::default())?;
    let (target, address) = pair.listening().await?;
    let target = target.start().await?;
    let source = pair.sending_to(address).with_bandwidth(rate(2 << 20));
    let job = source.start().await?;
    let mut progress = job.progress();
    let seen = timeout(BOUND, async {
        progress
            .wait_for(|now| {
                now.phase == Phase::Copying && now.done_bytes > 0 && now.percent() < 100
            })
            .await
            .map(|seen| seen.clone())
    });
    let seen = seen.await??;
    assert_eq!(seen.round, 1);
    assert!(seen.bytes_wire > 0);
    assert!(seen.remaining_bytes > 0);
    assert!(seen.left.is_some());
    let ended = ends(job, target).await;
    pair.check(&ended);
    assert_eq!(
        progress.borrow().phase,
        Phase::Ended,
        "the last look is the end"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bandwidth_is_kept_and_can_be_changed() -> Outcomes {
    // 256 filled pages are 1 MiB: half a second at 2 MiB/s.
    let model = Model {
        rate_pages_per_s: 0,
        ..Model::default()
    };
    let pair = Pair::new(&model)?;
    let ended = moved(&pair, |source| source.with_bandwidth(rate(2 << 20))).await;
    pair.check(&ended);
    let first = &ended.source.report.rounds[0];
    // The last chunk is not waited for, and 10 ms may be saved up.
    let paid = first.bytes - 128 * 4096;
    let least = Duration::from_micros(paid * 1_000_000 / (2 << 20));
    assert!(first.took + Duration::from_millis(20) >= least, "{first:?}");

    let pair = Pair::new(&model)?;
    let (target, address) = pair.listening().await?;
    let target = target.start().await?;
    let began = Instant::now();
    // Ten minutes and more, if nobody changed it.
    let job = pair
        .sending_to(address)
        .with_bandwidth(rate(1 << 10))
        .start()
        .await?;
    let mut progress = job.progress();
    timeout(BOUND, progress.wait_for(|now| now.bytes_wire > 0)).await??;
    job.steering().set_bandwidth(rate(100 << 20));
    let ended = ends(job, target).await;
    pair.check(&ended);
    assert!(began.elapsed() < BOUND);
    Ok(())
}

/// Stops after so many collections.
struct After(u32);

impl Converge for After {
    fn decide(&mut self, _: &View<'_>) -> Verdict {
        self.0 = self.0.saturating_sub(1);
        match self.0 {
            0 => Verdict::Stop,
            _ => Verdict::Continue,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_rewritten_all_the_time_waits_and_is_not_forgotten() -> Outcomes {
    let shape = Shape {
        name: "ram",
        pages: 1024,
        filled: 512,
        busy: 4,
    };
    let model = Model {
        shapes: vec![shape],
        rate_pages_per_s: 20_000,
        ..Model::default()
    };
    let pair = Pair::new(&model)?;
    // A round of one page takes 2 ms, in which each of four pages is written ten times, unless the
    // guest gets no core for so long: in some of many rounds it does.
    let paced = |source: SourceBuilder| source.with_bandwidth(rate(2 << 20));
    let ended = moved(&pair, |source| {
        paced(source).with_converge(Box::new(After(200)))
    })
    .await;
    wait_for_writes(&pair, 200)?;
    pair.check(&ended);
    let report = &ended.source.report;
    assert!(matches!(ended.source.outcome, Outcome::Moved), "{ended:?}");
    assert!(report.held_pages >= 8, "{report:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_round_may_use_the_whole_link() -> Outcomes {
    let shape = Shape {
        name: "ram",
        pages: 2048,
        filled: 1024,
        busy: 1000,
    };
    let model = Model {
        shapes: vec![shape],
        rate_pages_per_s: 20_000,
        ..Model::default()
    };
    let pair = Pair::new(&model)?;
    // Round after round leaves most of 1000 pages dirty: half a second's worth.
    let ended = moved(&pair, |source| {
        source
            .with_bandwidth(rate(8 << 20))
            .with_converge(Box::new(After(2)))
    })
    .await;
    pair.check(&ended);
    let report = &ended.source.report;
    let last: u64 = report.rounds[2..].iter().map(|round| round.bytes).sum();
    let paced = Duration::from_micros(last * 1_000_000 / (8 << 20));
    assert!(paced > Duration::from_millis(200), "{report:?}");
    assert!(report.downtime.unwrap() < paced / 2, "{report:?}");
    let first = &report.rounds[0];
    let least = Duration::from_micros(first.bytes * 1_000_000 / (8 << 20));
    assert!(
        first.took > least * 7 / 10,
        "the first round is paced: {first:?}"
    );
    Ok(())
}

/// A guest that dirties faster than the link carries.
fn restless() -> Model {
    let shape = Shape {
        name: "ram",
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

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_does_not_converge_is_kept() -> Outcomes {
    let pair = Pair::new(&restless())?;
    let ended = moved(&pair, |source| {
        source
            .with_bandwidth(rate(40 << 20))
            .with_downtime_limit(Duration::from_millis(20))
    })
    .await;
    wait_for_writes(&pair, 100)?;
    pair.check(&ended);
    let Outcome::Kept { reason, .. } = &ended.source.outcome else {
        panic!("{ended:?}");
    };
    assert!(matches!(reason, Reason::NotConverging { .. }), "{reason:?}");
    assert_eq!(pair.source.faults().count(Call::Pause), 0, "it never stood");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn past_its_timeout_it_is_suspended_and_moves() -> Outcomes {
    let pair = Pair::new(&restless())?;
    let (target, address) = pair.listening().await?;
    let target = target.start().await?;
    let source = pair
        .sending_to(address)
        .with_bandwidth(rate(40 << 20))
        .with_downtime_limit(Duration::from_millis(20))
        .with_timeout(Duration::from_millis(700));
    let mut job = source.start().await?;
    let told = timeout(BOUND, async {
        while let Some(notice) = job.notice().await {
            if notice == Notice::TimeoutSuspends {
                return true;
            }
        }
        false
    });
    assert!(told.await?, "the user is told");
    let ended = ends(job, target).await;
    pair.check(&ended);
    assert!(matches!(ended.source.outcome, Outcome::Moved), "{ended:?}");
    // Pages of a round of 100 ms are written again before their turn comes; they are whole all the same.
    assert!(ended.source.report.fresh_pages > 0, "{ended:?}");
    assert!(ended.source.report.total >= Duration::from_millis(700));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_person_can_suspend_it_at_any_time() -> Outcomes {
    let pair = Pair::new(&restless())?;
    let (target, address) = pair.listening().await?;
    let target = target.start().await?;
    let source = pair.sending_to(address).with_bandwidth(rate(40 << 20));
    let job = source.with_downtime_limit(Duration::ZERO).start().await?;
    let mut progress = job.progress();
    timeout(BOUND, progress.wait_for(|now| now.round >= 2)).await??;
    job.steering().suspend();
    let ended = ends(job, target).await;
    pair.check(&ended);
    assert!(matches!(ended.source.outcome, Outcome::Moved), "{ended:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_downtime_limit_is_kept_and_can_be_raised() -> Outcomes {
    // 2000 pages a second are 8 MB/s, against 40 MiB/s of link: it converges.
    let model = Model {
        rate_pages_per_s: 2000,
        ..restless()
    };
    let pair = Pair::new(&model)?;
    let limit = Duration::from_millis(100);
    let ended = moved(&pair, |source| {
        source
            .with_bandwidth(rate(40 << 20))
            .with_downtime_limit(limit)
    })
    .await;
    pair.check(&ended);
    assert!(matches!(ended.source.outcome, Outcome::Moved), "{ended:?}");
    let downtime = ended.source.report.downtime.unwrap();
    // The host that runs the tests may be busy; the prediction is not to blame for that.
    assert!(downtime < 3 * limit, "{downtime:?}");

    let pair = Pair::new(&restless())?;
    let (target, address) = pair.listening().await?;
    let target = target.start().await?;
    let source = pair.sending_to(address).with_bandwidth(rate(40 << 20));
    let job = source.with_downtime_limit(Duration::ZERO).start().await?;
    let mut progress = job.progress();
    timeout(BOUND, progress.wait_for(|now| now.round >= 2)).await??;
    job.steering().set_downtime_limit(Duration::from_secs(10));
    let ended = ends(job, target).await;
    pair.check(&ended);
    assert!(matches!(ended.source.outcome, Outcome::Moved), "{ended:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn large_device_state_travels_early_and_late() -> Outcomes {
    let model = Model {
        early_bytes: 20 << 20,
        late_bytes: 6 << 20,
        ..Model::default()
    };
    let pair = Pair::new(&model)?;
    let ended = moved(&pair, |source| source).await;
    pair.check(&ended);
    assert!(matches!(ended.source.outcome, Outcome::Moved), "{ended:?}");
    assert!(ended.source.report.bytes_wire > 26 << 20);
    Ok(())
}
