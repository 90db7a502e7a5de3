//! Lanes that die, fact by fact, in every state of the source.

use std::time::Duration;

use ferry_stream::message::{AbortCode, LaneId, Message};

use super::bench::*;
use crate::core::converge::Verdict;
use crate::core::message::{Failure, Input, Moment, Phase, Reclaimed, Step};
use crate::core::pageset::PageSet;
use crate::vmm::RunState;

fn dies(lane: LaneId) -> Input {
    let what = "reset".to_owned();
    Input::LaneLost { lane, what }
}

fn dies_there(lane: LaneId) -> Input {
    let text = "reset".to_owned();
    Input::Received(Message::LaneLost { lane, text })
}

fn fenced(lane: LaneId, pages: u64) -> Input {
    Input::Received(Message::Fenced {
        lane,
        frames: 7,
        pages,
    })
}

/// So many pages of a round are in place, so many are not.
fn reclaimed(lane: LaneId, round: u32, placed: u64, found: PageSet) -> Input {
    let from = Reclaimed {
        round: ferry_stream::message::Round(round),
        placed,
        since_end: placed,
        found,
    };
    Input::Reclaimed { lane, from }
}

/// A machine at its first round, under a rule that always says the same.
fn copying(verdict: Verdict) -> Bench {
    let mut bench = Bench::with(config(), RunState::Running, verdict);
    let mut facts = happy_path().into_iter();
    while bench.machine.phase() != Phase::Copying {
        bench.tell(facts.next().unwrap().0);
    }
    bench.tell(Input::Flushed);
    bench
}

#[test]
fn the_round_goes_on_and_what_is_owed_goes_with_the_next() {
    let mut bench = copying(Verdict::Continue);
    let orders = bench.tell(dies(TWO));
    assert_eq!(orders, ["cut lane 2", "send Fence", "tell"]);
    assert_eq!(bench.tell(dies_there(TWO)), [""; 0], "known");
    assert_eq!(bench.tell(sent(1, 1)), [""; 0]);
    assert_eq!(bench.tell(fenced(TWO, 1)), ["reclaim lane 2 from 7"]);
    assert_eq!(bench.tell(done(1, 2)), [""; 0], "what is owed is not known");
    let orders = bench.tell(reclaimed(TWO, 1, 1, pages(3)));
    assert_eq!(orders, ["collect"]);
    let found = PageSet::empty(&layout());
    let orders = bench.tell(Input::Collected { found });
    assert_eq!(orders, ["Flush", "copy 3 in round 2, Tell"]);
}

#[test]
fn a_lane_that_had_ended_the_round_counts_by_what_came() {
    let mut bench = copying(Verdict::Continue);
    bench.tell(lane_sent(TWO, 1, 5));
    bench.tell(dies(TWO));
    bench.tell(sent(1, 1));
    bench.tell(fenced(TWO, 2));
    bench.tell(reclaimed(TWO, 1, 2, pages(3)));
    let orders = bench.tell(done(1, 3));
    assert_eq!(orders, ["collect"]);
}

#[test]
fn a_fence_that_counts_differently_ends_it() {
    let mut bench = copying(Verdict::Continue);
    bench.tell(dies(TWO));
    bench.tell(fenced(TWO, 2));
    let orders = bench.tell(reclaimed(TWO, 1, 1, pages(0)));
    gives_up(&bench, &orders);
    assert!(bench.undone()[0].contains("1 pages by our count, 2 by the peer's"));
}

#[test]
fn a_fence_that_nobody_asked_for_ends_it() {
    let mut bench = copying(Verdict::Continue);
    let orders = bench.tell(fenced(TWO, 0));
    gives_up(&bench, &orders);
}

#[test]
fn the_last_lane_is_the_link_unless_the_peer_says_why() {
    let mut bench = copying(Verdict::Continue);
    bench.tell(dies(ONE));
    assert_eq!(bench.tell(dies(TWO)), ["cut lane 2", "send Fence"]);
    let orders = bench.wait();
    gives_up(&bench, &orders);
    assert!(bench.undone()[0].contains("page lane 2: reset"));

    let mut told = copying(Verdict::Continue);
    told.tell(dies(ONE));
    told.tell(dies(TWO));
    let (code, text) = (AbortCode::Memory, "no room".to_owned());
    told.tell(Input::Received(Message::Abort { code, text }));
    assert!(told.undone()[0].contains("no room"));
}

#[test]
fn a_dead_lane_is_opened_again_and_joins_the_open_round() {
    let mut bench = copying(Verdict::Continue);
    bench.tell(dies(TWO));
    bench.tell(fenced(TWO, 0));
    bench.tell(reclaimed(TWO, 1, 0, pages(0)));
    let wait = config().limits.redial;
    let due = bench.now.after(wait);
    assert_eq!(bench.machine.poll_timeout(), Some(due));
    assert_eq!(bench.wait(), ["open lane 2 (generation 1)"]);
    let again = lane(2, 1);
    let orders = bench.tell(Input::LaneOpen(again));
    assert_eq!(orders, ["join lane 2 (generation 1)"]);
    bench.tell(sent(1, 3));
    assert_eq!(bench.tell(done(1, 3)), [""; 0], "it has not ended");
    let orders = bench.tell(lane_sent(again, 1, 0));
    assert_eq!(orders, ["collect"]);
    assert_eq!(bench.tell(dies(TWO)), [""; 0], "an earlier generation");
}

