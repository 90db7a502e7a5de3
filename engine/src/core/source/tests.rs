//! The source's machine, fact by fact. The long runs are the simulated world's.

use std::time::Duration;

use ferry_stream::message::{AbortCode, Message, Mode, Verdict as Word};

use super::{SourceConfig, SourceLimits};
use crate::core::converge::{Converge, Verdict, View};
use crate::core::message::{
    Action, Command, Failure, Input, LaneTotals, Notice, Phase, Reason, Record, Step,
};
use crate::vmm::{GuestEvent, RunState};

use super::bench::*;

#[test]
fn a_migration_without_trouble() {
    let mut bench = Bench::with(config(), RunState::Running, Verdict::Stop);
    for (fact, orders) in happy_path() {
        let told = format!("{fact:?}");
        assert_eq!(bench.tell(fact), orders, "after {told}");
    }
    // The guest has its first moments at the target to itself.
    assert_eq!(bench.wait(), ["CloseLanes", "StopTracking"]);
    assert_eq!(bench.tell(Input::TrackingStopped), ["Retire"]);
    assert_eq!(bench.tell(Input::Retired), ["finish moved"]);
    assert_eq!(bench.machine.phase(), Phase::Ended);
}

#[test]
fn a_guest_that_ends_is_kept_until_go_and_gone_after_it() {
    let ends = || {
        let (device, what) = ("disk0".to_owned(), "killed".to_owned());
        [
            GuestEvent::ShutDown,
            GuestEvent::Panicked,
            GuestEvent::IoErrorPause { device },
            GuestEvent::Gone { what },
        ]
    };
    for phase in BEFORE_GO {
        for event in ends() {
            let mut bench = Bench::at(phase);
            let orders = bench.tell(Input::Guest(event));
            gives_up(&bench, &orders);
        }
    }
    for phase in AFTER_GO {
        for event in ends() {
            let mut bench = Bench::at(phase);
            bench.tell(Input::Guest(event));
            assert_eq!(bench.machine.phase(), phase, "the target has it");
        }
    }
}

#[test]
fn a_reset_is_copied_like_any_write_but_spoils_a_switchover() {
    for phase in [Phase::Preparing, Phase::Copying] {
        let mut bench = Bench::at(phase);
        assert_eq!(bench.tell(Input::Guest(GuestEvent::Reset)), ["tell"]);
        assert_eq!(bench.machine.phase(), phase);
    }
    for phase in [Phase::Draining, Phase::Offering, Phase::Giving] {
        let mut bench = Bench::at(phase);
        let orders = bench.tell(Input::Guest(GuestEvent::Reset));
        gives_up(&bench, &orders);
    }
}

#[test]
fn somebody_elses_pause_is_kept_at_the_target() {
    for phase in BEFORE_GO {
        let mut bench = Bench::at(phase);
        assert_eq!(bench.tell(Input::Guest(GuestEvent::ForeignPause)), ["tell"]);
        assert_eq!(bench.machine.phase(), phase);
    }
    let mut bench = Bench::at(Phase::Giving);
    bench.tell(Input::Guest(GuestEvent::ForeignPause));
    bench
        .machine
        .handle(bench.now, Input::Journaled(Record::Given));
    let go = bench.machine.poll_action();
    let run = ferry_stream::message::Run::StayPaused;
    assert!(matches!(go, Some(Action::Send(Message::Go { run: told })) if told == run));
}

#[test]
fn somebody_elses_resume_spoils_a_switchover_and_is_undone_after_go() {
    for phase in [
        Phase::Stopping,
        Phase::Draining,
        Phase::Offering,
        Phase::Giving,
    ] {
        let mut bench = Bench::at(phase);
        let orders = bench.tell(Input::Guest(GuestEvent::ForeignResume));
        gives_up(&bench, &orders);
    }
    for phase in AFTER_GO {
        let mut bench = Bench::at(phase);
        let orders = bench.tell(Input::Guest(GuestEvent::ForeignResume));
        assert_eq!(orders, ["tell", "Pause(Copy)"]);
        assert_eq!(bench.machine.phase(), phase);
    }
}

