//! What happens to the guest while it moves, and people who change their minds.

use std::num::NonZeroU64;
use std::time::Duration;

use ferry_engine::Bandwidth;
use ferry_engine::core::message::{Outcome, Phase, Reason};
use ferry_engine::job::{Job, TargetJob};
use ferry_engine::vmm::{GuestEvent, RunState};
use ferry_testbed::toy::{Call, Ended, Fault, Model, Pair};
use tokio::time::timeout;

/// Longer than any test here may take.
const BOUND: Duration = Duration::from_secs(30);

type Outcomes = Result<(), Box<dyn std::error::Error>>;

async fn ends(job: Job, target: TargetJob) -> Ended {
    let both = async { tokio::join!(job.finish(), target.finish()) };
    let (source, target) = timeout(BOUND, both)
        .await
        .expect("a toy moves in milliseconds");
    Ended { source, target }
}

/// A move that takes a second, so that something can happen meanwhile, once it has come to `phase`.
async fn interrupted(pair: &Pair, phase: Phase, interrupt: impl FnOnce(&Job)) -> Ended {
    let (target, address) = pair.listening().await.unwrap();
    let target = target.start().await.unwrap();
    let source = pair.sending_to(address).with_bandwidth(slow());
    let job = source.start().await.unwrap();
    let mut progress = job.progress();
    let come = timeout(BOUND, progress.wait_for(|now| now.phase == phase));
    come.await
        .expect("every phase comes")
        .expect("the driver lives");
    interrupt(&job);
    // What was to happen has happened: no guest is so restless that it does not converge now.
    job.steering().set_bandwidth(Bandwidth::Unlimited);
    ends(job, target).await
}

/// A guest that writes nothing, so that a slow link is no reason to keep it.
fn calm() -> Model {
    Model {
        rate_pages_per_s: 0,
        ..Model::default()
    }
}

fn slow() -> Bandwidth {
    Bandwidth::BytesPerSecond(NonZeroU64::new(1 << 20).unwrap())
}