#[test]
fn the_wait_before_a_lane_is_opened_again_grows_and_is_bounded() {
    let mut bench = copying(Verdict::Continue);
    let mut waits: Vec<Duration> = Vec::new();
    for generation in 0..10 {
        let lane = lane(2, generation);
        bench.tell(dies(lane));
        bench.tell(fenced(lane, 0));
        bench.tell(reclaimed(lane, 1, 0, pages(0)));
        let before = bench.now;
        bench.wait();
        waits.push(bench.now.since(before));
        let next = lane.successor().unwrap();
        bench.tell(Input::LaneOpen(next));
    }
    assert_eq!(waits[1], waits[0] * 2);
    assert_eq!(waits[9], waits[0] * 32, "bounded");
}

#[test]
fn a_guest_that_stands_does_not_wait_for_a_lane_to_open() {
    let mut bench = copying(Verdict::Stop);
    bench.tell(dies(TWO));
    bench.tell(fenced(TWO, 0));
    bench.tell(reclaimed(TWO, 1, 0, pages(0)));
    bench.wait();
    bench.tell(sent(1, 3));
    bench.tell(done(1, 3));
    let orders = bench.tell(Input::Collected { found: pages(1) });
    let again = "cut lane 2 (generation 1)";
    // Before that it may tell what the long wait makes it think of the limit.
    assert!(orders.ends_with(&[again, "send Fence", "Pause(Switchover)"].map(str::to_owned)));
    assert_eq!(bench.tell(Input::LaneOpen(lane(2, 1))), [""; 0]);
    bench.tell(fenced(lane(2, 1), 0));
    bench.tell(reclaimed(lane(2, 1), 0, 0, pages(0)));
    let next = bench.machine.poll_timeout().unwrap();
    assert!(
        next > bench.now.after(config().limits.redial * 32),
        "not now"
    );
}

#[test]
fn a_guest_runs_on_while_no_lane_stands() {
    let mut bench = copying(Verdict::Stop);
    bench.tell(dies(TWO));
    bench.tell(fenced(TWO, 0));
    bench.tell(reclaimed(TWO, 1, 0, pages(0)));
    bench.wait();
    bench.tell(sent(1, 3));
    bench.tell(done(1, 3));
    bench.tell(dies(ONE));
    let orders = bench.tell(Input::Collected { found: pages(1) });
    assert_eq!(orders, ["tell", "Flush", "copy 1 in round 2, Tell"]);
}

/// At the last round, with lane 2 dead in it.
fn dying_at_the_end() -> Bench {
    let mut bench = Bench::at(Phase::Offering);
    bench.tell(Input::Inventoried(Box::new(inventory())));
    assert_eq!(bench.tell(dies(TWO)), ["cut lane 2", "send Fence", "tell"]);
    bench
}

#[test]
fn complete_is_said_again_when_a_fence_has_voided_it() {
    let mut bench = dying_at_the_end();
    bench.tell(fenced(TWO, 0));
    bench.tell(reclaimed(TWO, 3, 0, pages(0)));
    bench.tell(sent(3, 1));
    assert_eq!(bench.tell(done(3, 1)), ["send Complete"]);
    let orders = bench.tell(Input::Received(Message::Ready { load_us: 0 }));
    assert_eq!(orders, ["journal Given"]);
}

#[test]
fn what_is_owed_at_the_end_goes_before_the_guest_is_given() {
    let mut bench = dying_at_the_end();
    bench.tell(fenced(TWO, 0));
    bench.tell(reclaimed(TWO, 3, 0, pages(1)));
    bench.tell(sent(3, 0));
    let orders = bench.tell(done(3, 0));
    assert_eq!(orders, ["copy 1 in round 4, Tell", "send Complete"]);
    bench.tell(sent(4, 1));
    assert_eq!(bench.tell(done(4, 1)), [""; 0]);
    let orders = bench.tell(Input::Received(Message::Ready { load_us: 0 }));
    assert_eq!(orders, ["journal Given"]);
}

#[test]
fn complete_stands_when_the_round_was_done_before_the_fence() {
    let mut bench = dying_at_the_end();
    bench.tell(sent(3, 1));
    assert_eq!(bench.tell(done(3, 1)), [""; 0]);
    assert_eq!(
        bench.tell(Input::Received(Message::Ready { load_us: 0 })),
        [""; 0]
    );
    bench.tell(fenced(TWO, 0));
    let orders = bench.tell(reclaimed(TWO, 3, 0, pages(0)));
    assert_eq!(orders, ["journal Given"]);
}