#[test]
fn cancel_keeps_the_guest_until_go_and_is_too_late_after_it() {
    for phase in BEFORE_GO {
        let mut bench = Bench::at(phase);
        let orders = bench.tell(Input::Command(Command::Cancel));
        gives_up(&bench, &orders);
        assert_eq!(bench.undone(), ["finish kept, Running: cancelled"]);
    }
    let mut bench = Bench::at(Phase::Given);
    bench
        .machine
        .handle(bench.now, Input::Command(Command::Cancel));
    let told = bench.machine.poll_action();
    assert!(matches!(told, Some(Action::Tell(Notice::TooLateToCancel))));
    let mut greeting = Bench::with(config(), RunState::Running, Verdict::Stop);
    let orders = greeting.tell(Input::Command(Command::Cancel));
    assert_eq!(orders, ["send Abort", "finish kept, untouched: cancelled"]);
}

#[test]
fn a_message_at_the_wrong_time_ends_it_before_go_and_raises_the_question_after() {
    for phase in BEFORE_GO {
        let mut bench = Bench::at(phase);
        let orders = bench.tell(Input::Received(Message::Inquire));
        gives_up(&bench, &orders);
    }
    let mut bench = Bench::at(Phase::Given);
    assert_eq!(
        bench.tell(Input::Received(Message::Ready { load_us: 0 })),
        ["tell", "Ask"]
    );
    assert_eq!(
        Bench::at(Phase::Copying).tell(Input::Received(Message::Ping)),
        [""; 0]
    );
}

#[test]
fn go_needs_ready_and_the_last_round_and_the_same_hardware_in_whichever_order() {
    let same = || Input::Inventoried(Box::new(inventory()));
    let ready = || Input::Received(Message::Ready { load_us: 0 });
    let orders: [[fn() -> Input; 4]; 3] = [
        [|| done(3, 1), ready, same, || sent(3, 1)],
        [same, || sent(3, 1), || done(3, 1), ready],
        [ready, || sent(3, 1), || done(3, 1), same],
    ];
    for facts in orders {
        let mut bench = Bench::at(Phase::Offering);
        bench.tell(idle(3));
        let told = facts.map(|fact| bench.tell(fact()));
        assert_eq!(told[..3], [(); 3].map(|()| Vec::<String>::new()));
        assert_eq!(told[3], ["journal Given"]);
    }
}

#[test]
fn a_round_that_both_count_differently_ends_it() {
    let mut bench = Bench::at(Phase::Copying);
    bench.tell(idle(1));
    bench.tell(sent(1, 3));
    let orders = bench.tell(done(1, 2));
    gives_up(&bench, &orders);
    let end = bench.undone();
    assert_eq!(
        end,
        ["finish kept, Running: round 1: 3 pages by our count, 2 by the peer's"]
    );
}

#[test]
fn hardware_that_changed_keeps_the_guest() {
    for phase in [Phase::Draining, Phase::Offering] {
        let mut bench = Bench::at(phase);
        let orders = bench.tell(plugged());
        gives_up(&bench, &orders);
    }
}

#[test]
fn a_target_that_cannot_load_what_was_plugged_is_not_to_blame() {
    let mut bench = Bench::at(Phase::Draining);
    let (code, text) = (AbortCode::Vmm, "it cannot load".to_owned());
    let orders = bench.tell(Input::Received(Message::Abort { code, text }));
    gives_up(&bench, &orders);
    let place = |what: &str| orders.iter().position(|order| order.starts_with(what));
    assert!(place("Undo") < place("Inventory"), "the guest runs first");
    bench.tell(Input::Undone(Ok(RunState::Running)));
    assert_eq!(bench.tell(Input::TrackingStopped), [""; 0]);
    assert_eq!(bench.tell(plugged()), ["journal Kept"]);
    let end = bench.tell(Input::Journaled(Record::Kept));
    assert_eq!(
        end,
        ["finish kept, Running: the guest's hardware changed during the move: disk1 was added"]
    );
}

fn plugged() -> Input {
    let mut now = inventory();
    now.devices.push("disk1".into());
    Input::Inventoried(Box::new(now))
}

#[test]
fn a_given_record_that_cannot_be_written_gives_nothing_away() {
    let mut bench = Bench::at(Phase::Giving);
    let orders = bench.tell(failure(Step::Journal));
    assert!(!orders.contains(&"send Go".to_owned()));
    assert_eq!(bench.machine.phase(), Phase::Undoing);
}

