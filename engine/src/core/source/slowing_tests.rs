//! A guest is slowed while it runs, and never any longer.

use std::time::Duration;

use ferry_stream::message::Mode;

use super::SourceConfig;
use super::bench::*;
use crate::core::converge::{Converge, Verdict, View};
use crate::core::message::{Action, Command, Input, Moment, Notice, Reason, Step};
use crate::core::throttle::Throttling;
use crate::vmm::{GuestEvent, RunState};

/// Slows the guest as long as that is possible, then does something else.
struct SlowsThen(Verdict);

impl Converge for SlowsThen {
    fn decide(&mut self, view: &View<'_>) -> Verdict {
        if view.may_throttle {
            Verdict::Throttle
        } else {
            self.0
        }
    }
}

/// Steps to 60 %, and to the end.
const STEEP: Throttling = Throttling {
    initial_percent: 60,
    increment_percent: 99,
};

fn slowing() -> SourceConfig {
    SourceConfig {
        throttling: Some(STEEP),
        ..config()
    }
}

/// A migration whose first round is over and has led to a first step.
fn at_first_step(config: SourceConfig, then: Verdict) -> Bench {
    let mut bench = Bench::ruled(config, RunState::Running, Box::new(SlowsThen(then)));
    for (fact, _) in happy_path() {
        let orders = match fact {
            Input::Collected { .. } => bench.tell(found(2)),
            fact => bench.tell(fact),
        };
        if bench.machine.progress(bench.now).round == 2 {
            assert_eq!(orders, ["Throttle(60)", "Flush", "copy 2 in round 2, Tell"]);
            return bench;
        }
    }
    panic!("the happy path has a second round")
}

fn found(count: u64) -> Input {
    Input::Collected {
        found: pages(count),
    }
}

/// The next round, up to what is decided after it.
fn next_round(bench: &mut Bench, round: u32, dirty: u64) -> Vec<String> {
    for fact in [sent(round, 2), idle(round)] {
        assert_eq!(bench.tell(fact), [""; 0]);
    }
    assert_eq!(bench.tell(done(round, 2)), ["collect"]);
    let orders = bench.tell(found(dirty));
    bench.tell(Input::Flushed);
    orders
}

fn slowed(bench: &Bench) -> (u8, u8) {
    let progress = bench.machine.progress(bench.now);
    let report = bench.machine.report(bench.now);
    let told = (progress.throttled_percent, progress.throttled_percent_max);
    assert_eq!(
        told,
        (report.throttled_percent, report.throttled_percent_max)
    );
    told
}

#[test]
fn it_is_slowed_step_by_step_and_has_its_time_again_before_it_is_stopped() {
    let mut bench = at_first_step(slowing(), Verdict::Stop);
    assert_eq!(slowed(&bench), (0, 0), "it is not done yet");
    assert_eq!(bench.tell(Input::Throttled(60)), ["tell"]);
    assert_eq!(slowed(&bench), (60, 60));
    bench.tell(Input::Flushed);
    let orders = next_round(&mut bench, 2, 2);
    assert_eq!(orders, ["Throttle(99)", "Flush", "copy 2 in round 3, Tell"]);
    assert_eq!(bench.tell(Input::Throttled(99)), ["tell"]);
    let orders = next_round(&mut bench, 3, 1);
    assert_eq!(orders, ["Throttle(0)", "Pause(Switchover)"]);
    assert_eq!(slowed(&bench), (99, 99));
    assert_eq!(bench.tell(Input::Throttled(0)), [""; 0]);
    assert_eq!(slowed(&bench), (0, 99));
}

#[test]
fn a_step_that_is_under_way_is_waited_for_before_anything_is_given_up() {
    let mut bench = at_first_step(slowing(), Verdict::GiveUp);
    bench.tell(Input::Flushed);
    let orders = next_round(&mut bench, 2, 2);
    assert_eq!(orders, ["Flush", "copy 2 in round 3, Tell"]);
    bench.tell(Input::Throttled(60));
    let orders = next_round(&mut bench, 3, 2);
    assert_eq!(orders[0], "Throttle(99)");
    bench.tell(Input::Throttled(99));
    let orders = next_round(&mut bench, 4, 2);
    assert_eq!(orders[1..3], ["Throttle(0)", "Undo { guest: Running }"]);
    let ended = bench.undone().pop().unwrap();
    assert!(ended.contains("slowed by 99 %"), "{ended}");
    assert!(!ended.contains("--auto-converge"), "{ended}");
}

