//! The session against scripts of its own making, in any pieces, and against any bytes at all.

use std::collections::VecDeque;

use proptest::prelude::*;
use proptest::sample::Index;
use serde_json::Value;

use super::*;

const LINE_MAX: usize = 400;
const GREETING: &[u8] = br#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": ""}, "capabilities": ["oob"]}}"#;
const NEGOTIATED: &[u8] = br#"{"return": {}, "id": 0}"#;

fn request(band: Band) -> Request {
    Request::new("query-status", &(), band).unwrap()
}

/// A session that takes commands.
fn ready() -> Session<usize> {
    let mut session = Session::new(LINE_MAX);
    let words = [GREETING, b"\r\n", NEGOTIATED, b"\r\n"].concat();
    session.receive(&words, Instant::now());
    assert!(session.poll().unwrap().is_none());
    session.sent(session.output().len());
    session
}

/// What a session said, in a form that can be compared.
#[derive(Debug, PartialEq)]
enum Said {
    Reply(usize, Result<String, String>),
    Event(String, Value),
    Failed(String),
}

fn poll_all(session: &mut Session<usize>, said: &mut Vec<Said>) -> Result<(), ()> {
    loop {
        said.push(match session.poll() {
            Ok(None) => return Ok(()),
            Ok(Some(Incoming::Event(event))) => Said::Event(event.name, event.data),
            Ok(Some(Incoming::Reply { token, outcome })) => Said::Reply(
                token,
                outcome
                    .map(|value| value.get().to_owned())
                    .map_err(|error| error.to_string()),
            ),
            Err(error) => {
                said.push(Said::Failed(format!("{error:?}")));
                return Err(());
            }
        });
    }
}

/// Feeds `bytes` in pieces of `sizes`, over and over, up to the first error.
fn feed(session: &mut Session<usize>, bytes: &[u8], sizes: &[usize]) -> Vec<Said> {
    let mut said = Vec::new();
    let mut rest = bytes;
    for &size in sizes.iter().cycle() {
        let (now, later) = rest.split_at(rest.len().min(size));
        session.receive(now, Instant::now());
        if poll_all(session, &mut said).is_err() || later.is_empty() {
            break;
        }
        rest = later;
    }
    said
}

/// One line of a server, and what it must be taken for.
#[derive(Clone, Debug)]
enum Line {
    /// Answers the command that this selects among those in flight.
    Reply(Index, Result<u32, String>),
    Event(String, Option<u32>),
    Blank,
}

fn line() -> impl Strategy<Value = Line> {
    let body = prop_oneof![
        any::<u32>().prop_map(Ok),
        "[ -~é]{0,20}".prop_map(Err::<u32, String>)
    ];
    prop_oneof![
        (any::<Index>(), body).prop_map(|(which, body)| Line::Reply(which, body)),
        ("[A-Z_]{1,12}", any::<Option<u32>>()).prop_map(|(name, data)| Line::Event(name, data)),
        Just(Line::Blank),
    ]
}

fn sizes() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(1..64_usize, 1..8)
}

/// Writes what a server would that has been sent so many commands.
fn play(lines: Vec<Line>, commands: usize) -> (Vec<u8>, Vec<Said>) {
    let mut in_flight: Vec<usize> = (0..commands).collect();
    let (mut words, mut expected) = (String::new(), Vec::new());
    for line in lines {
        match line {
            Line::Blank => {}
            Line::Event(name, data) => {
                let data = data.map_or(Value::Null, |size| json!({"size": size}));
                let event = json!({
                    "event": name,
                    "data": data,
                    "timestamp": {"seconds": 1, "microseconds": 2},
                });
                words.push_str(&event.to_string());
                expected.push(Said::Event(name, data));
            }
            Line::Reply(..) if in_flight.is_empty() => {}
            Line::Reply(which, body) => {
                let token = in_flight.remove(which.index(in_flight.len()));
                let id = token + 1;
                let reply = match &body {
                    Ok(value) => json!({"return": value, "id": id}),
                    Err(desc) => json!({"error": {"class": "Odd", "desc": desc}, "id": id}),
                };
                words.push_str(&reply.to_string());
                let body = body
                    .map(|value| value.to_string())
                    .map_err(|desc| format!("query-status: {desc} (Odd)"));
                expected.push(Said::Reply(token, body));
            }
        }
        words.push_str("\r\n");
    }
    (words.into_bytes(), expected)
}

/// Bytes that come close to QMP.
fn nearly_qmp() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        3 => prop::sample::select(vec![
            &b"\r\n"[..], b"{", b"}", b"[", b"]", b":", b",", b"\"", b"\\u", b"null",
            b"\"return\":", b"\"error\":", b"\"id\":", b"\"event\":\"STOP\"", b"\"QMP\":",
            b"\"timestamp\":{\"seconds\":1,\"microseconds\":2}", b"{\"return\":{},\"id\":1}\n",
            b"{\"return\":{},\"id\":2}\n", b"18446744073709551616", b"-1", GREETING, NEGOTIATED,
        ]).prop_map(<[u8]>::to_vec),
        1 => prop::collection::vec(any::<u8>(), 0..32),
        1 => (0..600_usize).prop_map(|depth| vec![b'['; depth]),
    ];
    prop::collection::vec(piece, 0..24).prop_map(|pieces| pieces.concat())
}

