//! The bytes of version 2, as the crate's documentation shows them.

use std::collections::{BTreeMap, BTreeSet};

use bytes::{Bytes, BytesMut};
use ferry_stream::frame::{Decoder, Generation, HEADER_BYTES, Kind};
use ferry_stream::lane::{
    ControlWriter, Incoming, PageLaneReader, PageLaneWriter, Request, RequestReader, RequestWriter,
};
use ferry_stream::limits::PAGE_BYTES;
use ferry_stream::message::{
    AbortCode, Absence, DataRun, Features, Hello, LaneId, LaneIndex, Message, Mode, Offer, Purpose,
    RegionInfo, Round, Run, SessionId, Verdict, Versions, Welcome,
};
use ferry_stream::pages::delta::{self, Applied};
use ferry_stream::pages::{DeltaBuffer, Effort, Encoding, Packer, PageFrame, PageRun, Record};

/// The documented examples, by name.
fn golden() -> BTreeMap<&'static str, Vec<u8>> {
    let mut frames: BTreeMap<_, Vec<u8>> = BTreeMap::new();
    let mut name = "";
    for line in include_str!("../src/golden.txt").lines() {
        let Some(bytes) = line.strip_prefix("  ") else {
            name = line;
            continue;
        };
        let frame = frames.entry(name).or_default();
        for token in bytes.split(' ') {
            let (byte, times) = token.split_once('*').unwrap_or((token, "1"));
            let byte = u8::from_str_radix(byte, 16).unwrap();
            frame.resize(frame.len() + times.parse::<usize>().unwrap(), byte);
        }
    }
    frames
}

fn hello(purpose: Purpose, offer: Option<Offer>) -> Message {
    Message::Hello(Hello {
        versions: Versions::OURS,
        features: Features::NONE,
        session: "000102030405060708090a0b0c0d0e0f"
            .parse::<SessionId>()
            .unwrap(),
        purpose,
        offer,
    })
}

const SECOND: LaneId = LaneId {
    index: LaneIndex(2),
    generation: Generation(1),
};

fn offer() -> Offer {
    Offer {
        arch: "x86_64".into(),
        machine: "pc-q35-10.0".into(),
        vmm: "QEMU 10.0.2".into(),
        regions: vec![
            RegionInfo {
                name: "ram0".into(),
                bytes: 1 << 30,
                backing_page_bytes: 4 << 10,
            },
            RegionInfo {
                name: "ram1".into(),
                bytes: 2 << 30,
                backing_page_bytes: 2 << 20,
            },
        ],
        lanes: 2,
        mode: Mode::Live,
    }
}

fn messages() -> Vec<(&'static str, Message)> {
    [hand_over(), lanes_and_pages(), endings()].concat()
}

/// From the greeting to the guest's new owner.
fn hand_over() -> Vec<(&'static str, Message)> {
    vec![
        ("hello-migrate", hello(Purpose::Migrate, Some(offer()))),
        ("hello-lane", hello(Purpose::Lane(SECOND), None)),
        ("hello-inquire", hello(Purpose::Inquire, None)),
        ("hello-fetch", hello(Purpose::Fetch(SECOND), None)),
        (
            "welcome",
            Message::Welcome(Welcome {
                version: 2,
                features: Features::NONE,
                lanes: 2,
            }),
        ),
        ("prepared", Message::Prepared),
        ("paused", Message::Paused),
        (
            "state",
            Message::State {
                offset: 0x1_0000,
                bytes: Bytes::from_static(b"QEVM"),
            },
        ),
        (
            "round-done",
            Message::RoundDone {
                round: Round(1),
                pages: 0x4_0000,
            },
        ),
        (
            "complete",
            Message::Complete {
                round: Round(3),
                pages: 0x4_1234,
                state_bytes: 0x1_abcd,
                state_crc: 0xdead_beef,
            },
        ),
        ("ready", Message::Ready { load_us: 2_200 }),
        ("go", Message::Go { run: Run::Run }),
        (
            "go-stay-paused",
            Message::Go {
                run: Run::StayPaused,
            },
        ),
        ("running", Message::Running { resume_us: 300 }),
        (
            "returned",
            Message::Returned {
                reason: "no write lock".into(),
            },
        ),
    ]
}

