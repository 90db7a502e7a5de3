//! A peer that is no ferry, or another one, or that sends what nobody sent.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread;

use ferry_stream::frame::{HEADER_BYTES, Kind};
use ferry_stream::limits::HIGHEST_VERSION;
use ferry_testbed::proxy::{CONTROL, Deed, PAGES, Way};
use ferry_testbed::{Ended, Ferry, Turn};

use crate::support::{BOUND, Bed, assert_goes_on, assert_told, machine};

/// A wire version that nobody speaks yet.
const NEWER: u16 = HIGHEST_VERSION + 1;

/// Migrates to a server that does with its first connection what `serve` says.
fn migrate_to(bed: &Bed, serve: impl FnOnce(TcpStream) + Send + 'static) -> Ended {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("ferry://{}", listener.local_addr().unwrap());
    let serving = thread::spawn(move || serve(listener.accept().unwrap().0));
    let ended = Ferry::migrate(&bed.source, &uri, &["--live"]).unwrap();
    let ended = ended.wait(BOUND).unwrap();
    serving.join().unwrap();
    ended
}

#[test]
fn a_target_that_is_no_ferry() {
    let _turn = Turn::take().unwrap();
    let bed = Bed::new(machine());
    let http = migrate_to(&bed, |mut stream| {
        _ = stream.read(&mut [0; 512]);
        stream
            .write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
            .unwrap();
        _ = stream.read_to_end(&mut Vec::new());
    });
    assert_told(&http, 2, "kept", "the peer is not a ferry");
    let closes = migrate_to(&bed, drop);
    let silent = migrate_to(&bed, |mut stream| {
        _ = stream.read_to_end(&mut Vec::new());
    });
    assert_told(&silent, 2, "kept", "said nothing for 10000 ms");
    for ended in [&http, &closes, &silent] {
        assert_told(
            ended,
            2,
            "kept",
            "is `ferry receive` what listens at that address?",
        );
        assert_eq!(ended.json()["guest"], "untouched");
    }
    bed.assert_kept();
}

#[test]
fn a_target_that_is_not_there() {
    let _turn = Turn::take().unwrap();
    let bed = Bed::new(machine());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("ferry://{}", listener.local_addr().unwrap());
    drop(listener);
    let ended = Ferry::migrate(&bed.source, &uri, &["--live"]).unwrap();
    let ended = ended.wait(BOUND).unwrap();
    assert_told(
        &ended,
        2,
        "kept",
        "cannot be reached: is `ferry receive` running there?",
    );
    bed.assert_kept();
}

/// Strangers come first; the source that comes after them is served.
#[test]
fn a_source_after_strangers() {
    let _turn = Turn::take().unwrap();
    let bed = Bed::new(machine());
    let attempt = {
        let target = bed.machine.clone().incoming().start().unwrap();
        let (receive, uri) = Ferry::receive(&target, &[]).unwrap();
        let address = uri.strip_prefix("ferry://").unwrap().to_owned();
        let mut oversized = b"\xFErry\x02\0\x01\0\0\0\0\0\0\0\0\0\0\0\0\0".to_vec();
        oversized.extend([0xff; 12]);
        for garbage in [
            &b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"[..],
            b"",
            b"\xFErry",
            &oversized,
        ] {
            let mut stranger = TcpStream::connect(&address).unwrap();
            stranger.write_all(garbage).unwrap();
            stranger.shutdown(Shutdown::Write).unwrap();
            // It is answered, or told by the end of the connection that it is not wanted.
            _ = stranger.read_to_end(&mut Vec::new());
        }
        let silent = TcpStream::connect(&address).unwrap();
        let versions = bed.attempt_by_version(&uri);
        let words = format!("the peer speaks wire version {NEWER}");
        assert_told(&versions, 2, "kept", &words);
        bed.assert_kept();
        let migrate = Ferry::migrate(&bed.source, &uri, &["--live"]).unwrap();
        assert_eq!(migrate.wait(BOUND).unwrap().code(), 0);
        drop(silent);
        (receive, target)
    };
    let (receive, target) = attempt;
    let ended = receive.wait(BOUND).unwrap();
    assert_eq!(ended.code(), 0, "{ended:?}");
    assert!(ended.stderr.contains("is not a ferry"), "{ended:?}");
    assert_goes_on(&target.counterpart(&bed.page));
}

impl Bed {
    /// As an engine of a newer wire version would begin.
    fn attempt_by_version(&self, uri: &str) -> Ended {
        let proxy = ferry_testbed::proxy::Proxy::start(uri, |frame, bytes| {
            if frame.way == Way::ToTarget {
                bytes[4..6].copy_from_slice(&NEWER.to_le_bytes());
                reseal(bytes);
            }
            Deed::Pass
        });
        let proxy = proxy.unwrap();
        let migrate = Ferry::migrate(&self.source, &proxy.uri(), &["--live"]).unwrap();
        migrate.wait(BOUND).unwrap()
    }
}

/// Gives a frame that was changed a checksum that fits.
fn reseal(frame: &mut [u8]) {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&frame[..HEADER_BYTES - 4]);
    hasher.update(&frame[HEADER_BYTES..]);
    frame[HEADER_BYTES - 4..HEADER_BYTES].copy_from_slice(&hasher.finalize().to_le_bytes());
}

#[test]
fn frames_that_nobody_sent() {
    const LENGTH_TOP: usize = 23;
    let _turn = Turn::take().unwrap();
    let bed = Bed::new(machine());
    let (there, back) = (Way::ToTarget, Way::ToSource);
    // Which frame, which byte from its start, and what the user reads of it.
    let cases = [
        (CONTROL, there, Kind::Paused, 6, "unknown kind"),
        (
            CONTROL,
            there,
            Kind::State,
            HEADER_BYTES + 100,
            "was corrupted on its way",
        ),
        (CONTROL, there, Kind::State, LENGTH_TOP, "bytes, at most"),
        (
            CONTROL,
            there,
            Kind::Complete,
            HEADER_BYTES,
            "was corrupted on its way",
        ),
        (
            CONTROL,
            back,
            Kind::RoundDone,
            HEADER_BYTES + 5,
            "was corrupted on its way",
        ),
        (CONTROL, back, Kind::Ready, 28, "was corrupted on its way"),
        (PAGES, there, Kind::Pages, 0, "begins with"),
        (PAGES, there, Kind::Pages, 13, "where frame 0 was due"),
        (PAGES, there, Kind::Pages, LENGTH_TOP, "bytes, at most"),
        (
            PAGES,
            there,
            Kind::Pages,
            HEADER_BYTES + 4000,
            "was corrupted on its way",
        ),
        (PAGES, there, Kind::RoundEnd, 31, "was corrupted on its way"),
    ];
    for (connection, way, kind, at, words) in cases {
        println!("byte {at} of {kind:?} on {connection}");
        let attempt = bed.attempt(&["--live"], move |frame, bytes| {
            if (frame.connection, frame.way, frame.kind, frame.nth) == (connection, way, kind, 1) {
                bytes[at] ^= 0x41;
            }
            Deed::Pass
        });
        let tried = attempt.end();
        assert_told(&tried.migrate, 1, "kept", words);
        tried.assert_kept(&bed, 1);
    }
}