#[test]
fn trouble_while_given_is_written_does_not_wait_for_the_journal() {
    let mut bench = Bench::at(Phase::Giving);
    let orders = bench.tell(lost());
    assert!(orders.contains(&"Undo { guest: Running }".to_owned()));
    assert_eq!(bench.tell(Input::Journaled(Record::Given)), [""; 0]);
    assert!(bench.undone()[0].starts_with("finish kept, Running"));
}

#[test]
fn every_wait_before_go_has_a_bound() {
    for phase in [
        Phase::Greeting,
        Phase::Preparing,
        Phase::Stopping,
        Phase::Draining,
        Phase::Offering,
    ] {
        let mut bench = if phase == Phase::Greeting {
            Bench::with(config(), RunState::Running, Verdict::Stop)
        } else {
            Bench::at(phase)
        };
        let orders = bench.wait();
        assert!(
            orders.contains(&"send Abort".to_owned()),
            "{phase}: {orders:?}"
        );
    }
    let mut bench = Bench::at(Phase::Given);
    assert_eq!(bench.wait(), ["tell", "Ask"]);
}

#[test]
fn pages_that_move_are_no_standstill() {
    let mut bench = Bench::at(Phase::Draining);
    let before = bench.machine.poll_timeout();
    bench.tell(Input::Sent(LaneTotals::default()));
    assert_eq!(bench.machine.poll_timeout(), before, "nothing has moved");
    bench.tell(Input::Sent(LaneTotals {
        pages: 1 << 20,
        bytes: 1 << 32,
        ..LaneTotals::default()
    }));
    assert!(bench.machine.poll_timeout() > before);
}

#[test]
fn the_time_out_suspends_and_the_move_finishes() {
    let timeout = Some(Duration::from_secs(5));
    let config = SourceConfig {
        timeout,
        ..config()
    };
    let mut bench = Bench::with(config, RunState::Running, Verdict::GiveUp);
    let mut facts = happy_path().into_iter();
    while bench.machine.phase() != Phase::Copying {
        bench.tell(facts.next().unwrap().0);
    }
    assert_eq!(bench.wait(), ["tell", "Pause(Copy)"]);
    let at = bench.now;
    assert_eq!(bench.tell(Input::Paused { at, drained: at }), ["Unpace"]);
    bench.tell(idle(1));
    bench.tell(sent(1, 3));
    bench.tell(done(1, 3));
    let orders = bench.tell(Input::Collected { found: pages(9) });
    assert_eq!(orders, ["Pause(Switchover)"], "however much is left");
}

#[test]
fn rounds_that_do_not_shrink_keep_the_guest_where_nothing_else_is_allowed() {
    let mut bench = Bench::with(config(), RunState::Running, Verdict::GiveUp);
    for (fact, _) in happy_path().into_iter().take(11) {
        bench.tell(fact);
    }
    let orders = bench.tell(Input::Collected { found: pages(9) });
    gives_up(&bench, &orders);
    assert!(bench.undone()[0].contains("not converging"));
}

#[test]
fn a_limit_below_the_floor_is_told_once() {
    let downtime_limit = Duration::from_millis(1);
    let config = SourceConfig {
        downtime_limit,
        ..config()
    };
    let mut bench = Bench::with(config, RunState::Running, Verdict::Continue);
    for (fact, _) in happy_path().into_iter().take(11) {
        bench.tell(fact);
    }
    let found = pages(2);
    assert_eq!(
        bench.tell(Input::Collected { found }),
        ["tell", "Flush", "copy 2 in round 2, Tell"]
    );
    bench.tell(idle(2));
    bench.tell(sent(2, 2));
    bench.tell(done(2, 2));
    let found = pages(2);
    assert_eq!(
        bench.tell(Input::Collected { found }),
        ["copy 2 in round 3, Tell"]
    );
}

#[test]
fn a_paused_move_holds_the_guest_before_the_first_round() {
    let mode = Mode::Paused;
    let mut bench = Bench::with(
        SourceConfig { mode, ..config() },
        RunState::Running,
        Verdict::Stop,
    );
    for (fact, _) in happy_path().into_iter().take(6) {
        bench.tell(fact);
    }
    assert_eq!(
        bench.tell(Input::Received(Message::Prepared)),
        ["Pause(Copy)"]
    );
    let at = bench.now;
    assert_eq!(
        bench.tell(Input::Paused { at, drained: at }),
        ["Flush", "copy what is found in round 1, Skip"]
    );
}