fn reason(outcome: &Outcome) -> &Reason {
    match outcome {
        Outcome::Kept { reason, .. } | Outcome::InDoubt { reason } => reason,
        outcome => panic!("{outcome:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn it_can_be_cancelled_until_the_guest_is_given() -> Outcomes {
    let hang = Fault::Hang(Duration::from_millis(300));
    let calm = calm();
    let phases = [
        Phase::Preparing,
        Phase::Copying,
        Phase::Stopping,
        Phase::Draining,
        Phase::Offering,
    ];
    for phase in phases {
        let pair = Pair::new(&calm)?;
        // Each phase lasts long enough to be seen.
        pair.source.faults().plan(Call::Open, 1, hang);
        pair.source.faults().plan(Call::Pause, 1, hang);
        pair.source.faults().plan(Call::Save, 1, hang);
        pair.target
            .faults()
            .plan(Call::Load, 1, Fault::Hang(Duration::from_secs(2)));
        let ended = interrupted(&pair, phase, |job| job.steering().cancel()).await;
        let cancelled = matches!(reason(&ended.source.outcome), Reason::Cancelled);
        assert!(cancelled, "{phase}: {ended:?}");
        pair.check(&ended);
    }

    let pair = Pair::new(&calm)?;
    pair.target.faults().plan(Call::Resume, 1, hang);
    let ended = interrupted(&pair, Phase::Given, |job| job.steering().cancel()).await;
    assert!(
        matches!(ended.source.outcome, Outcome::Moved),
        "too late: {ended:?}"
    );
    pair.check(&ended);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn it_can_be_cancelled_at_once() -> Outcomes {
    let pair = Pair::new(&Model::default())?;
    let (target, address) = pair.listening().await?;
    let target = target.start().await?;
    let job = pair.sending_to(address).start().await?;
    job.steering().cancel();
    let source = timeout(BOUND, job.finish()).await?;
    // The target may not have heard of any source, and then waits for one.
    target.cancel();
    let target = timeout(BOUND, target.finish()).await?;
    assert!(
        matches!(reason(&source.outcome), Reason::Cancelled),
        "{source:?}"
    );
    pair.check(&Ended { source, target });
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_can_be_cancelled_as_well() -> Outcomes {
    let pair = Pair::new(&Model::default())?;
    let (target, _) = pair.listening().await?;
    let target = target.start().await?;
    target.cancel();
    let ended = timeout(BOUND, target.finish()).await?;
    assert!(
        matches!(reason(&ended.outcome), Reason::Cancelled),
        "{ended:?}"
    );
    assert_eq!(pair.journals()?, [""; 0]);

    let pair = Pair::new(&Model::default())?;
    let (target, address) = pair.listening().await?;
    let target = target.start().await?;
    let job = pair
        .sending_to(address)
        .with_bandwidth(slow())
        .start()
        .await?;
    let mut phase = target.phase();
    timeout(BOUND, phase.wait_for(|now| *now == Phase::Receiving)).await??;
    target.cancel();
    let ended = ends(job, target).await;
    let told = matches!(reason(&ended.source.outcome), Reason::PeerAborted { .. });
    assert!(told, "{ended:?}");
    pair.check(&ended);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_dies_or_stops_is_not_moved() -> Outcomes {
    let io_error = GuestEvent::IoErrorPause {
        device: "disk0".to_owned(),
    };
    let gone = GuestEvent::Gone {
        what: "on order".to_owned(),
    };
    for event in [GuestEvent::ShutDown, GuestEvent::Panicked, io_error, gone] {
        let pair = Pair::new(&Model::default())?;
        let ended = interrupted(&pair, Phase::Copying, |_| {
            pair.source.pause();
            pair.source.tell(event.clone());
        })
        .await;
        let named = match reason(&ended.source.outcome) {
            Reason::GuestShutDown => event == GuestEvent::ShutDown,
            Reason::GuestPanicked => event == GuestEvent::Panicked,
            Reason::GuestIoError { device } => device == "disk0",
            Reason::GuestGone { what } => what == "on order",
            _ => false,
        };
        assert!(named, "{event:?}: {ended:?}");
        assert_eq!(pair.source.state(), RunState::Paused, "it is left as it is");
        assert!(
            pair.source.is_clean() && pair.target.has_quit(),
            "{event:?}: {ended:?}"
        );
        pair.check_ram(&pair.source);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vmm_that_died_is_called_dead_whoever_noticed() -> Outcomes {
    let pair = Pair::new(&calm())?;
    let ended = interrupted(&pair, Phase::Copying, |_| pair.source.quit()).await;
    let dead = matches!(reason(&ended.source.outcome), Reason::GuestGone { .. });
    assert!(dead, "{ended:?}");
    assert!(pair.target.has_quit());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_is_moved_along() -> Outcomes {
    let pair = Pair::new(&Model::default())?;
    let ended = interrupted(&pair, Phase::Copying, |_| {
        pair.source.tell(GuestEvent::Reset);
    })
    .await;
    assert!(matches!(ended.source.outcome, Outcome::Moved), "{ended:?}");
    pair.check(&ended);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn who_pauses_the_guest_meanwhile_finds_it_paused() -> Outcomes {
    let pair = Pair::new(&Model::default())?;
    let ended = interrupted(&pair, Phase::Copying, |_| {
        pair.source.pause();
        pair.source.tell(GuestEvent::ForeignPause);
    })
    .await;
    assert!(matches!(ended.source.outcome, Outcome::Moved), "{ended:?}");
    assert_eq!(pair.target.state(), RunState::Paused);
    pair.check_ram(&pair.target);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn who_resumes_the_guest_meanwhile_finds_it_running() -> Outcomes {
    let pair = Pair::new(&calm())?;
    pair.source.pause();
    let ended = interrupted(&pair, Phase::Copying, |_| {
        pair.source.resume();
        pair.source.tell(GuestEvent::ForeignResume);
    })
    .await;
    assert!(matches!(ended.source.outcome, Outcome::Moved), "{ended:?}");
    pair.check(&ended);

    let pair = Pair::new(&calm())?;
    pair.source
        .faults()
        .plan(Call::Save, 1, Fault::Hang(Duration::from_millis(300)));
    let ended = interrupted(&pair, Phase::Draining, |_| {
        pair.source.resume();
        pair.source.tell(GuestEvent::ForeignResume);
    })
    .await;
    let spoilt = matches!(reason(&ended.source.outcome), Reason::ForeignResume);
    assert!(
        spoilt,
        "what was saved is not the guest any more: {ended:?}"
    );
    pair.check(&ended);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_plugged_meanwhile_keeps_the_guest() -> Outcomes {
    let pair = Pair::new(&calm())?;
    let ended = interrupted(&pair, Phase::Copying, |_| {
        pair.source
            .change_inventory(|now| now.devices.push("nic1".to_owned()));
    })
    .await;
    let Reason::InventoryChanged { what } = reason(&ended.source.outcome) else {
        panic!("{ended:?}");
    };
    assert_eq!(what, "nic1 was added");
    pair.check(&ended);
    Ok(())
}