/// Of lanes that die, and of pages.
fn lanes_and_pages() -> Vec<(&'static str, Message)> {
    vec![
        (
            "lane-lost",
            Message::LaneLost {
                lane: SECOND,
                text: "reset".into(),
            },
        ),
        ("fence", Message::Fence(SECOND)),
        (
            "fenced",
            Message::Fenced {
                lane: SECOND,
                frames: 0x1234,
                pages: 0x5678,
            },
        ),
        (
            "mismatch",
            Message::Mismatch {
                lane: SECOND,
                round: Round(3),
                region: 1,
                page: 0x1234_5678,
            },
        ),
        (
            "ahead",
            Message::Ahead {
                region: 1,
                runs: vec![
                    DataRun {
                        first: 0x100,
                        count: 0x80,
                    },
                    DataRun {
                        first: 0x4_0000,
                        count: 1,
                    },
                ],
            },
        ),
        (
            "absent",
            Message::Absent(Absence {
                region: 1,
                first: 0x100,
                count: 0x8_0000,
                map: Bytes::new(),
            }),
        ),
        ("absent-map", Message::Absent(mapped())),
        ("discard", Message::Discard),
        ("discarded", Message::Discarded),
    ]
}

/// Six pages of twelve.
fn mapped() -> Absence {
    Absence {
        region: 0,
        first: 0x40,
        count: 12,
        map: Bytes::from_static(&[0x81, 0x0f]),
    }
}

/// What a target says on a fetch lane.
fn requests() -> Vec<(&'static str, Request)> {
    let (region, page) = (1, 0x1234);
    vec![
        ("fault", Request::Fault { region, page }),
        ("placed", Request::Placed { frames: 0x56 }),
        ("lacking", Request::Lacking(mapped())),
        ("whole", Request::Whole),
    ]
}

#[test]
fn requests_have_the_documented_bytes() {
    let golden = golden();
    let shown: Vec<u8> = requests()
        .iter()
        .flat_map(|(name, _)| golden[name].clone())
        .collect();
    let all: Vec<_> = requests().into_iter().map(|(_, request)| request).collect();
    let mut wire = Vec::new();
    RequestWriter::new(SECOND).send(&mut wire, &all).unwrap();
    assert_eq!(wire, shown);
    let (mut from, mut reader) = (&shown[..], RequestReader::new(SECOND));
    for request in all {
        assert_eq!(reader.next(&mut from).unwrap(), Some(request));
    }
    assert_eq!(reader.next(&mut from).unwrap(), None);
}

#[test]
fn a_map_tells_the_runs_that_are_missing() {
    let runs = |absence: &Absence| -> Vec<_> {
        let runs = absence.runs();
        runs.map(|DataRun { first, count }| (first, count))
            .collect()
    };
    assert_eq!(runs(&mapped()), [(0x40, 1), (0x47, 5)]);
    let all = Absence {
        map: Bytes::new(),
        ..mapped()
    };
    assert_eq!(runs(&all), [(0x40, 12)]);
    let none = Absence {
        map: Bytes::from_static(&[0, 0]),
        ..mapped()
    };
    assert_eq!(runs(&none), []);
}

/// The rest.
fn endings() -> Vec<(&'static str, Message)> {
    vec![
        ("finished", Message::Finished),
        ("ping", Message::Ping),
        ("inquire", Message::Inquire),
        ("answer-taken", Message::Answer(Verdict::Taken)),
        ("answer-refused", Message::Answer(Verdict::Refused)),
        ("answer-returned", Message::Answer(Verdict::Returned)),
        (
            "abort",
            Message::Abort {
                code: AbortCode::Busy,
                text: "one guest at a time".into(),
            },
        ),
    ]
}

#[tokio::test]
async fn messages_have_the_documented_bytes() {
    let golden = golden();
    for (name, message) in messages() {
        let mut wire = Vec::new();
        ControlWriter::new(&mut wire).send(&message).await.unwrap();
        assert_eq!(wire, golden[name], "{name} is written otherwise");
        let mut decoder = Decoder::new(LaneIndex::CONTROL, Generation::default());
        decoder.push(&golden[name]);
        let frame = decoder.next_frame().unwrap().unwrap();
        let read = Message::decode(frame.header.kind, frame.payload).unwrap();
        assert_eq!(read, message, "{name} is read otherwise");
    }
}

const LANE: LaneIndex = LaneIndex(1);
const GENERATION: Generation = Generation(2);
const LANE_ID: LaneId = LaneId {
    index: LANE,
    generation: GENERATION,
};

