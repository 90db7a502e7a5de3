//! The target's machine, fact by fact. The long runs are the simulated world's.

use ferry_stream::limits::MAX_BASES;
use ferry_stream::message::{Hello, Message, Round, Run, Verdict, Versions};

use crate::core::layout::{PageNumber, RegionIndex};
use crate::core::message::{Command, Failure, Input, Inquirer, MayHaveRun, Phase, Record, Step};
use crate::vmm::GuestEvent;

use super::bench::*;

#[test]
fn a_migration_without_trouble() {
    let mut bench = Bench::new();
    for (fact, orders) in happy_path() {
        let told = format!("{fact:?}");
        assert_eq!(bench.tell(fact), orders, "after {told}");
    }
    // The guest has its first moments here to itself.
    assert_eq!(bench.wait(), ["Restore", "finish moved"]);
    assert_eq!(bench.machine.phase(), Phase::Ended);
}

#[test]
fn a_guest_that_shall_stay_paused_is_taken_and_not_resumed() {
    let mut bench = Bench::at(Phase::Offered);
    let run = Run::StayPaused;
    bench.tell(Input::Received(Message::Go { run }));
    assert_eq!(
        bench.tell(Input::Journaled(Record::Taken)),
        ["send Running", "Restore"]
    );
}

#[test]
fn trouble_before_go_refuses_and_the_journal_says_so_first() {
    let troubles = || {
        [
            lost(),
            aborted(),
            gone(),
            failure(Step::Pages),
            Input::Command(Command::Cancel),
            Input::Guest(GuestEvent::ForeignResume),
            Input::Guest(GuestEvent::Reset),
            Input::Guest(GuestEvent::ShutDown),
            Input::Guest(GuestEvent::Panicked),
            Input::Received(Message::Ready { load_us: 0 }),
        ]
    };
    for phase in BEFORE_GO {
        for trouble in troubles() {
            let mut bench = Bench::at(phase);
            let told = format!("{trouble:?} while {phase}");
            assert_eq!(bench.tell(trouble), REFUSAL, "{told}");
            assert_eq!(
                bench.tell(Input::Journaled(Record::Refused)),
                ["send Abort", "CloseLanes"],
                "{told}"
            );
        }
    }
}

#[test]
fn a_refusal_is_over_when_the_journal_is_written_and_the_vmm_ended() {
    let mut bench = Bench::at(Phase::Receiving);
    bench.tell(lost());
    assert_eq!(bench.tell(Input::Quit), [""; 0]);
    let orders = bench.tell(Input::Journaled(Record::Refused));
    assert_eq!(orders, ["send Abort", "CloseLanes", "finish ended"]);
}

#[test]
fn a_go_that_comes_after_a_refusal_is_void() {
    let mut bench = Bench::at(Phase::Offered);
    bench.tell(lost());
    assert_eq!(
        bench.tell(Input::Received(Message::Go { run: Run::Run })),
        [""; 0]
    );
    bench.tell(Input::Journaled(Record::Refused));
    assert_eq!(
        bench.tell(Input::Quit),
        [""; 0],
        "the source may have given it away: it lingers"
    );
    assert_eq!(
        bench.tell(Input::Inquired(Inquirer(1))),
        ["answer 1: Refused"]
    );
    assert!(!bench.machine.may_run());
    assert_eq!(bench.wait(), ["finish ended"]);
}

#[test]
fn a_question_before_go_refuses_and_is_answered_from_the_journal() {
    for phase in BEFORE_GO {
        let mut bench = Bench::at(phase);
        assert_eq!(bench.tell(Input::Inquired(Inquirer(1))), REFUSAL);
        let orders = bench.tell(Input::Journaled(Record::Refused));
        assert_eq!(orders, ["send Abort", "CloseLanes", "answer 1: Refused"]);
    }
}

#[test]
fn a_refusal_that_cannot_be_written_answers_nobody() {
    let mut bench = Bench::at(Phase::Offered);
    bench.tell(Input::Inquired(Inquirer(1)));
    assert_eq!(bench.tell(failure(Step::Journal)), ["tell", "CloseLanes"]);
    assert_eq!(bench.tell(Input::Quit), ["finish ended"]);
}

#[test]
fn an_earlier_record_that_fails_late_is_not_the_refusal() {
    let mut bench = Bench::new();
    bench.tell(Input::Received(Message::Hello(hello())));
    bench.tell(lost());
    bench.tell(Input::Quit);
    assert_eq!(
        bench.tell(failure(Step::Journal)),
        [""; 0],
        "that was Receiving"
    );
    let orders = bench.tell(Input::Journaled(Record::Refused));
    assert_eq!(orders, ["send Abort", "CloseLanes", "finish ended"]);
}

