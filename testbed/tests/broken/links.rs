//! The link is cut before, within and after a frame.
//!
//! `FERRY_LONG=1` cuts at every frame that a move sends.

use std::collections::BTreeSet;

use ferry_stream::frame::Kind;
use ferry_testbed::proxy::{CONTROL, Deed, FrameName, PAGES, Reach, Way};
use ferry_testbed::{Turn, wait_until};
use nix::sys::signal::Signal;

use crate::support::{BOUND, Bed, Tried, assert_told, machine};

/// Bytes of a frame that pass before a cut behind it.
const WHOLE: usize = usize::MAX;

/// Within the header of any frame.
const WITHIN: usize = 17;

fn name(connection: usize, way: Way, kind: Kind, nth: usize) -> FrameName {
    FrameName {
        connection,
        way,
        kind,
        nth,
    }
}

/// What a cut at a frame of the control lane must lead to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expected {
    /// Nothing had been changed.
    Refused,
    Kept,
    /// It was on its way with the word that decides: the target says which.
    KeptOrMoved,
    Moved,
}

fn expected(at: FrameName, after_bytes: usize) -> Expected {
    let whole = after_bytes == WHOLE;
    match (at.connection, at.kind) {
        (CONTROL, Kind::Hello) => Expected::Refused,
        (CONTROL, Kind::Welcome) if !whole => Expected::Refused,
        (CONTROL, Kind::Go) if whole => Expected::KeptOrMoved,
        (CONTROL, Kind::Running | Kind::Finished) => Expected::Moved,
        _ => Expected::Kept,
    }
}

/// Cuts at `at`, once; the link is back at once.
fn cut(bed: &Bed, at: FrameName, after_bytes: usize) -> (Tried, bool) {
    let attempt = bed.attempt(&["--live"], move |frame, _| {
        let then = Reach::Back;
        if frame == at {
            return Deed::Cut { after_bytes, then };
        }
        Deed::Pass
    });
    let tried = attempt.end();
    let reached = tried.proxy.passed();
    let uncut = reached.iter().any(|frame| frame.kind == Kind::Finished);
    (tried, !uncut)
}

/// Cuts there and looks at what became of the guest; true when the source can be used again.
fn check(bed: &Bed, at: FrameName, after_bytes: usize) -> bool {
    println!("cut at {at:?} after {after_bytes} bytes");
    let (tried, was_cut) = cut(bed, at, after_bytes);
    let moved = tried.migrate.code() == 0;
    // How many rounds and pieces of state a move has is not always the same.
    let expected = if was_cut {
        expected(at, after_bytes)
    } else {
        Expected::Moved
    };
    match expected {
        Expected::Refused => {
            assert_told(&tried.migrate, 2, "kept", "is `ferry receive` what listens");
            bed.assert_kept();
            // A source that was never heard keeps no target from waiting on.
            if at.kind == Kind::Hello && after_bytes != WHOLE {
                assert_eq!(tried.target.run_state().unwrap(), "inmigrate");
                tried.receive.signal(Signal::SIGTERM).unwrap();
                let given_up = tried.receive.wait(BOUND).unwrap();
                assert_told(&given_up, 1, "kept", "cancelled");
            } else {
                tried.target.wait_for_end(BOUND).unwrap();
                assert_eq!(tried.receive.wait(BOUND).unwrap().code(), 1);
            }
        }
        Expected::KeptOrMoved if moved => tried.assert_moved(bed),
        Expected::Moved => tried.assert_moved(bed),
        Expected::Kept | Expected::KeptOrMoved => tried.assert_kept(bed, 1),
    }
    !moved
}

fn check_all(points: impl IntoIterator<Item = (FrameName, usize)>) {
    let mut bed = None;
    for (at, after_bytes) in points {
        let source = bed.get_or_insert_with(|| Bed::new(machine()));
        if !check(source, at, after_bytes) {
            bed = None;
        }
    }
}