/// Before the last round, lane 2 dies when it has brought all.
fn draining_and_dying() -> Bench {
    let mut bench = Bench::at(Phase::Draining);
    bench.tell(scanned(2));
    bench.tell(sent(2, 2));
    bench.tell(idle(2));
    bench.tell(done(2, 2));
    bench.tell(dies(TWO));
    bench
}

#[test]
fn a_fence_from_before_the_last_round_does_not_void_complete() {
    let mut bench = draining_and_dying();
    let orders = bench.tell(Input::Saved { bytes: 9, crc: 7 });
    assert_eq!(orders[0], "Inventory");
    assert_eq!(orders[1], "scan, and 0, rearm No");
    assert_eq!(bench.tell(scanned(1)), ["send Complete"]);
    bench.tell(fenced(TWO, 0));
    bench.tell(reclaimed(TWO, 2, 0, pages(0)));
    bench.tell(sent(3, 1));
    assert_eq!(bench.tell(done(3, 1)), [""; 0]);
}

/// What the lane took is not in place, and how much that is nobody knows when the scan ends.
#[test]
fn a_lane_that_dies_during_the_last_scan_puts_off_complete() {
    for owed in [0, 2] {
        let mut bench = Bench::at(Phase::Draining);
        bench.tell(scanned(2));
        bench.tell(Input::Saved { bytes: 9, crc: 7 });
        bench.tell(sent(2, 2));
        bench.tell(idle(2));
        bench.tell(done(2, 2));
        bench.tell(dies(TWO));
        assert_eq!(bench.tell(scanned(3)), [""; 0], "its number would be wrong");
        assert_eq!(bench.machine.phase(), Phase::Offering);
        bench.tell(fenced(TWO, 0));
        bench.tell(reclaimed(TWO, 3, 0, pages(owed)));
        bench.tell(sent(3, 3 - owed));
        let orders = bench.tell(done(3, 3 - owed));
        match owed {
            0 => assert_eq!(orders, ["send Complete"]),
            _ => assert_eq!(orders, ["copy 2 in round 4, Tell", "send Complete"]),
        }
    }
}

#[test]
fn the_death_of_a_lane_is_no_news_once_everything_is_in_place() {
    let mut offering = Bench::at(Phase::Offering);
    offering.tell(sent(3, 1));
    offering.tell(idle(3));
    offering.tell(done(3, 1));
    assert_eq!(offering.tell(dies(ONE)), [""; 0]);
    assert_eq!(offering.tell(dies_there(TWO)), [""; 0]);
    let rest = [Phase::Giving, Phase::Given, Phase::Leaving];
    for phase in rest {
        let mut bench = Bench::at(phase);
        for fact in [dies(ONE), dies_there(TWO), dies(TWO)] {
            assert_eq!(bench.tell(fact), [""; 0], "{phase}");
        }
        assert_eq!(bench.machine.phase(), phase);
    }
}

#[test]
fn one_lane_that_cannot_be_opened_is_missed_and_all_are_a_reason() {
    let unopened = |lane| Input::LaneUnopened {
        lane,
        failure: Failure::new(Step::OpenLanes, "refused"),
    };
    let greeted = || {
        let mut bench = Bench::with(config(), RunState::Running, Verdict::Stop);
        bench.tell(happy_path().remove(0).0);
        bench
    };
    let mut one = greeted();
    let orders = one.tell(unopened(TWO));
    assert_eq!(orders, ["cut lane 2", "send Fence", "tell"]);
    for (fact, _) in happy_path().into_iter().skip(1).take(6) {
        if !matches!(fact, Input::LaneOpen(TWO)) {
            one.tell(fact);
        }
    }
    assert_eq!(one.machine.phase(), Phase::Copying);
    let mut both = greeted();
    both.tell(unopened(TWO));
    both.tell(unopened(ONE));
    let orders = both.wait();
    gives_up(&both, &orders);
    assert!(both.undone()[0].contains("opening the page lanes failed"));
}

#[test]
fn a_cancel_while_a_lane_is_fenced_waits_for_no_answer() {
    let mut bench = copying(Verdict::Continue);
    bench.tell(dies(TWO));
    let orders = bench.tell(Input::Command(crate::core::message::Command::Cancel));
    gives_up(&bench, &orders);
    assert_eq!(bench.tell(fenced(TWO, 0)), [""; 0]);
    assert_eq!(bench.tell(reclaimed(TWO, 1, 0, pages(2))), [""; 0]);
    assert_eq!(bench.undone(), ["finish kept, Running: cancelled"]);
}

#[test]
fn progress_tells_of_lanes() {
    let mut bench = copying(Verdict::Continue);
    let lanes = |bench: &Bench| {
        let progress = bench.machine.progress(Moment::default());
        (progress.lanes, progress.lanes_lost)
    };
    assert_eq!(lanes(&bench), (2, 0));
    bench.tell(dies(TWO));
    assert_eq!(lanes(&bench), (1, 1));
    let report = bench.machine.report(bench.now);
    assert_eq!((report.lanes, report.lanes_lost), (2, 1));
}