#[test]
fn who_did_not_ask_for_it_is_told_of_it() {
    let mut bench = Bench::with(config(), RunState::Running, Verdict::GiveUp);
    let facts = happy_path();
    let facts = facts.into_iter().map(|(fact, _)| fact);
    let until = |fact: &Input| !matches!(fact, Input::Paused { .. });
    for fact in facts.take_while(until) {
        bench.tell(fact);
    }
    let ended = bench.undone().pop().unwrap();
    assert!(
        ended.contains("use --auto-converge or --timeout"),
        "{ended}"
    );
}

#[test]
fn a_guest_that_cannot_be_slowed_is_told_of_once_and_moves_on() {
    let mut bench = at_first_step(slowing(), Verdict::Stop);
    bench.now = bench.now.after(Duration::from_millis(1));
    bench.machine.handle(bench.now, failure(Step::Throttle));
    let Some(Action::Tell(Notice::NotThrottled { what })) = bench.machine.poll_action() else {
        panic!("it is told")
    };
    assert!(what.contains("as the test has it"), "{what}");
    assert_eq!(bench.orders(), ["Throttle(0)"], "a part may have been done");
    // That failing as well, it is tried again when it matters.
    assert_eq!(bench.tell(failure(Step::Throttle)), ["tell"]);
    bench.tell(Input::Flushed);
    let orders = next_round(&mut bench, 2, 2);
    assert_eq!(orders, ["Throttle(0)", "Pause(Switchover)"]);
}

#[test]
fn it_has_its_time_again_on_every_way_out() {
    let lifted = |orders: &[String]| {
        let at = |word: &str| orders.iter().position(|order| order.starts_with(word));
        assert!(
            at("Throttle(0)").is_some_and(|at_lift| Some(at_lift) < at("Undo")),
            "{orders:?}"
        );
    };
    for answered in [true, false] {
        for fact in [
            Input::Command(Command::Cancel),
            lost(),
            failure(Step::Collect),
            Input::Guest(GuestEvent::Panicked),
        ] {
            let mut bench = at_first_step(slowing(), Verdict::Stop);
            if answered {
                bench.tell(Input::Throttled(60));
            }
            lifted(&bench.tell(fact));
            // Putting everything back is what counts now.
            assert_eq!(bench.tell(failure(Step::Throttle)), [""; 0]);
            let ended = bench.undone();
            assert!(ended[0].contains("kept, Running"), "{ended:?}");
        }
    }
}

#[test]
fn a_guest_that_is_paused_for_the_copy_is_not_slowed_any_more() {
    let mut bench = at_first_step(slowing(), Verdict::Stop);
    bench.tell(Input::Throttled(60));
    let orders = bench.tell(Input::Command(Command::Suspend));
    assert_eq!(orders, ["tell", "Throttle(0)", "Pause(Copy)"]);
    bench.tell(Input::Throttled(0));
    bench.tell(Input::Flushed);
    let orders = next_round(&mut bench, 2, 2);
    assert_eq!(orders, ["Flush", "copy 2 in round 3, Tell"]);
    let at = Moment(Duration::from_millis(9));
    bench.tell(Input::Paused { at, drained: at });
    // Somebody lets it run: it may be slowed again, from the beginning.
    bench.tell(Input::Guest(GuestEvent::ForeignResume));
    assert_eq!(next_round(&mut bench, 3, 2)[0], "Throttle(60)");
}

#[test]
fn what_nobody_asked_for_is_never_ordered() {
    for mode in [Mode::Live, Mode::Paused] {
        let config = SourceConfig { mode, ..config() };
        let mut bench = Bench::with(config, RunState::Running, Verdict::Throttle);
        for (fact, _) in happy_path() {
            let orders = bench.tell(fact);
            assert!(!orders.iter().any(|order| order.starts_with("Throttle")));
        }
    }
    let mut bench = Bench::with(slowing(), RunState::Running, Verdict::Stop);
    for (fact, orders) in happy_path() {
        assert_eq!(bench.tell(fact), orders, "who fits needs not be slowed");
    }
    // An answer to nothing means nothing.
    assert_eq!(bench.tell(Input::Throttled(50)), [""; 0]);
    assert_eq!(slowed(&bench), (0, 0));
}

#[test]
fn a_reason_says_how_slow_the_guest_was() {
    let reason = |throttled_percent| Reason::NotConverging {
        predicted_ms: 1,
        limit_ms: 1,
        dirty_bytes_per_s: 1,
        link_bytes_per_s: 1,
        throttled_percent,
    };
    let told = [None, Some(0), Some(99)].map(|percent| reason(percent).to_string());
    assert!(
        told[0].contains("link 1 B/s): raise --max-downtime, use --auto-converge or --timeout")
    );
    assert!(told[1].contains("link 1 B/s): raise --max-downtime, use --timeout"));
    assert!(told[2].contains("link 1 B/s, slowed by 99 %): raise"));
}