#[test]
fn cut_at_the_frames_that_matter() {
    use Way::{ToSource, ToTarget};
    let _turn = Turn::take().unwrap();
    check_all([
        (name(CONTROL, ToTarget, Kind::Hello, 1), WITHIN),
        (name(CONTROL, ToSource, Kind::Welcome, 1), 0),
        (name(PAGES, ToTarget, Kind::Hello, 1), WHOLE),
        (name(CONTROL, ToSource, Kind::Prepared, 1), 0),
        (name(PAGES, ToTarget, Kind::Pages, 20), 60_000),
        (name(PAGES, ToTarget, Kind::RoundEnd, 1), 0),
        (name(CONTROL, ToSource, Kind::RoundDone, 1), 0),
        (name(CONTROL, ToTarget, Kind::Paused, 1), WITHIN),
        (name(CONTROL, ToTarget, Kind::State, 1), WHOLE),
        (name(CONTROL, ToTarget, Kind::Complete, 1), 0),
        (name(CONTROL, ToSource, Kind::Ready, 1), 0),
        (name(CONTROL, ToSource, Kind::Ready, 1), WHOLE),
        (name(CONTROL, ToTarget, Kind::Go, 1), 0),
        (name(CONTROL, ToTarget, Kind::Go, 1), WHOLE),
        (name(CONTROL, ToSource, Kind::Running, 1), 0),
        (name(CONTROL, ToTarget, Kind::Finished, 1), 0),
    ]);
}

/// Without `FERRY_LONG` every so many points are cut at. Prime to the three points of a frame, so that
/// all kinds of points come.
const SHORT_STEP: usize = 10;

#[test]
fn cut_at_every_frame() {
    let _turn = Turn::take().unwrap();
    let bed = Bed::new(machine());
    let tried = bed.attempt(&["--live"], |_, _| Deed::Pass).end();
    tried.assert_moved(&bed);
    let mut known = BTreeSet::new();
    let mut points = Vec::new();
    for frame in tried.proxy.passed() {
        // Heartbeats come when they come.
        if frame.kind != Kind::Ping && known.insert(format!("{frame:?}")) {
            points.extend([0, WITHIN, WHOLE].map(|after_bytes| (frame, after_bytes)));
        }
    }
    drop((tried, bed));
    let every = match std::env::var_os("FERRY_LONG") {
        Some(_) => 1,
        None => SHORT_STEP,
    };
    println!("{} points, every {every}", points.len());
    check_all(points.into_iter().step_by(every));
}

/// After Go and with nobody to ask a person has to look, and until then nobody touches anything.
#[test]
fn in_doubt_nothing_is_touched() {
    let _turn = Turn::take().unwrap();
    let lost_go = Bed::new(machine());
    let lost_word = Bed::new(machine());
    let gone = |kind, after_bytes| {
        move |frame: FrameName, _: &mut Vec<u8>| {
            let then = Reach::Gone;
            if frame.kind == kind {
                return Deed::Cut { after_bytes, then };
            }
            Deed::Pass
        }
    };
    // Side by side, for each is asked for a minute.
    let first = lost_go.attempt(&["--live"], gone(Kind::Go, 0));
    let second = lost_word.attempt(&["--live"], gone(Kind::Running, 0));
    let first = first.end_within(2 * BOUND);
    let second = second.end_within(2 * BOUND);

    for (bed, tried) in [(&lost_go, &first), (&lost_word, &second)] {
        assert_told(
            &tried.migrate,
            3,
            "in-doubt",
            "the link to the peer was lost",
        );
        assert!(
            tried.migrate.stderr.contains("Never let both run"),
            "{:?}",
            tried.migrate
        );
        assert_eq!(bed.source.run_state().unwrap(), "postmigrate");
        // Whatever it is asked for, this QEMU's guest is not to be moved.
        let again = bed.attempt(&["--live"], |_, _| Deed::Pass).end();
        assert_told(&again.migrate, 2, "kept", "");
        assert_eq!(bed.source.run_state().unwrap(), "postmigrate");
    }
    // Go never came: the guest runs nowhere, and the target has given up its QEMU.
    first.target.wait_for_end(BOUND).unwrap();
    // The word that it runs was lost: it runs there.
    assert_eq!(second.target.run_state().unwrap(), "running");
    // Whoever resumes the source by hand after having looked at the target gets a guest that runs.
    lost_go
        .source
        .execute("cont", &serde_json::json!({}))
        .unwrap();
    wait_until("the guest runs again", BOUND, || {
        (lost_go.source.run_state().unwrap() == "running").then_some(())
    })
    .unwrap();
    let again = lost_go.attempt(&["--live"], |_, _| Deed::Pass).end();
    assert_told(
        &again.migrate,
        2,
        "kept",
        "was given away by an earlier migration",
    );
}