fn raw() -> PageRun {
    PageRun {
        region: 0,
        first: 0x12,
        count: 2,
    }
}

fn zero() -> PageRun {
    PageRun {
        region: 1,
        first: 0x100,
        count: 0x1_0000,
    }
}

#[test]
fn page_frames_are_written_with_the_documented_bytes() {
    let golden = golden();
    let mut writer = PageLaneWriter::new(LANE_ID);
    let mut frame = PageFrame::new(2);
    frame.begin(Round(3));
    let bytes = frame.push_raw(raw()).unwrap();
    bytes[..PAGE_BYTES].fill(0x5a);
    bytes[PAGE_BYTES..].fill(0xa5);
    frame.push_zero(zero()).unwrap();
    let mut wire = Vec::new();
    writer.send(&mut wire, &mut frame).unwrap();
    assert_eq!(wire, golden["pages"]);
    wire.clear();
    writer.end_round(&mut wire, Round(3)).unwrap();
    assert_eq!(wire, golden["round-end"]);
}

/// The same frame packed, and one with a delta, written.
fn variants() -> Vec<(&'static str, Vec<u8>)> {
    let written = |fill: &dyn Fn(&mut PageFrame)| {
        let mut frame = PageFrame::new(2);
        frame.begin(Round(3));
        fill(&mut frame);
        let mut wire = Vec::new();
        PageLaneWriter::new(LANE_ID)
            .send(&mut wire, &mut frame)
            .unwrap();
        wire
    };
    let packed = |effort| {
        written(&|frame| {
            frame.push_raw(raw()).unwrap().fill(0x5a);
            assert!(frame.pack(&mut Packer::new(), effort));
        })
    };
    let delta = written(&|frame| {
        let page = frame.push_raw(one()).unwrap();
        page.fill(0x5a);
        page[16] = 0xa5;
        assert!(frame.tell_as_delta(&[0x5a; PAGE_BYTES], &mut DeltaBuffer::new()));
    });
    let shared = written(&|frame| {
        frame.push_shared(raw()).unwrap();
        frame.push_raw(one()).unwrap().fill(0x5a);
    });
    vec![
        ("pages-lz4", packed(Effort::Lz4)),
        ("pages-zstd", packed(Effort::Zstd(1))),
        ("pages-delta", delta),
        ("pages-shared", shared),
    ]
}

fn one() -> PageRun {
    PageRun { count: 1, ..raw() }
}

/// Another release of a packer may find other bytes for the same data, but must read these.
#[test]
fn packed_frames_and_deltas_have_the_documented_bytes() {
    let golden = golden();
    for (name, wire) in variants() {
        let shown = &golden[name];
        let pages = match name {
            "pages-delta" => 1,
            "pages-shared" => 3,
            _ => 2,
        };
        if ["pages-delta", "pages-shared"].contains(&name) {
            assert_eq!(wire, *shown);
        }
        let mut data = Vec::new();
        for wire in [&wire, shown] {
            let mut from = &wire[..];
            let mut reader = PageLaneReader::new(LANE_ID);
            let Incoming::Pages(body) = reader.next(&mut from).unwrap() else {
                panic!("{name} holds pages");
            };
            let mut came = Vec::new();
            let placed = body.place(|_, data, mut hasher| {
                let start = came.len();
                data.read_to_end(&mut came)?;
                hasher.update(&came[start..]);
                Ok::<_, ferry_stream::Error>(hasher)
            });
            assert_eq!(placed.unwrap().pages, pages);
            data.push(came);
        }
        assert_eq!(data[0], data[1], "{name} is read otherwise");
        if name == "pages-delta" {
            let mut page = [0x5a; PAGE_BYTES];
            let applied = delta::apply(&data[1], &mut page).unwrap();
            assert_eq!((applied, page[16]), (Applied::Done, 0xa5));
        } else {
            let told = if name == "pages-shared" { 1 } else { 2 };
            assert_eq!(data[1], vec![0x5a; told * PAGE_BYTES]);
        }
    }
}