#[test]
fn a_source_that_gave_up_is_not_waited_for() {
    let mut bench = Bench::at(Phase::Offered);
    bench.tell(aborted());
    bench.tell(Input::Journaled(Record::Refused));
    assert_eq!(bench.tell(Input::Quit), ["finish ended"]);
}

#[test]
fn nothing_but_the_journal_stands_between_go_and_the_guest() {
    let nothing = || {
        [
            lost(),
            aborted(),
            Input::Command(Command::Cancel),
            Input::Inquired(Inquirer(1)),
            Input::Guest(GuestEvent::ForeignResume),
        ]
    };
    for fact in nothing() {
        let mut bench = Bench::at(Phase::Taking);
        assert!(!bench.machine.may_run());
        bench.tell(fact);
        assert_eq!(bench.tell(Input::Journaled(Record::Taken)), ["Resume"]);
        assert!(bench.machine.may_run());
    }
}

#[test]
fn a_guest_that_never_ran_is_given_back_by_the_journal() {
    let no = || Input::NotResumed {
        ran: MayHaveRun::No,
        failure: Failure::new(Step::Resume, "as the test has it"),
    };
    let mut bench = Bench::resuming();
    assert_eq!(bench.tell(no()), ["CloseLanes", "Quit"]);
    assert_eq!(bench.returned(), ["send Returned"]);
    assert_eq!(
        bench.tell(Input::Inquired(Inquirer(3))),
        ["answer 3: Returned"]
    );
    assert_eq!(bench.tell(aborted()), ["finish ended"], "the source knows");

    let mut unwritten = Bench::at(Phase::Taking);
    assert_eq!(
        unwritten.tell(failure(Step::Journal)),
        ["CloseLanes", "Quit"]
    );
    assert_eq!(unwritten.returned(), ["send Returned"]);
}

#[test]
fn returned_waits_for_taken_to_be_at_rest() {
    let mut bench = Bench::at(Phase::Taking);
    assert_eq!(bench.tell(gone()), ["CloseLanes", "Quit"]);
    assert_eq!(bench.tell(Input::Quit), [""; 0]);
    assert_eq!(
        bench.tell(Input::Journaled(Record::Taken)),
        ["journal Returned"]
    );
}

#[test]
fn doubt_waits_for_taken_to_be_at_rest() {
    for answer in [Input::Journaled(Record::Taken), failure(Step::Journal)] {
        let mut bench = Bench::at(Phase::Taking);
        assert_eq!(bench.tell(gone()), ["CloseLanes", "Quit"]);
        assert_eq!(bench.tell(failure(Step::Retire)), [""; 0]);
        assert_eq!(bench.tell(answer), ["finish in doubt"]);
    }
}

#[test]
fn what_may_have_run_or_cannot_be_written_is_a_persons_to_decide() {
    let mut perhaps = Bench::resuming();
    let orders = perhaps.tell(Input::NotResumed {
        ran: MayHaveRun::Perhaps,
        failure: Failure::new(Step::Resume, "as the test has it"),
    });
    assert_eq!(orders, ["send Abort", "finish in doubt"]);

    let mut ran = Bench::at(Phase::Taking);
    ran.tell(Input::Guest(GuestEvent::ForeignResume));
    assert_eq!(
        ran.tell(failure(Step::Journal)),
        ["send Abort", "finish in doubt"]
    );

    let mut lives = Bench::at(Phase::Taking);
    lives.tell(failure(Step::Journal));
    assert_eq!(lives.tell(failure(Step::Retire)), ["finish in doubt"]);

    let mut silent = Bench::at(Phase::Taking);
    silent.tell(failure(Step::Journal));
    silent.tell(Input::Quit);
    assert_eq!(
        silent.tell(failure(Step::Journal)),
        ["tell", "finish in doubt"]
    );
}

#[test]
fn a_taken_guest_stays_whatever_happens() {
    let events = [
        lost(),
        gone(),
        failure(Step::Undo),
        Input::Command(Command::Cancel),
    ];
    let mut bench = Bench::at(Phase::Taken);
    for event in events {
        bench.tell(event);
        assert_eq!(bench.machine.phase(), Phase::Taken);
    }
    assert_eq!(
        bench.tell(Input::Inquired(Inquirer(1))),
        ["answer 1: Taken"]
    );
    assert_eq!(bench.wait(), ["Restore"]);
    assert_eq!(bench.wait(), ["finish moved"]);
}