/// Nothing moves while the guest stands: a dead link shows in seconds. The VMM may take longer.
#[test]
fn a_guest_that_stands_is_not_kept_waiting_for_pages() {
    let SourceLimits {
        standing,
        draining,
        offering,
        ..
    } = SourceLimits::default();
    let bounds = |bench: &Bench| bench.machine.poll_timeout().unwrap().since(bench.now);
    let mut bench = Bench::with(config(), RunState::Running, Verdict::Stop);
    let mut seen = Vec::new();
    for (fact, _) in happy_path() {
        let orders = bench.tell(fact);
        let phase = bench.machine.phase();
        if matches!(phase, Phase::Draining | Phase::Offering) {
            seen.push((orders.join(", "), bounds(&bench)));
        }
    }
    let begun = |word: &str| {
        let found = seen.iter().find(|(orders, _)| orders.contains(word));
        found.unwrap_or_else(|| panic!("{word}: {seen:?}")).1
    };
    assert_eq!(begun("rearm Yes"), standing);
    assert_eq!(begun("rearm No"), standing);
    assert_eq!(begun("send Complete"), standing);
    let loading = seen.iter().map(|&(_, bound)| bound).max();
    assert_eq!(loading, Some(offering));
    // Placed before the state is saved.
    let mut bench = Bench::at(Phase::Draining);
    for fact in [scanned(2), sent(2, 2), idle(2), done(2, 2)] {
        bench.tell(fact);
    }
    assert_eq!(bounds(&bench), draining);
    // It stood for the copy already.
    let mut bench = Bench::at(Phase::Copying);
    bench.tell(Input::Command(Command::Suspend));
    let at = bench.now;
    let paused = || Input::Paused { at, drained: at };
    for fact in [paused(), idle(1), sent(1, 3), done(1, 3)] {
        bench.tell(fact);
    }
    bench.tell(Input::Collected { found: pages(1) });
    bench.tell(paused());
    assert_eq!(bench.machine.phase(), Phase::Draining);
    assert_eq!(bounds(&bench), draining);
}

#[test]
fn a_suspended_guest_that_is_resumed_is_sent_within_the_limit_again() {
    let mut bench = Bench::at(Phase::Copying);
    bench.tell(Input::Command(Command::Suspend));
    let at = bench.now;
    assert_eq!(bench.tell(Input::Paused { at, drained: at }), ["Unpace"]);
    let orders = bench.tell(Input::Guest(GuestEvent::ForeignResume));
    assert_eq!(orders, ["Pace", "tell"]);
    // It runs already.
    let orders = bench.tell(Input::Guest(GuestEvent::ForeignResume));
    assert_eq!(orders, ["tell"]);
}

/// It was to be copied live, and stands for the whole copy: no limit is worth that.
#[test]
fn a_live_move_that_is_suspended_before_its_first_round_is_not_paced() {
    let mut bench = Bench::with(config(), RunState::Running, Verdict::Continue);
    let mut facts = happy_path().into_iter();
    while bench.machine.phase() != Phase::Preparing {
        bench.tell(facts.next().unwrap().0);
    }
    bench.tell(Input::Command(Command::Suspend));
    let orders: Vec<_> = facts
        .take(6)
        .flat_map(|(fact, _)| bench.tell(fact))
        .collect();
    assert!(orders.contains(&"Pause(Copy)".to_owned()), "{orders:?}");
    let at = bench.now;
    let orders = bench.tell(Input::Paused { at, drained: at });
    assert_eq!(orders[0], "Unpace");
}

#[test]
fn somebody_elses_resume_turns_a_paused_move_into_a_live_one() {
    let mode = Mode::Paused;
    let mut bench = Bench::with(
        SourceConfig { mode, ..config() },
        RunState::Running,
        Verdict::Continue,
    );
    for (fact, _) in happy_path().into_iter().take(7) {
        bench.tell(fact);
    }
    let orders = bench.tell(Input::Guest(GuestEvent::ForeignResume));
    assert_eq!(
        orders,
        ["tell", "Flush", "copy what is found in round 1, Skip"]
    );
    let at = bench.now;
    bench.tell(Input::Paused { at, drained: at });
    bench.tell(idle(1));
    bench.tell(sent(1, 3));
    bench.tell(done(1, 3));
    let orders = bench.tell(Input::Collected { found: pages(2) });
    assert_eq!(
        orders[0], "copy 2 in round 2, Tell",
        "it runs: the rule decides"
    );
}

