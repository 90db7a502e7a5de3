//! What becomes of the guest when a VMM fails, at any call that the engine makes.

use std::fs;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;

use ferry_engine::Bandwidth;
use ferry_engine::core::message::{GuestLeft, Notice, Outcome, Phase, Reason};
use ferry_engine::job::{Job, StartError, TargetJob};
use ferry_engine::journal::JournalError;
use ferry_engine::link::local;
use ferry_engine::message::Mode;
use ferry_engine::vmm::RunState;
use ferry_testbed::toy::{Call, Ended, Fault, Model, Pair};
use ferry_testbed::wait_until;
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

async fn migrate(pair: &Pair) -> Ended {
    let (target, address) = pair.listening().await.unwrap();
    let target = target.start().await.unwrap();
    ends(pair.sending_to(address).start().await.unwrap(), target).await
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

fn assert_in_doubt(started: &Result<Job, StartError>) {
    let refused = matches!(
        started,
        Err(StartError::Journal(JournalError::InDoubt { .. }))
    );
    assert!(refused, "{started:?}");
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
async fn whatever_fails_at_the_source_the_guest_is_kept() -> Outcomes {
    let calls = [
        (Call::Read, 1),
        (Call::Read, 3),
        (Call::Populated, 1),
        (Call::TrackerStart, 1),
        (Call::Collect, 1),
        (Call::Collect, 2),
        (Call::Inventory, 2),
        (Call::Flush, 1),
        (Call::Pause, 1),
        (Call::Open, 1),
        (Call::Save, 1),
    ];
    for (call, nth) in calls {
        for fault in [Fault::Refuse, Fault::Io, Fault::Panic] {
            let pair = Pair::new(&Model::default())?;
            pair.source.faults().plan(call, nth, fault);
            let ended = migrate(&pair).await;
            assert!(
                pair.source.faults().count(call) >= nth,
                "{call:?} was never called"
            );
            if call == Call::Flush && matches!(ended.source.outcome, Outcome::Moved) {
                // The move may be over before the flush has failed.
                continue;
            }
            let failed = matches!(reason(&ended.source.outcome), Reason::Failed(_));
            assert!(failed, "{call:?} {fault:?}: {ended:?}");
            pair.check(&ended);
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_fails_at_the_target_the_guest_is_kept() -> Outcomes {
    let calls = [Call::Prepare, Call::Receive, Call::Zero, Call::Load];
    for call in calls {
        for fault in [Fault::Refuse, Fault::Io, Fault::Panic] {
            let model = Model {
                rate_pages_per_s: 4000,
                ..Model::default()
            };
            let pair = Pair::new(&model)?;
            pair.target.faults().plan(call, 1, fault);
            let ended = migrate(&pair).await;
            if call == Call::Zero && pair.target.faults().count(call) == 0 {
                // Which pages are cleared while it moves is the guest's own affair.
                continue;
            }
            let told = matches!(reason(&ended.source.outcome), Reason::PeerAborted { .. });
            assert!(
                told,
                "{call:?} {fault:?}: the source is told why: {ended:?}"
            );
            pair.check(&ended);
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_vmm_is_waited_for() -> Outcomes {
    let source = [
        Call::Collect,
        Call::Pause,
        Call::Save,
        Call::Open,
        Call::TrackerStop,
    ];
    let target = [Call::Blank, Call::Prepare, Call::Load, Call::Resume];
    let hang = Fault::Hang(Duration::from_millis(150));
    for call in source.into_iter().chain(target) {
        let pair = Pair::new(&Model::default())?;
        pair.source.faults().plan(call, 1, hang);
        pair.target.faults().plan(call, 1, hang);
        let ended = migrate(&pair).await;
        assert!(
            matches!(ended.source.outcome, Outcome::Moved),
            "{call:?}: {ended:?}"
        );
        pair.check(&ended);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_cannot_be_read_is_not_touched() -> Outcomes {
    for call in [Call::Watch, Call::Inventory, Call::RunState] {
        for fault in [Fault::Refuse, Fault::Panic] {
            let pair = Pair::new(&Model::default())?;
            pair.source.faults().plan(call, 1, fault);
            let started = pair.sending_to("127.0.0.1:9".parse()?).start().await;
            assert!(
                matches!(started, Err(StartError::Vm(_))),
                "{call:?}: {started:?}"
            );
            assert_eq!(pair.journals()?, [""; 0], "nothing has begun");
            assert_eq!(pair.source.state(), RunState::Running);
            pair.check_ram(&pair.source);
        }
    }
    for fault in [Fault::Refuse, Fault::Panic] {
        let pair = Pair::new(&Model::default())?;
        pair.target.faults().plan(Call::Blank, 1, fault);
        let (target, _) = pair.listening().await?;
        let started = target.start().await;
        assert!(matches!(started, Err(StartError::Vm(_))), "{started:?}");
        assert_eq!(pair.journals()?, [""; 0], "nothing has begun");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_cannot_resume_gives_the_guest_back() -> Outcomes {
    let pair = Pair::new(&Model::default())?;
    pair.target.faults().plan(Call::Resume, 1, Fault::Refuse);
    let ended = migrate(&pair).await;
    let returned = matches!(reason(&ended.source.outcome), Reason::Returned { .. });
    assert!(returned, "{ended:?}");
    pair.check(&ended);
    // The source knows, so the target has nobody to wait for.
    assert!(
        ended.target.report.total < Duration::from_secs(2),
        "{ended:?}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_resume_that_may_have_worked_is_a_person_s_to_judge() -> Outcomes {
    for fault in [Fault::Io, Fault::Panic] {
        let pair = Pair::new(&Model::default())?;
        pair.target.faults().plan(Call::Resume, 1, fault);
        let ended = migrate(&pair).await;
        for outcome in [&ended.source.outcome, &ended.target.outcome] {
            assert!(
                matches!(outcome, Outcome::InDoubt { .. }),
                "{fault:?}: {ended:?}"
            );
        }
        assert!(
            !pair.source.has_quit() && !pair.target.has_quit(),
            "neither is touched"
        );
        assert_eq!(pair.source.state(), RunState::Paused);
        assert_eq!(pair.journals()?, ["source.journal", "target.journal"]);
        let again = pair.sending_to("127.0.0.1:9".parse()?).start().await;
        assert_in_doubt(&again);
        pair.check_ram(&pair.target);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_cannot_be_put_back_says_so() -> Outcomes {
    for call in [Call::Abandon, Call::Resume, Call::Restore] {
        for fault in [Fault::Refuse, Fault::Panic] {
            let pair = Pair::new(&Model::default())?;
            pair.source.faults().plan(Call::Save, 1, Fault::Refuse);
            pair.source.faults().plan(call, 1, fault);
            let ended = migrate(&pair).await;
            let Outcome::Kept { guest, .. } = &ended.source.outcome else {
                panic!("{ended:?}");
            };
            assert!(
                matches!(guest, GuestLeft::Damaged(_)),
                "{call:?}: {ended:?}"
            );
            // What can be put back is.
            let runs = pair.source.state() == RunState::Running;
            assert_eq!(runs, call != Call::Resume, "{call:?} {fault:?}");
            assert!(pair.target.has_quit());
            assert!(!pair.world.ran_twice());
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_fails_after_the_move_does_not_undo_it() -> Outcomes {
    for call in [Call::Quit, Call::TrackerStop] {
        for fault in [Fault::Refuse, Fault::Panic] {
            let pair = Pair::new(&Model::default())?;
            pair.source.faults().plan(call, 1, fault);
            let (target, address) = pair.listening().await?;
            let target = target.start().await?;
            let mut job = pair.sending_to(address).start().await?;
            let mut told = Vec::new();
            while let Some(notice) = timeout(BOUND, job.notice()).await? {
                told.push(notice);
            }
            let ended = ends(job, target).await;
            assert!(matches!(ended.source.outcome, Outcome::Moved), "{ended:?}");
            let leftover = told
                .iter()
                .any(|notice| matches!(notice, Notice::Leftover(_)));
            assert!(leftover, "{call:?} {fault:?}: {told:?}");
            if call == Call::Quit {
                // The stale guest is still there, and must not be moved a second time.
                assert_eq!(pair.journals()?, ["source.journal"]);
                let again = pair.sending_to("127.0.0.1:9".parse()?).start().await;
                assert_in_doubt(&again);
            }
            assert_eq!(pair.target.state(), RunState::Running);
            assert!(!pair.world.ran_twice());
            pair.check_ram(&pair.target);
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flush_that_hangs_does_not_hold_up_a_cancel() -> Outcomes {
    let pair = Pair::new(&calm())?;
    pair.source
        .faults()
        .plan(Call::Flush, 1, Fault::Hang(2 * BOUND));
    let ended = interrupted(&pair, Phase::Copying, |job| job.steering().cancel()).await;
    assert!(matches!(reason(&ended.source.outcome), Reason::Cancelled));
    pair.check(&ended);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn machines_that_differ_are_refused_before_anything_changes() -> Outcomes {
    let pair = Pair::new(&calm())?;
    pair.target
        .change_inventory(|now| "toy-2.0".clone_into(&mut now.machine));
    let ended = migrate(&pair).await;
    let text = reason(&ended.source.outcome).to_string();
    assert!(
        text.contains("toy-1.0") && text.contains("toy-2.0"),
        "{text}"
    );
    let Outcome::Kept { guest, .. } = &ended.source.outcome else {
        panic!("{ended:?}");
    };
    assert!(matches!(guest, GuestLeft::Untouched), "{ended:?}");
    pair.check(&ended);
    for call in [Call::Prepare, Call::Quit] {
        assert_eq!(
            pair.target.faults().count(call),
            0,
            "{call:?} at the target"
        );
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_is_moved_once_at_a_time() -> Outcomes {
    let pair = Pair::new(&calm())?;
    let ended = {
        let (target, address) = pair.listening().await?;
        let target = target.start().await?;
        let job = pair
            .sending_to(address)
            .with_bandwidth(slow())
            .start()
            .await?;
        let again = pair.sending_to(address).start().await;
        let busy = matches!(again, Err(StartError::Journal(JournalError::Busy { .. })));
        assert!(busy, "{again:?}");
        job.steering().set_bandwidth(Bandwidth::Unlimited);
        ends(job, target).await
    };
    assert!(matches!(ended.source.outcome, Outcome::Moved), "{ended:?}");
    pair.check(&ended);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kept_guest_can_be_moved_later() -> Outcomes {
    let pair = Pair::new(&calm())?;
    let (connector, acceptor) = local();
    drop(acceptor);
    let nobody = pair.sending(Arc::new(connector)).start().await;
    assert!(
        matches!(nobody, Err(StartError::Connect { .. })),
        "{nobody:?}"
    );
    assert_eq!(pair.journals()?, [""; 0], "nothing has begun");
    pair.source.faults().plan(Call::Save, 1, Fault::Refuse);
    pair.target.faults().plan(Call::Quit, 1, Fault::Refuse);
    let ended = migrate(&pair).await;
    assert!(
        matches!(reason(&ended.source.outcome), Reason::Failed(_)),
        "{ended:?}"
    );
    // This toy would not quit, so that it is there for a second attempt.
    let ended = migrate(&pair).await;
    assert!(matches!(ended.source.outcome, Outcome::Moved), "{ended:?}");
    pair.check(&ended);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_copy_that_fails_lets_the_guest_go_on() -> Outcomes {
    let pair = Pair::new(&calm())?;
    pair.target.faults().plan(Call::Receive, 2, Fault::Io);
    let (target, address) = pair.listening().await?;
    let target = target.start().await?;
    let job = pair
        .sending_to(address)
        .with_mode(Mode::Paused)
        .start()
        .await?;
    let ended = ends(job, target).await;
    assert!(
        matches!(reason(&ended.source.outcome), Reason::PeerAborted { .. }),
        "{ended:?}"
    );
    pair.check(&ended);
    Ok(())
}

/// Threads and descriptors of this process.
fn held() -> (usize, usize) {
    let count = |path| fs::read_dir(path).map_or(0, Iterator::count);
    (count("/proc/self/task"), count("/proc/self/fd"))
}

/// Other tests of this process come and go, so this one runs in a process of its own.
#[test]
fn nothing_is_left_behind() -> Outcomes {
    const ALONE: &str = "FERRY_TOY_ALONE";
    if std::env::var_os(ALONE).is_none() {
        let status = std::process::Command::new(std::env::current_exe()?)
            .args(["--exact", "nothing_is_left_behind", "--nocapture"])
            .env(ALONE, "1")
            .status()?;
        assert!(status.success());
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        // Threads of the runtime that block are kept for the next who needs one.
        one_of_each().await;
        let before = held();
        for _ in 0..5 {
            one_of_each().await;
        }
        let after = wait_until("threads and descriptors to go", BOUND, || {
            (held().1 <= before.1).then(held)
        });
        let after = after.unwrap_or_else(|_| held());
        assert!(
            after.1 <= before.1,
            "descriptors: {before:?} before, {after:?} after"
        );
        assert!(
            after.0 <= before.0 + 2,
            "threads: {before:?} before, {after:?} after"
        );
    });
    Ok(())
}

async fn one_of_each() {
    let moved = Pair::new(&calm()).unwrap();
    moved.check(&migrate(&moved).await);
    let kept = Pair::new(&calm()).unwrap();
    kept.source.faults().plan(Call::Save, 1, Fault::Refuse);
    kept.check(&migrate(&kept).await);
    let cancelled = Pair::new(&calm()).unwrap();
    let ended = interrupted(&cancelled, Phase::Copying, |job| job.steering().cancel()).await;
    cancelled.check(&ended);
}