#[test]
fn a_question_is_no_reason_to_leave_while_the_link_stands() {
    let mut bench = Bench::at(Phase::Taken);
    assert_eq!(bench.wait(), ["Restore"]);
    let before = bench.machine.poll_timeout();
    assert_eq!(
        bench.tell(Input::Inquired(Inquirer(1))),
        ["answer 1: Taken"]
    );
    assert_eq!(bench.machine.poll_timeout(), before);
}

#[test]
fn counts_that_differ_refuse() {
    let mut bench = Bench::at(Phase::Receiving);
    bench.tell(complete(1, 12));
    bench.tell(ended(1, 5));
    let orders = bench.tell(ended_by(TWO, 1, 6));
    assert_eq!(orders, [&["send RoundDone"][..], &REFUSAL].concat());
    let mut skipped = Bench::at(Phase::Receiving);
    assert_eq!(skipped.tell(ended(2, 5)), REFUSAL);
    let mut early = Bench::at(Phase::Receiving);
    assert_eq!(early.tell(Input::Loaded), REFUSAL);
}

#[test]
fn every_wait_for_the_source_has_a_bound() {
    for phase in [Phase::Preparing, Phase::Offered] {
        assert_eq!(Bench::at(phase).wait(), REFUSAL);
    }
}

#[test]
fn who_cannot_be_served_is_turned_away_and_nothing_was_changed() {
    let changes: [fn(&mut Hello); 6] = [
        |hello| {
            hello.versions = Versions {
                lowest: 900,
                highest: 901,
            }
        },
        |hello| hello.offer = None,
        |hello| hello.offer.as_mut().unwrap().arch = "riscv64".into(),
        |hello| hello.offer.as_mut().unwrap().machine = "test-2.0".into(),
        |hello| hello.offer.as_mut().unwrap().regions[0].bytes = 4096,
        |hello| hello.offer.as_mut().unwrap().regions.clear(),
    ];
    for change in changes {
        let mut hello = hello();
        change(&mut hello);
        let orders = Bench::new().tell(Input::Received(Message::Hello(hello)));
        assert_eq!(orders, ["send Abort", "finish untouched"]);
    }
}

#[test]
fn an_answer_is_what_the_journal_says() {
    let mut bench = Bench::at(Phase::Taking);
    assert_eq!(bench.tell(Input::Inquired(Inquirer(1))), [""; 0], "not yet");
    bench.tell(Input::Journaled(Record::Taken));
    let orders = bench.tell(Input::Resumed);
    let answer = format!("answer 1: {:?}", Verdict::Taken);
    assert_eq!(orders, ["send Running", &answer]);
}

fn mismatched(round: u32) -> Input {
    Input::Mismatched {
        lane: ONE,
        round: Round(round),
        region: RegionIndex(0),
        page: PageNumber(3),
    }
}

#[test]
fn a_delta_that_does_not_fit_is_told_before_its_round_is_done() {
    let mut bench = Bench::at(Phase::Receiving);
    bench.tell(ended_by(TWO, 1, 6));
    assert_eq!(bench.tell(mismatched(1)), ["send Mismatch"]);
    assert_eq!(bench.tell(ended(1, 5)), ["send RoundDone"]);
    bench.tell(complete(2, 14));
    bench.tell(ended(2, 3));
    let orders = bench.tell(ended_by(TWO, 2, 0));
    assert_eq!(orders, ["send RoundDone", "ReleaseLoad"]);
    for phase in [Phase::Loading, Phase::Offered, Phase::Taking, Phase::Taken] {
        let mut late = Bench::at(phase);
        assert_eq!(late.tell(mismatched(2)), [""; 0], "{phase}");
        assert_eq!(late.machine.phase(), phase);
    }
}

#[test]
fn a_last_round_with_a_delta_that_does_not_fit_is_refused() {
    let mut bench = Bench::at(Phase::Receiving);
    bench.tell(complete(1, 11));
    bench.tell(mismatched(1));
    bench.tell(ended(1, 5));
    let orders = bench.tell(ended_by(TWO, 1, 6));
    assert_eq!(orders, [&["send RoundDone"][..], &REFUSAL].concat());
}

#[test]
fn a_source_cannot_make_it_say_more_than_so_much() {
    let mut bench = Bench::at(Phase::Receiving);
    for _ in 0..MAX_BASES {
        assert_eq!(bench.tell(mismatched(1)), ["send Mismatch"]);
    }
    assert_eq!(bench.tell(mismatched(1)), REFUSAL);
}