#[test]
fn after_go_only_the_targets_word_counts() {
    let words = [
        (Word::Taken, "send Finished"),
        (Word::Refused, "Undo { guest: Running }"),
        (Word::Returned, "Undo { guest: Running }"),
    ];
    for (verdict, order) in words {
        let mut bench = Bench::at(Phase::Given);
        let (code, text) = (AbortCode::Vmm, "no".to_owned());
        assert_eq!(
            bench.tell(Input::Received(Message::Abort { code, text })),
            ["tell", "Ask"]
        );
        assert!(!bench.machine.may_run());
        let orders = bench.tell(Input::Answered(Some(verdict)));
        // The link is down: what would be sent is not.
        let order = if order.starts_with("send") {
            "journal Moved"
        } else {
            order
        };
        assert!(
            orders.contains(&order.to_owned()),
            "{verdict:?}: {orders:?}"
        );
    }
}

#[test]
fn in_doubt_when_nobody_answers() {
    let mut bench = Bench::at(Phase::Given);
    assert_eq!(bench.tell(lost()), ["tell", "Ask"]);
    for _ in 0..3 {
        assert_eq!(bench.tell(Input::Answered(None)), [""; 0]);
        assert_eq!(bench.wait(), ["Ask"]);
    }
    bench.now = bench.now.after(SourceLimits::default().asking);
    let orders = bench.tell(Input::Answered(None));
    assert_eq!(orders, ["CloseLanes", "StopTracking", "finish in doubt"]);
    assert!(!bench.machine.may_run());
}

#[test]
fn running_settles_a_question_that_is_on_its_way() {
    let mut bench = Bench::at(Phase::Given);
    bench.wait();
    let orders = bench.tell(Input::Received(Message::Running { resume_us: 0 }));
    assert_eq!(orders[0], "send Finished", "the link stands");
}

#[test]
fn what_comes_late_while_undoing_changes_nothing() {
    let mut bench = Bench::at(Phase::Preparing);
    bench.tell(Input::Command(Command::Cancel));
    let late = [
        Input::LaneOpen(TWO),
        failure(Step::Journal),
        failure(Step::OpenLanes),
        lost(),
        Input::Command(Command::Cancel),
    ];
    for fact in late {
        assert_eq!(bench.tell(fact), [""; 0]);
    }
    assert_eq!(bench.undone().len(), 1);
    assert_eq!(
        bench.tell(Input::TrackingStopped),
        [""; 0],
        "nothing is ordered after the end"
    );
}

#[test]
fn a_source_that_cannot_be_put_back_says_so() {
    let mut bench = Bench::at(Phase::Copying);
    bench.tell(lost());
    let damage = Failure::new(Step::Undo, "as the test has it");
    bench.tell(Input::Undone(Err(damage)));
    bench.tell(Input::TrackingStopped);
    let orders = bench.tell(failure(Step::Journal));
    let reason = Reason::LinkLost {
        what: "cut".to_owned(),
    };
    assert_eq!(
        orders,
        ["tell".to_owned(), format!("finish kept, damaged: {reason}")]
    );
}

/// Inside the blackout it would be waited for as well. A round of next to nothing takes less than any
/// flush: rounds that only pass the time would follow each other by the thousand.
#[test]
fn a_flush_under_way_is_waited_for_without_another_round() {
    for suspended in [None, Some(Command::Suspend)] {
        let mut bench = Bench::at(Phase::Copying);
        bench.tell(idle(1));
        bench.tell(sent(1, 3));
        assert_eq!(bench.tell(done(1, 3)), ["collect"]);
        assert_eq!(bench.tell(Input::Collected { found: pages(2) }), [""; 0]);
        let at = bench.now;
        match suspended {
            None => assert_eq!(bench.tell(Input::Flushed), ["collect"]),
            Some(suspend) => {
                let orders = bench.tell(Input::Command(suspend));
                assert_eq!(orders, ["tell", "Pause(Copy)"]);
                let orders = bench.tell(Input::Paused { at, drained: at });
                assert_eq!(orders, ["Unpace", "collect"]);
            }
        }
        let orders = bench.tell(Input::Collected { found: pages(1) });
        assert_eq!(orders, ["Pause(Switchover)"]);
    }
}

