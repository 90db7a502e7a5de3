//! Post-copy at the source, fact by fact.

use ferry_stream::message::{Features, Message, Versions, Welcome};

use super::bench::*;
use super::*;
use crate::core::converge::Verdict;
use crate::core::message::{Command, Moment, Phase, Record, Step};
use crate::core::postcopy::Way;
use crate::vmm::RunState;

fn welcome(features: Features) -> Input {
    Input::Received(Message::Welcome(Welcome {
        version: Versions::OURS.highest,
        features,
        lanes: 2,
    }))
}

fn allowed(postcopy: Postcopy) -> Bench {
    let config = SourceConfig {
        postcopy,
        ..config()
    };
    Bench::with(config, RunState::Running, Verdict::Continue)
}

fn found(count: u64) -> Input {
    Input::Collected {
        found: pages(count),
    }
}

fn got(message: Message) -> Input {
    Input::Received(message)
}

fn paused() -> Input {
    let at = Moment(Duration::from_millis(9));
    Input::Paused { at, drained: at }
}

/// Everything up to the first order that is not part of getting ready.
fn ready(bench: &mut Bench) -> Vec<String> {
    bench.tell(welcome(Features::POSTCOPY));
    bench.tell(Input::Journaled(Record::Migrating));
    bench.tell(Input::LaneOpen(ONE));
    bench.tell(Input::LaneOpen(TWO));
    bench.tell(Input::StateOpen);
    bench.tell(got(Message::Prepared))
}

/// From the announcement to the target's word that it runs.
fn hand_over(bench: &mut Bench) -> Vec<String> {
    assert_eq!(bench.tell(got(Message::Discarded)), ["Pause(Switchover)"]);
    assert_eq!(bench.tell(paused()), ["send Paused", "Save"]);
    let looks = bench.tell(Input::Saved { bytes: 9, crc: 7 });
    assert_eq!(looks[0], "Inventory");
    let told = bench.tell(found(5));
    bench.tell(got(Message::Ready { load_us: 0 }));
    let given = bench.tell(Input::Inventoried(Box::new(inventory())));
    assert_eq!(given, ["journal Given"]);
    assert_eq!(bench.tell(Input::Journaled(Record::Given)), ["send Go"]);
    told
}

fn runs() -> Input {
    got(Message::Running { resume_us: 0 })
}

#[test]
fn at_once_nothing_is_tracked_or_copied() {
    let mut bench = allowed(Postcopy::Now);
    let looks = ready(&mut bench);
    assert!(looks[0].starts_with("Survey"), "{looks:?}");
    assert_eq!(bench.tell(found(3)), ["send Absent", "send Discard"]);
    let told = hand_over(&mut bench);
    // Pages 0 to 2 were told before.
    assert_eq!(told[..2], ["send Absent", "send Complete"]);
    assert!(told[2].contains("missing: PageSet(5 pages)"), "{told:?}");
    assert!(told[2].contains("first: PageSet(0 pages)"), "{told:?}");
    assert_eq!(bench.tell(runs()), [""; 0]);
    assert_eq!(bench.machine.phase(), Phase::Serving);
    assert!(!bench.machine.may_run());
    assert_eq!(bench.tell(Input::Whole), ["send Finished", "journal Moved"]);
    assert_eq!(bench.machine.phase(), Phase::Leaving);
}

#[test]
fn a_target_that_is_whole_before_it_runs_is_served_no_more() {
    let mut bench = allowed(Postcopy::Now);
    ready(&mut bench);
    bench.tell(found(3));
    hand_over(&mut bench);
    assert_eq!(bench.tell(Input::Whole), [""; 0]);
    assert_eq!(bench.tell(runs()), ["send Finished", "journal Moved"]);
}

#[test]
fn nothing_but_a_dead_target_ends_the_serving() {
    let mut bench = allowed(Postcopy::Now);
    ready(&mut bench);
    bench.tell(found(3));
    hand_over(&mut bench);
    bench.tell(runs());
    assert_eq!(bench.tell(lost()), [""; 0]);
    assert_eq!(bench.tell(Input::Command(Command::Cancel)), ["tell"]);
    assert_eq!(bench.tell(failure(Step::Retire)), ["tell"]);
    assert_eq!(
        bench.machine.poll_timeout(),
        None,
        "it takes as long as it takes"
    );
    assert_eq!(bench.machine.phase(), Phase::Serving);
    let gone = Message::Abort {
        code: ferry_stream::message::AbortCode::GuestGone,
        text: "died".into(),
    };
    let ends = bench.tell(got(gone));
    assert_eq!(ends.last().unwrap(), "finish in doubt");
}

/// A source that lost the link with Go asks for as long as it takes: the guest may wait for its pages.
#[test]
fn asking_has_no_end_while_pages_are_missing() {
    let mut bench = allowed(Postcopy::Now);
    ready(&mut bench);
    bench.tell(found(3));
    hand_over(&mut bench);
    assert_eq!(bench.tell(lost()), ["tell", "Ask"]);
    for _ in 0..1000 {
        bench.tell(Input::Answered(None));
        assert_eq!(bench.wait(), ["Ask"]);
    }
    let taken = Input::Answered(Some(ferry_stream::message::Verdict::Taken));
    bench.tell(taken);
    assert_eq!(bench.machine.phase(), Phase::Serving);
}

