//! Post-copy at the target, fact by fact.

use bytes::Bytes;
use ferry_stream::message::{Absence, Features, Message, Run};

use super::bench::*;
use super::*;
use crate::core::message::{Failure, Phase, Record};

fn absent(first: u64, count: u64) -> Input {
    Input::Received(Message::Absent(Absence {
        region: 0,
        first,
        count,
        map: Bytes::new(),
    }))
}

fn got(message: Message) -> Input {
    Input::Received(message)
}

/// Receiving, from a source that may hand over before its pages.
fn receiving(features: Features) -> Bench {
    let mut bench = Bench::new();
    bench.tell(got(Message::Hello(ferry_stream::message::Hello {
        features,
        ..hello()
    })));
    bench.tell(Input::Journaled(Record::Receiving));
    bench.tell(Input::Prepared);
    assert_eq!(bench.machine.phase(), Phase::Receiving);
    bench
}

/// Armed, and loading.
fn armed() -> Bench {
    let mut bench = receiving(Features::POSTCOPY);
    assert_eq!(bench.tell(absent(0, 5)), [""; 0]);
    let discards = bench.tell(got(Message::Discard));
    assert!(discards[0].contains("PageSet(5 pages)"), "{discards:?}");
    assert_eq!(bench.tell(Input::Discarded), ["send Discarded"]);
    bench.tell(got(Message::Paused));
    assert_eq!(bench.tell(absent(4, 3)), [""; 0]);
    let arms = bench.tell(complete(0, 0));
    assert!(
        arms[0].contains("Arm") && arms[0].contains("PageSet(7 pages)"),
        "{arms:?}"
    );
    assert_eq!(bench.machine.phase(), Phase::Loading);
    assert_eq!(bench.tell(Input::Armed), ["ReleaseLoad"]);
    bench
}

/// The guest runs here.
fn taken() -> Bench {
    let mut bench = armed();
    assert_eq!(bench.tell(Input::Loaded), ["send Ready"]);
    assert_eq!(
        bench.tell(got(Message::Go { run: Run::Run })),
        ["journal Taken"]
    );
    assert_eq!(bench.tell(Input::Journaled(Record::Taken)), ["Resume"]);
    assert_eq!(bench.tell(Input::Resumed), ["send Running"]);
    bench
}

#[test]
fn it_stays_until_every_page_is_there_and_nobody_waits() {
    let mut bench = taken();
    assert_eq!(bench.wait(), ["Restore"], "its first moments are over");
    assert_eq!(
        bench.tell(got(Message::Finished)),
        [""; 0],
        "not without its pages"
    );
    assert_eq!(bench.tell(Input::Whole), ["Disarm"]);
    assert_eq!(bench.tell(Input::Disarmed), ["finish moved"]);
}

#[test]
fn the_guest_has_its_first_moments_before_it_is_disarmed() {
    let mut bench = taken();
    assert_eq!(bench.tell(Input::Whole), [""; 0]);
    assert_eq!(bench.wait(), ["Restore", "Disarm"]);
    assert_eq!(
        bench.tell(Input::Disarmed),
        [""; 0],
        "the source may not know"
    );
    assert_eq!(bench.tell(got(Message::Finished)), ["finish moved"]);
}

#[test]
fn pages_may_all_be_there_before_the_guest_is() {
    let mut bench = armed();
    assert_eq!(bench.tell(Input::Whole), [""; 0]);
    bench.tell(Input::Loaded);
    bench.tell(got(Message::Go { run: Run::Run }));
    bench.tell(Input::Journaled(Record::Taken));
    bench.tell(Input::Resumed);
    assert_eq!(bench.wait(), ["Restore", "Disarm"]);
}

#[test]
fn a_lost_link_is_waited_out_as_long_as_pages_are_missing() {
    let mut bench = taken();
    let what = "cut".to_owned();
    bench.tell(Input::LinkLost { what });
    assert_eq!(bench.wait(), ["Restore"]);
    for _ in 0..10 {
        assert_eq!(bench.wait(), [""; 0]);
        assert_eq!(bench.machine.phase(), Phase::Taken);
    }
    assert_eq!(bench.tell(Input::Whole), ["Disarm"]);
    assert_eq!(bench.tell(Input::Disarmed), [""; 0]);
    let before = bench.now;
    assert_eq!(bench.tell(Input::SourceLeft), [""; 0]);
    assert_eq!(bench.wait(), ["finish moved"]);
    let parting = TargetLimits::default().parting;
    assert!(
        bench.now.since(before) < parting + parting,
        "it does not linger"
    );
}

#[test]
fn a_vmm_that_dies_without_its_pages_leaves_doubt() {
    let mut bench = taken();
    let what = "killed".to_owned();
    let ends = bench.tell(Input::Guest(crate::vmm::GuestEvent::Gone { what }));
    assert_eq!(ends, ["send Abort", "finish in doubt"]);
}

#[test]
fn faults_that_cannot_be_armed_or_disarmed() {
    let mut bench = receiving(Features::POSTCOPY);
    bench.tell(absent(0, 5));
    bench.tell(complete(0, 0));
    let failure = |step| Input::Failed(Failure::new(step, "as the test has it"));
    assert_eq!(bench.tell(failure(Step::Arm)), REFUSAL);
    let mut bench = taken();
    bench.wait();
    bench.tell(got(Message::Finished));
    bench.tell(Input::Whole);
    assert_eq!(bench.tell(failure(Step::Disarm)), ["tell", "finish moved"]);
}

#[test]
fn what_was_not_agreed_on_or_cannot_be_is_refused() {
    assert_eq!(receiving(Features::NONE).tell(absent(0, 5)), REFUSAL);
    assert_eq!(receiving(Features::POSTCOPY).tell(absent(15, 2)), REFUSAL);
    let mut bench = receiving(Features::POSTCOPY);
    assert_eq!(bench.tell(got(Message::Discard)), REFUSAL, "of nothing");
    assert_eq!(armed().tell(absent(0, 1)), REFUSAL, "too late");
}