#[test]
fn a_flush_that_hangs_is_not_waited_for_twice() {
    let mut bench = Bench::at(Phase::Copying);
    bench.tell(idle(1));
    bench.tell(sent(1, 3));
    bench.tell(done(1, 3));
    let found = || Input::Collected { found: pages(2) };
    assert_eq!(bench.tell(found()), [""; 0]);
    assert_eq!(bench.wait(), ["collect"]);
    assert_eq!(bench.machine.poll_timeout(), None);
    assert_eq!(bench.tell(found()), ["Pause(Switchover)"]);
}

/// Stops when the limit is a second.
struct Patient;

impl Converge for Patient {
    fn decide(&mut self, view: &View<'_>) -> Verdict {
        if view.limit >= Duration::from_secs(1) {
            Verdict::Stop
        } else {
            Verdict::Continue
        }
    }
}

#[test]
fn another_downtime_limit_counts_from_the_next_collection() {
    let mut bench = Bench::ruled(config(), RunState::Running, Box::new(Patient));
    let mut facts = happy_path().into_iter();
    while bench.machine.progress(bench.now).round == 0 {
        let (fact, _) = facts.next().unwrap();
        bench.tell(fact);
    }
    let round = |bench: &mut Bench, number: u32, count: u64| {
        for fact in [idle(number), sent(number, count), done(number, count)] {
            bench.tell(fact);
        }
        bench.tell(Input::Collected { found: pages(1) })
    };
    let limit = |bench: &Bench| bench.machine.progress(bench.now).downtime_limit;
    assert_eq!(limit(&bench), config().downtime_limit);
    assert_eq!(round(&mut bench, 1, 3), ["copy 1 in round 2, Tell"]);
    let second = Duration::from_secs(1);
    // Within a round nothing is decided.
    assert!(
        bench
            .tell(Input::Command(Command::SetDowntimeLimit(second)))
            .is_empty()
    );
    assert_eq!(limit(&bench), second);
    bench.tell(Input::Flushed);
    assert_eq!(round(&mut bench, 2, 1), ["Pause(Switchover)"]);
}

#[test]
fn a_downtime_limit_changes_nothing_else_whenever_it_comes() {
    for phase in BEFORE_GO.into_iter().chain(AFTER_GO) {
        let mut bench = Bench::at(phase);
        for limit in [Duration::ZERO, Duration::MAX] {
            let orders = bench.tell(Input::Command(Command::SetDowntimeLimit(limit)));
            assert!(orders.is_empty(), "{phase:?}: {orders:?}");
            assert_eq!(bench.machine.phase(), phase);
            assert_eq!(bench.machine.progress(bench.now).downtime_limit, limit);
        }
    }
}

#[test]
fn a_limit_that_cannot_be_had_is_told_each_time_that_one_is_set() {
    let mut bench = Bench::with(config(), RunState::Running, Verdict::Continue);
    for (fact, _) in happy_path().into_iter().take(8) {
        bench.tell(fact);
    }
    let mut told = Vec::new();
    for number in 1..=6 {
        // 3 ms and 5 ms are below the 10 ms of an empty switchover; 50 ms are not.
        if number % 2 == 1 && number > 1 {
            let limit = Duration::from_millis(number.into());
            bench.tell(Input::Command(Command::SetDowntimeLimit(limit)));
        }
        let count = if number == 1 { 3 } else { 1 };
        for fact in [idle(number), sent(number, count), done(number, count)] {
            bench.tell(fact);
        }
        let orders = bench.tell(Input::Collected { found: pages(1) });
        told.push(orders.contains(&"tell".to_owned()));
    }
    assert_eq!(told, [false, false, true, false, true, false]);
}

#[test]
fn it_is_given_away_from_go_until_the_target_says_no() {
    let given_away = |bench: &Bench| bench.machine.progress(bench.now).given_away;
    for phase in BEFORE_GO {
        assert!(!given_away(&Bench::at(phase)), "{phase:?}");
    }
    for phase in AFTER_GO {
        assert!(given_away(&Bench::at(phase)), "{phase:?}");
    }
    let mut bench = Bench::at(Phase::Given);
    bench.tell(lost());
    assert!(given_away(&bench), "nobody knows");
    bench.tell(Input::Answered(Some(Word::Refused)));
    assert_eq!(bench.machine.phase(), Phase::Undoing);
    assert!(!given_away(&bench));
}
