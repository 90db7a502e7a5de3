//! In which rounds there are deltas, and what becomes of one that does not fit.

use ferry_stream::message::{Features, Message, Round, Versions, Welcome};

use super::SourceConfig;
use super::bench::*;
use crate::core::converge::Verdict;
use crate::core::message::{Deltas, Input, Moment, Phase, Reclaimed};
use crate::core::pageset::PageSet;
use crate::vmm::RunState;

fn mismatch(round: u32, page: u64) -> Input {
    Input::Received(Message::Mismatch {
        lane: ONE,
        round: Round(round),
        region: 0,
        page,
    })
}

fn found(count: u64) -> Input {
    Input::Collected {
        found: pages(count),
    }
}

/// A machine at its first round, with a target that takes these features.
fn copying(features: Features, verdict: Verdict) -> Bench {
    let config = SourceConfig {
        features: Features::DELTA,
        ..config()
    };
    let mut bench = Bench::with(config, RunState::Running, verdict);
    let mut facts = happy_path().into_iter().map(|(fact, _)| fact);
    facts.next();
    bench.tell(Input::Received(Message::Welcome(Welcome {
        version: Versions::OURS.highest,
        features,
        lanes: 2,
    })));
    while bench.machine.phase() != Phase::Copying {
        bench.tell(facts.next().unwrap());
    }
    bench.tell(Input::Flushed);
    bench
}

/// The round is sent and done; what comes next is ordered over so many pages.
fn next_round(bench: &mut Bench, round: u32, count: u64) -> Option<Deltas> {
    bench.tell(sent(round, 3));
    bench.tell(idle(round));
    bench.tell(done(round, 3));
    bench.machine.handle(bench.now, found(count));
    deltas(bench)
}

#[test]
fn they_are_told_from_the_second_round_to_the_last_but_one() {
    let mut bench = copying(Features::DELTA, Verdict::Stop);
    next_round(&mut bench, 1, 3);
    assert_eq!(bench.machine.phase(), Phase::Stopping);
    let at = Moment::default();
    bench
        .machine
        .handle(bench.now, Input::Paused { at, drained: at });
    assert_eq!(deltas(&mut bench), Some(Deltas::On), "the guest stands");
    bench.tell(scanned(3));
    bench.tell(Input::Saved { bytes: 9, crc: 7 });
    bench.tell(sent(2, 3));
    bench.tell(idle(2));
    bench.machine.handle(bench.now, done(2, 3));
    assert_eq!(deltas(&mut bench), Some(Deltas::Off), "the last");
    bench.tell(scanned(3));
    assert_eq!(bench.machine.phase(), Phase::Offering);
}

#[test]
fn a_target_that_takes_none_is_told_none() {
    for (features, expected) in [(Features::NONE, Deltas::Off), (Features::DELTA, Deltas::On)] {
        let mut bench = copying(features, Verdict::Continue);
        assert_eq!(next_round(&mut bench, 1, 3), Some(expected));
        assert_eq!(next_round(&mut bench, 2, 3), Some(expected));
    }
}

#[test]
fn what_a_lane_took_that_died_is_not_relied_on() {
    let mut bench = copying(Features::DELTA, Verdict::Continue);
    next_round(&mut bench, 1, 3);
    let what = "reset".to_owned();
    bench.tell(Input::LaneLost { lane: TWO, what });
    bench.tell(Input::Received(Message::Fenced {
        lane: TWO,
        frames: 7,
        pages: 0,
    }));
    let from = Reclaimed::nothing(PageSet::empty(&layout()));
    bench.tell(Input::Reclaimed { lane: TWO, from });
    assert_eq!(next_round(&mut bench, 2, 3), Some(Deltas::Anew));
    assert_eq!(next_round(&mut bench, 3, 3), Some(Deltas::On));
}

#[test]
fn a_page_that_does_not_fit_goes_with_the_next_round_and_no_delta_any_more() {
    let mut bench = copying(Features::DELTA, Verdict::Continue);
    next_round(&mut bench, 1, 3);
    assert_eq!(bench.tell(mismatch(2, 9)), ["tell"]);
    assert_eq!(bench.tell(mismatch(2, 8)), [""; 0], "told once");
    bench.tell(sent(2, 3));
    bench.tell(idle(2));
    bench.tell(done(2, 3));
    let orders = bench.tell(found(1));
    assert!(
        orders.contains(&"copy 3 in round 3, Tell".to_owned()),
        "{orders:?}"
    );
    assert_eq!(next_round(&mut bench, 3, 3), Some(Deltas::Off));
    let orders = bench.tell(mismatch(4, 9));
    gives_up(&bench, &orders);
}

#[test]
fn a_page_that_does_not_fit_while_the_guest_stands_goes_with_the_last_round() {
    let mut bench = copying(Features::DELTA, Verdict::Stop);
    next_round(&mut bench, 1, 3);
    let at = Moment::default();
    bench.tell(Input::Paused { at, drained: at });
    bench.tell(scanned(3));
    assert_eq!(bench.tell(mismatch(2, 15)), ["tell"]);
    bench.tell(sent(2, 3));
    bench.tell(idle(2));
    bench.tell(done(2, 3));
    assert_eq!(
        bench.tell(Input::Saved { bytes: 9, crc: 7 })[1..],
        [
            "scan, and 1, rearm No",
            "copy what is found in round 3, Tell"
        ]
    );
}

#[test]
fn a_mismatch_at_any_other_time_ends_it() {
    // Of a round without deltas.
    let mut first = copying(Features::DELTA, Verdict::Continue);
    let orders = first.tell(mismatch(1, 0));
    gives_up(&first, &orders);
    let mut none = copying(Features::NONE, Verdict::Continue);
    next_round(&mut none, 1, 3);
    let orders = none.tell(mismatch(2, 0));
    gives_up(&none, &orders);
    // Of another round, of no page of the guest's, after the round was said to be done.
    for (round, page) in [(1, 0), (3, 0), (2, 16), (2, u64::MAX)] {
        let mut bench = copying(Features::DELTA, Verdict::Continue);
        next_round(&mut bench, 1, 3);
        let orders = bench.tell(mismatch(round, page));
        gives_up(&bench, &orders);
    }
    let mut late = copying(Features::DELTA, Verdict::Continue);
    next_round(&mut late, 1, 3);
    late.tell(done(2, 3));
    let orders = late.tell(mismatch(2, 0));
    gives_up(&late, &orders);
    for phase in BEFORE_GO {
        let mut bench = Bench::at(phase);
        let orders = bench.tell(mismatch(1, 0));
        gives_up(&bench, &orders);
    }
    // The target's word alone counts by then: it is asked.
    let mut given = Bench::at(Phase::Given);
    assert_eq!(given.tell(mismatch(3, 0)), ["tell", "Ask"]);
    let mut leaving = Bench::at(Phase::Leaving);
    assert_eq!(leaving.tell(mismatch(3, 0)), [""; 0]);
}