#[test]
fn page_frames_are_read_from_the_documented_bytes() {
    let golden = golden();
    let wire = [&*golden["pages"], &golden["round-end"]].concat();
    let mut from = &*wire;
    let mut reader = PageLaneReader::new(LANE_ID);
    let Incoming::Pages(body) = reader.next(&mut from).unwrap() else {
        panic!("pages come first");
    };
    let records = [(raw(), Encoding::Raw), (zero(), Encoding::Zero)];
    let records = records.map(|(run, encoding)| Record { run, encoding });
    assert_eq!(body.records(), records);
    let mut came = Vec::new();
    let placed = body.place(|_, data, mut hasher| {
        let start = came.len();
        data.read_to_end(&mut came)?;
        hasher.update(&came[start..]);
        Ok::<_, ferry_stream::Error>(hasher)
    });
    assert_eq!(placed.unwrap().pages, 0x1_0002);
    assert_eq!(came, [[0x5a; PAGE_BYTES], [0xa5; PAGE_BYTES]].concat());
    let Incoming::RoundEnd { round, pages } = reader.next(&mut from).unwrap() else {
        panic!("the round's end comes next");
    };
    assert_eq!((round, pages), (Round(3), 0x1_0002));
    assert!(matches!(reader.next(&mut from).unwrap(), Incoming::End));
}

#[test]
fn every_kind_and_nothing_else_is_documented() {
    let golden = golden();
    let mut tested: BTreeSet<_> = messages().into_iter().map(|(name, _)| name).collect();
    tested.extend(["pages", "round-end"]);
    tested.extend(variants().into_iter().map(|(name, _)| name));
    tested.extend(requests().into_iter().map(|(name, _)| name));
    let documented: BTreeSet<_> = golden.keys().copied().collect();
    assert_eq!(documented, tested);
    let shown: BTreeSet<u8> = golden.values().map(|frame| frame[6]).collect();
    let known: BTreeSet<u8> = Kind::ALL.into_iter().map(|kind| kind as u8).collect();
    assert_eq!(shown, known);
    let doc = include_str!("../src/wire.md");
    for kind in Kind::ALL {
        let row = format!("| {} | {kind:?} |", kind as u8);
        assert!(doc.contains(&row), "no row {row:?}");
    }
}

#[test]
fn the_largest_payloads_fit_their_limits_exactly() {
    let name = "n".repeat(ferry_stream::limits::MAX_NAME);
    let region = RegionInfo {
        name: name.clone(),
        bytes: u64::MAX,
        backing_page_bytes: u32::MAX,
    };
    let offer = Offer {
        arch: name.clone(),
        machine: name.clone(),
        vmm: name,
        regions: vec![region; ferry_stream::limits::MAX_REGIONS],
        lanes: ferry_stream::limits::MAX_LANES,
        mode: Mode::Paused,
    };
    let text = "t".repeat(ferry_stream::limits::MAX_TEXT);
    let mut largest = messages();
    largest.extend([
        ("", hello(Purpose::Migrate, Some(offer))),
        (
            "",
            Message::State {
                offset: 0,
                bytes: vec![0; ferry_stream::limits::MAX_STATE_CHUNK].into(),
            },
        ),
        (
            "",
            Message::Returned {
                reason: text.clone(),
            },
        ),
        (
            "",
            Message::LaneLost {
                lane: SECOND,
                text: text.clone(),
            },
        ),
        (
            "",
            Message::Ahead {
                region: 0,
                runs: (0..ferry_stream::limits::MAX_AHEAD_RUNS as u64)
                    .map(|first| DataRun { first, count: 1 })
                    .collect(),
            },
        ),
        (
            "",
            Message::Absent(Absence {
                count: ferry_stream::limits::MAX_MAPPED_PAGES,
                map: vec![1; ferry_stream::limits::MAX_MAP_BYTES].into(),
                ..mapped()
            }),
        ),
        (
            "",
            Message::Abort {
                code: AbortCode::Unknown(u16::MAX),
                text,
            },
        ),
    ]);
    let mut longest = BTreeMap::new();
    for (_, message) in largest {
        let mut payload = BytesMut::new();
        message.encode(&mut payload).unwrap();
        let most = longest.entry(message.kind() as u8).or_insert(0);
        *most = payload.len().max(*most);
    }
    for kind in Kind::ALL
        .into_iter()
        .filter(|kind| !kind.is_for_page_lanes())
    {
        assert_eq!(longest[&(kind as u8)], kind.max_payload(), "{kind:?}");
    }
    assert_eq!(
        golden()["round-end"].len(),
        HEADER_BYTES + Kind::RoundEnd.max_payload()
    );
}
