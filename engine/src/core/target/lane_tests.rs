//! Lanes that join, die and are fenced, fact by fact, in every state of the target.

use ferry_stream::message::{LaneId, Message};

use super::bench::*;
use crate::core::message::{Input, LaneSeen, Phase};

fn fence(lane: LaneId) -> Input {
    Input::Received(Message::Fence(lane))
}

fn lane_ended(lane: LaneId, pages: u64) -> Input {
    Input::LaneEnded {
        lane,
        frames: 4,
        pages,
    }
}

fn dies(lane: LaneId) -> Input {
    let what = "reset".to_owned();
    Input::LaneLost { lane, what }
}

#[test]
fn a_fence_is_answered_when_the_worker_has_ended_and_the_round_goes_on_without_it() {
    let mut bench = Bench::at(Phase::Receiving);
    bench.tell(ended(1, 5));
    let end = format!("EndLane({TWO:?})");
    assert_eq!(bench.tell(fence(TWO)), [end]);
    let orders = bench.tell(lane_ended(TWO, 3));
    assert_eq!(orders, ["send Fenced", "send RoundDone"]);
    bench.tell(complete(2, 9));
    let orders = bench.tell(ended(2, 1));
    assert_eq!(orders, ["send RoundDone", "ReleaseLoad"], "5, 3 and 1");
}

#[test]
fn an_end_of_the_round_that_was_told_before_the_worker_ended_counts() {
    let mut bench = Bench::at(Phase::Receiving);
    bench.tell(ended(1, 5));
    bench.tell(fence(TWO));
    assert_eq!(bench.tell(ended_by(TWO, 1, 3)), [""; 0]);
    let orders = bench.tell(lane_ended(TWO, 0));
    assert_eq!(orders, ["send Fenced", "send RoundDone"]);
    bench.tell(complete(1, 8));
    assert_eq!(bench.machine.phase(), Phase::Loading);
}

#[test]
fn the_source_is_told_once_and_acts_itself() {
    let mut bench = Bench::at(Phase::Receiving);
    assert_eq!(bench.tell(dies(TWO)), ["send LaneLost"]);
    assert_eq!(bench.tell(dies(TWO)), [""; 0]);
    assert_eq!(bench.tell(dies(ONE)), ["send LaneLost"]);
    assert_eq!(bench.machine.phase(), Phase::Receiving);
    for phase in [Phase::Loading, Phase::Offered, Phase::Taking, Phase::Taken] {
        let mut late = Bench::at(phase);
        assert_eq!(late.tell(dies(TWO)), [""; 0], "{phase}");
        assert_eq!(late.machine.phase(), phase);
    }
}

#[test]
fn a_lane_that_was_fenced_before_it_came_is_turned_away() {
    let mut bench = Bench::at(Phase::Receiving);
    bench.tell(fence(TWO));
    bench.tell(lane_ended(TWO, 0));
    let next = lane(2, 1);
    assert_eq!(bench.tell(fence(next)), ["send Fenced"]);
    assert!(bench.machine.enlist(TWO).is_err());
    assert!(bench.machine.enlist(next).is_err());
    assert!(bench.machine.enlist(lane(3, 0)).is_err(), "not agreed on");
    assert!(bench.machine.enlist(ONE).is_err(), "it is there");
    bench.machine.enlist(lane(2, 2)).unwrap();
    assert_eq!(bench.tell(fence(next)), REFUSAL, "nobody fences twice");
}

#[test]
fn a_lane_takes_part_from_its_hello_on() {
    let mut bench = Bench::at(Phase::Receiving);
    bench.tell(fence(TWO));
    bench.tell(lane_ended(TWO, 0));
    assert_eq!(bench.tell(ended(1, 5)), ["send RoundDone"]);
    let next = lane(2, 1);
    bench.machine.enlist(next).unwrap();
    assert_eq!(bench.tell(ended_by(next, 1, 0)), [""; 0], "it is done");
    assert_eq!(bench.tell(ended(2, 5)), [""; 0]);
    assert_eq!(bench.tell(ended_by(next, 2, 1)), ["send RoundDone"]);
    let orders = bench.tell(ended_by(next, 1, 3));
    assert_eq!(orders, REFUSAL, "pages of a round that is done");
}

#[test]
fn a_fence_voids_what_was_said_of_the_end() {
    let mut bench = Bench::at(Phase::Receiving);
    bench.tell(complete(1, 9));
    bench.tell(fence(TWO));
    bench.tell(lane_ended(TWO, 0));
    assert_eq!(bench.tell(ended(1, 5)), ["send RoundDone"]);
    bench.tell(complete(2, 9));
    let orders = bench.tell(ended(2, 4));
    assert_eq!(orders, ["send RoundDone", "ReleaseLoad"]);
}

#[test]
fn complete_may_come_again_for_a_round_that_is_done() {
    let mut bench = Bench::at(Phase::Receiving);
    bench.tell(complete(1, 5));
    bench.tell(fence(TWO));
    bench.tell(lane_ended(TWO, 0));
    bench.tell(ended(1, 5));
    assert_eq!(bench.tell(complete(1, 5)), ["ReleaseLoad"]);
}

#[test]
fn a_fence_that_comes_when_ram_is_complete_changes_nothing() {
    for phase in [Phase::Loading, Phase::Offered] {
        let mut bench = Bench::at(phase);
        bench.machine.handle(bench.now, fence(TWO));
        let answer = bench.machine.poll_action();
        let fenced = Message::Fenced {
            lane: TWO,
            frames: 4,
            pages: 0,
        };
        let right = matches!(
            &answer,
            Some(crate::core::message::Action::Send(told)) if *told == fenced
        );
        assert!(right, "{answer:?}");
        assert_eq!(bench.machine.phase(), phase);
        assert!(bench.machine.enlist(lane(2, 1)).is_err(), "RAM is complete");
    }
}

#[test]
fn a_round_needs_a_lane_that_stands() {
    let mut bench = Bench::at(Phase::Receiving);
    for lane in [ONE, TWO] {
        bench.tell(fence(lane));
        assert_eq!(bench.tell(lane_ended(lane, 0)), ["send Fenced"]);
    }
}

#[test]
fn a_lane_in_a_black_hole_is_found_once_the_others_have_ended() {
    let mut bench = Bench::at(Phase::Receiving);
    bench.tell(ended(1, 5));
    let looked = |bytes| {
        let seen = [ONE, TWO].map(|lane| LaneSeen { lane, bytes });
        Input::LanesSeen(seen.to_vec())
    };
    let mut told = Vec::new();
    for _ in 0..20 {
        assert_eq!(bench.wait(), ["LookAtLanes"]);
        told.extend(bench.tell(looked(7)));
    }
    assert_eq!(told, ["send LaneLost"], "once, and of lane 2 alone");
    assert_eq!(bench.tell(ended_by(TWO, 1, 0)), ["send RoundDone"]);
    assert_eq!(bench.machine.poll_timeout(), None, "nobody lags");
}