#[test]
fn a_round_is_cut_short_and_what_is_left_of_it_is_missing() {
    let mut bench = allowed(Postcopy::Allowed);
    bench.tell(welcome(Features::POSTCOPY));
    bench.tell(Input::Journaled(Record::Migrating));
    bench.tell(Input::LaneOpen(ONE));
    bench.tell(Input::LaneOpen(TWO));
    bench.tell(Input::StateOpen);
    bench.tell(got(Message::Prepared));
    assert_eq!(bench.tell(Input::Command(Command::Postcopy)), ["CutShort"]);
    assert_eq!(
        bench.tell(Input::Command(Command::Postcopy)),
        [""; 0],
        "once"
    );
    bench.tell(tracking(9));
    bench.tell(idle(1));
    bench.tell(sent(1, 2));
    let left = bench.tell(done(1, 2));
    assert!(left[0].starts_with("TakeLeft"), "{left:?}");
    assert_eq!(bench.tell(Input::Left { left: pages(3) }), ["collect"]);
    assert_eq!(bench.tell(found(1)), ["send Absent", "send Discard"]);
    let told = hand_over(&mut bench);
    assert!(told[2].contains("missing: PageSet(5 pages)"), "{told:?}");
    assert!(told[2].contains("first: PageSet(5 pages)"), "{told:?}");
}

#[test]
fn after_one_round_when_so_ordered() {
    let mut bench = allowed(Postcopy::AfterPrecopy);
    ready(&mut bench);
    bench.tell(tracking(3));
    bench.tell(idle(1));
    bench.tell(sent(1, 3));
    let left = bench.tell(done(1, 3));
    assert!(left[0].starts_with("TakeLeft"), "{left:?}");
    bench.tell(Input::Left { left: pages(0) });
    // Nothing was written: nothing need be discarded, and nothing be missing.
    assert_eq!(bench.tell(found(0)), ["Pause(Switchover)"]);
    bench.tell(paused());
    bench.tell(Input::Saved { bytes: 9, crc: 7 });
    assert_eq!(bench.tell(found(0)), ["send Complete"]);
    assert_eq!(bench.machine.progress(bench.now).postcopy, Way::Whole);
}

#[test]
fn the_rule_may_hand_over() {
    let config = SourceConfig {
        postcopy: Postcopy::Allowed,
        ..config()
    };
    let mut bench = Bench::with(config, RunState::Running, Verdict::Postcopy);
    ready(&mut bench);
    bench.tell(tracking(3));
    bench.tell(idle(1));
    bench.tell(sent(1, 3));
    assert_eq!(bench.tell(done(1, 3)), ["collect"]);
    assert_eq!(
        bench.tell(found(2)),
        ["tell", "send Absent", "send Discard"]
    );
}

/// By the word of the rule after two looks in a row.
#[test]
fn a_first_round_that_is_outrun_is_cut_short() {
    let config = SourceConfig {
        postcopy: Postcopy::Allowed,
        ..config()
    };
    let mut bench = Bench::with(config, RunState::Running, Verdict::Postcopy);
    ready(&mut bench);
    bench.tell(tracking(16));
    let look =
        |bench: &mut Bench| bench.tell(Input::Sent(crate::core::message::LaneTotals::default()));
    assert_eq!(look(&mut bench), ["Peek"]);
    assert_eq!(look(&mut bench), [""; 0], "one at a time");
    // It is too early to say anything.
    assert_eq!(bench.tell(Input::Peeked(16)), [""; 0]);
    bench.now = bench.now.after(Duration::from_millis(200));
    for orders in [vec![], vec!["tell", "CutShort"]] {
        assert_eq!(look(&mut bench), ["Peek"]);
        assert_eq!(bench.tell(Input::Peeked(16)), orders);
    }
    assert_eq!(look(&mut bench), [""; 0], "it is decided");
}

#[test]
fn a_target_that_cannot_is_told_of_or_refused() {
    for explicit in [Postcopy::Now, Postcopy::AfterPrecopy] {
        let mut bench = allowed(explicit);
        let refused = bench.tell(welcome(Features::NONE));
        assert_eq!(refused[0], "send Abort");
        assert!(
            refused[1].starts_with("finish kept, untouched"),
            "{refused:?}"
        );
    }
    let mut bench = allowed(Postcopy::Allowed);
    assert_eq!(bench.tell(welcome(Features::NONE))[0], "tell");
    assert_eq!(bench.machine.progress(bench.now).postcopy, Way::Closed);
    assert_eq!(bench.tell(Input::Command(Command::Postcopy)), ["tell"]);
}

/// Up to Go nothing is lost by giving up.
#[test]
fn trouble_before_go_keeps_the_guest() {
    let steps: [fn(&mut Bench); 4] = [
        |bench| drop(bench.tell(found(3))),
        |bench| drop(bench.tell(got(Message::Discarded))),
        |bench| drop(bench.tell(paused())),
        |bench| {
            bench.tell(Input::Saved { bytes: 9, crc: 7 });
            bench.tell(found(5));
        },
    ];
    for count in 0..=steps.len() {
        let mut bench = allowed(Postcopy::Now);
        ready(&mut bench);
        steps[..count].iter().for_each(|step| step(&mut bench));
        let orders = bench.tell(lost());
        gives_up(&bench, &orders);
        assert!(
            orders.iter().any(|order| order.starts_with("Undo")),
            "{orders:?}"
        );
    }
}