proptest! {
    #[test]
    fn any_split_and_any_order_give_the_same(
        out_of_band in prop::collection::vec(any::<bool>(), 0..12),
        lines in prop::collection::vec(line(), 0..30),
        sizes in sizes(),
    ) {
        let mut session = ready();
        let mut in_band = 0;
        for (token, &out) in out_of_band.iter().enumerate() {
            let band = if out || in_band == IN_BAND_MAX { Band::Out } else { Band::In };
            in_band += usize::from(band == Band::In);
            session.submit(request(band), token).unwrap();
        }
        let (words, expected) = play(lines, out_of_band.len());
        prop_assert_eq!(feed(&mut session, &words, &sizes), expected);
    }

    #[test]
    fn any_bytes_are_survived_and_mean_the_same_in_any_pieces(
        start_ready in any::<bool>(),
        commands in 0..4_usize,
        bytes in nearly_qmp(),
        sizes in sizes(),
    ) {
        let start = || {
            let mut session = if start_ready { ready() } else { Session::new(LINE_MAX) };
            for token in 0..commands {
                session.submit(request(Band::In), token).unwrap();
            }
            session
        };
        let (mut whole, mut pieces) = (start(), start());
        let said = feed(&mut whole, &bytes, &[bytes.len().max(1)]);
        prop_assert_eq!(&feed(&mut pieces, &bytes, &sizes), &said);
        prop_assert!(pieces.lines.rest().len() <= LINE_MAX + 64);
        prop_assert_eq!(pieces.output(), whole.output());
        if !matches!(said.last(), Some(Said::Failed(_))) {
            prop_assert_eq!(pieces.closed().to_string(), whole.closed().to_string());
        }
    }

    #[test]
    fn a_flipped_bit_is_never_a_panic(
        lines in prop::collection::vec(line(), 1..10),
        at in any::<Index>(),
        bit in 0..8_u8,
    ) {
        let mut session = ready();
        for token in 0..3 {
            session.submit(request(Band::In), token).unwrap();
        }
        let (mut words, _) = play(lines, 3);
        let at = at.index(words.len());
        words[at] ^= 1 << bit;
        feed(&mut session, &words, &[words.len()]);
    }

    /// Commands go out in order, at most so many at a time, and each exactly once.
    #[test]
    fn waiting_commands_keep_their_order(
        commands in 0..40_usize,
        answered in prop::collection::vec(any::<Index>(), 40),
    ) {
        let mut session = ready();
        let mut sent = VecDeque::new();
        let mut in_flight: Vec<u64> = Vec::new();
        let mut take_output = |session: &mut Session<usize>| {
            let ids: Vec<u64> = serde_json::Deserializer::from_slice(session.output())
                .into_iter::<Value>()
                .map(|line| line.unwrap()["id"].as_u64().unwrap())
                .collect();
            session.sent(session.output().len());
            sent.extend(&ids);
            ids
        };
        for token in 0..commands {
            session.submit(request(Band::In), token).unwrap();
        }
        for which in answered {
            in_flight.extend(take_output(&mut session));
            prop_assert!(in_flight.len() <= IN_BAND_MAX);
            if in_flight.is_empty() {
                break;
            }
            let id = in_flight.remove(which.index(in_flight.len()));
            let reply = format!("{{\"return\":{{}},\"id\":{id}}}\n");
            session.receive(reply.as_bytes(), Instant::now());
            let incoming = session.poll().unwrap();
            let token = usize::try_from(id).unwrap() - 1;
            prop_assert!(
                matches!(&incoming, Some(Incoming::Reply { token: back, .. }) if *back == token),
                "{:?}", incoming
            );
        }
        prop_assert_eq!(sent, (1..=commands as u64).collect::<VecDeque<_>>());
        prop_assert_eq!(session.into_unanswered().count(), 0);
    }
}

#[test]
fn so_many_commands_and_no_more() {
    let mut session = ready();
    for token in 0..UNANSWERED_MAX {
        session.submit(request(Band::In), token).unwrap();
    }
    for band in [Band::In, Band::Out] {
        let (error, token) = session.submit(request(band), 7777).unwrap_err();
        let limit = UNANSWERED_MAX;
        assert!(matches!(error, Error::Busy { limit: at, .. } if at == limit));
        assert_eq!(token, 7777);
    }
    let unanswered: Vec<_> = session.into_unanswered().collect();
    assert!(unanswered.into_iter().eq(0..UNANSWERED_MAX));
}

#[test]
fn a_refused_negotiation_is_the_end() {
    let mut session = Session::<()>::new(LINE_MAX);
    let refusal = br#"{"error": {"class": "GenericError", "desc": "no"}, "id": 0}"#;
    let words = [GREETING, b"\n", refusal, b"\n"].concat();
    session.receive(&words, Instant::now());
    let error = session.poll().unwrap_err();
    assert_eq!(error.to_string(), "qmp_capabilities: no (GenericError)");
    assert!(session.greeting().is_none());
}

#[test]
fn arguments_are_written_only_when_there_are_some() {
    let encoded = |arguments: Value| {
        let mut bytes = Vec::new();
        let request = Request::new("a\"b", &arguments, Band::In).unwrap();
        request.encode(12, &mut bytes);
        String::from_utf8(bytes).unwrap()
    };
    let bare = "{\"execute\":\"a\\\"b\",\"id\":12}\n";
    assert_eq!(encoded(Value::Null), bare);
    assert_eq!(encoded(json!({})), bare);
    assert_eq!(
        encoded(json!({"x": [1, "é"]})),
        "{\"execute\":\"a\\\"b\",\"id\":12,\"arguments\":{\"x\":[1,\"é\"]}}\n"
    );
}
