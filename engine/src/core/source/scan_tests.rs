//! Rounds whose pages become known while they are under way, fact by fact.

use std::time::Duration;

use ferry_stream::message::{Message, Mode};

use super::SourceConfig;
use super::bench::*;
use crate::core::converge::Verdict;
use crate::core::message::{Input, Moment, Phase, Step};
use crate::vmm::RunState;

/// Everything has come that the first round waits for, but tracking.
fn ready_but_for_tracking(config: SourceConfig) -> (Bench, Vec<String>) {
    let mut bench = Bench::with(config, RunState::Running, Verdict::Stop);
    let mut orders = Vec::new();
    for (fact, _) in happy_path().into_iter().take(7) {
        if !matches!(fact, Input::Tracking(_)) {
            orders = bench.tell(fact);
        }
    }
    (bench, orders)
}

#[test]
fn the_first_round_does_not_wait_for_tracking_and_ends_after_it() {
    let (mut bench, orders) = ready_but_for_tracking(config());
    assert_eq!(orders, ["Flush", "copy what is found in round 1, Skip"]);
    assert_eq!(bench.machine.phase(), Phase::Copying);
    let percent = |bench: &Bench| bench.machine.progress(bench.now).percent();
    assert_eq!(percent(&bench), 0);
    // The lanes may be heard before the scan that let them go, and so may the target.
    bench.tell(idle(1));
    bench.tell(sent(1, 3));
    assert_eq!(bench.tell(done(1, 3)), [""; 0]);
    assert_eq!(bench.tell(tracking(3)), ["collect"]);
    assert_eq!(bench.machine.report(bench.now).rounds[0].dirty_pages, 3);
}

#[test]
fn tracking_that_ends_before_the_guest_is_held_is_not_forgotten() {
    let mode = Mode::Paused;
    let (mut bench, orders) = ready_but_for_tracking(SourceConfig { mode, ..config() });
    assert_eq!(orders, ["Pause(Copy)"]);
    assert_eq!(bench.tell(tracking(3)), [""; 0]);
    let at = bench.now;
    let orders = bench.tell(Input::Paused { at, drained: at });
    assert_eq!(orders, ["Flush", "copy what is found in round 1, Skip"]);
    bench.tell(idle(1));
    bench.tell(sent(1, 3));
    assert_eq!(bench.tell(done(1, 3)), ["collect"]);
}

#[test]
fn tracking_that_fails_in_the_middle_of_the_first_round_keeps_the_guest() {
    let (mut bench, _) = ready_but_for_tracking(config());
    bench.tell(idle(1));
    bench.tell(sent(1, 3));
    bench.tell(done(1, 3));
    let orders = bench.tell(failure(Step::StartTracking));
    gives_up(&bench, &orders);
    assert!(orders.contains(&"CloseLanes".to_owned()), "{orders:?}");
}

#[test]
fn tracking_that_hangs_in_the_middle_of_the_first_round_is_bounded() {
    let (mut bench, _) = ready_but_for_tracking(config());
    bench.tell(Input::Flushed);
    let orders = bench.wait();
    gives_up(&bench, &orders);
}

#[test]
fn the_last_round_may_be_done_before_the_scan_says_so_and_is_counted_once() {
    let mut bench = Bench::at(Phase::Draining);
    bench.tell(scanned(2));
    bench.tell(Input::Saved { bytes: 9, crc: 7 });
    bench.tell(sent(2, 2));
    bench.tell(idle(2));
    bench.tell(done(2, 2));
    bench.tell(idle(3));
    bench.tell(sent(3, 1));
    assert_eq!(bench.tell(done(3, 1)), [""; 0]);
    assert_eq!(bench.machine.phase(), Phase::Draining);
    let at = bench.now.after(Duration::from_millis(1));
    bench.machine.handle(at, scanned(1));
    let complete = bench.machine.poll_action();
    let Some(crate::core::message::Action::Send(Message::Complete { pages, .. })) = complete else {
        panic!("{complete:?}");
    };
    assert_eq!(pages, 3 + 2 + 1);
    assert_eq!(bench.machine.report(Moment::default()).rounds.len(), 3);
    bench.tell(Input::Inventoried(Box::new(inventory())));
    let orders = bench.tell(Input::Received(Message::Ready { load_us: 0 }));
    assert_eq!(orders, ["journal Given"]);
}

#[test]
fn a_scan_with_the_guest_standing_that_fails_keeps_it() {
    let mut draining = Bench::at(Phase::Draining);
    let orders = draining.tell(failure(Step::Collect));
    gives_up(&draining, &orders);
}
