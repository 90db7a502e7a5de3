//! Whatever is sent comes out, however the bytes are split; whatever is damaged does not.

use std::io::{self, Read};

use bytes::{Bytes, BytesMut};
use ferry_stream::Error;
use ferry_stream::frame::{Decoder, Generation, Header, Kind, Position};
use ferry_stream::lane::{Incoming, PageLaneReader, PageLaneWriter};
use ferry_stream::limits::{MAX_NAME, MAX_PAGE_DATA, MAX_TEXT, PAGE_BYTES, PAGE_NUMBER_END};
use ferry_stream::message::{
    AbortCode, DataRun, Features, Hello, LaneId, LaneIndex, Message, Mode, Offer, Purpose,
    RegionInfo, Round, Run, SessionId, Verdict, Versions, Welcome,
};
use ferry_stream::pages::{Effort, Encoding, Packer, PageFrame, PageRun, Record, Zeros};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};

fn name() -> impl Strategy<Value = String> {
    "[a-zA-Z0-9/._ é-]{1,60}".prop_filter("within the limit", |name| name.len() <= MAX_NAME)
}

fn region() -> impl Strategy<Value = RegionInfo> {
    (name(), any::<u64>(), any::<u32>()).prop_map(|(name, bytes, backing_page_bytes)| RegionInfo {
        name,
        bytes,
        backing_page_bytes,
    })
}

fn offer() -> impl Strategy<Value = Offer> {
    let mode = select(vec![Mode::Live, Mode::Paused]);
    (
        name(),
        name(),
        name(),
        vec(region(), 1..20),
        1..=64_u16,
        mode,
    )
        .prop_map(|(arch, machine, vmm, regions, lanes, mode)| Offer {
            arch,
            machine,
            vmm,
            regions,
            lanes,
            mode,
        })
}

fn lane() -> impl Strategy<Value = LaneId> {
    (1..=64_u16, any::<u16>()).prop_map(|(index, generation)| LaneId {
        index: LaneIndex(index),
        generation: Generation(generation),
    })
}

fn hello() -> impl Strategy<Value = Message> {
    let purpose = prop_oneof![
        offer().prop_map(|offer| (Purpose::Migrate, Some(offer))),
        lane().prop_map(|lane| (Purpose::Lane(lane), None)),
        Just((Purpose::Inquire, None)),
    ];
    let versions = (1_u16.., any::<u16>()).prop_map(|(lowest, more)| Versions {
        lowest,
        highest: lowest.saturating_add(more),
    });
    (versions, any::<u64>(), any::<[u8; 16]>(), purpose).prop_map(
        |(versions, features, session, (purpose, offer))| {
            Message::Hello(Hello {
                versions,
                features: Features(features),
                session: SessionId(session),
                purpose,
                offer,
            })
        },
    )
}

/// Runs in order, some touching the one before.
fn data_runs() -> impl Strategy<Value = Vec<DataRun>> {
    vec((0..1_u64 << 40, 1..1_u64 << 40), 1..30).prop_map(|gaps| {
        let mut free = 0;
        let run = |(gap, count)| {
            let first = free + gap;
            free = first + count;
            DataRun { first, count }
        };
        gaps.into_iter().map(run).collect()
    })
}

fn message() -> impl Strategy<Value = Message> {
    let plain = select(vec![
        Message::Prepared,
        Message::Paused,
        Message::Ready { load_us: 2_200 },
        Message::Go { run: Run::Run },
        Message::Go {
            run: Run::StayPaused,
        },
        Message::Running {
            resume_us: u32::MAX,
        },
        Message::Finished,
        Message::Ping,
        Message::Inquire,
        Message::Answer(Verdict::Taken),
        Message::Answer(Verdict::Refused),
        Message::Answer(Verdict::Returned),
    ]);
    let welcome = (any::<u16>(), any::<u64>(), 0..=64_u16);
    let state = (0..1_u64 << 29, vec(any::<u8>(), 1..300));
    let complete = (1_u32.., any::<u64>(), 0..=1_u64 << 30, any::<u32>());
    prop_oneof![
        hello(),
        plain,
        welcome.prop_map(|(version, features, lanes)| Message::Welcome(Welcome {
            version,
            features: Features(features),
            lanes,
        })),
        state.prop_map(|(offset, bytes)| Message::State {
            offset,
            bytes: bytes.into(),
        }),
        (1_u32.., any::<u64>()).prop_map(|(round, pages)| Message::RoundDone {
            round: Round(round),
            pages,
        }),
        complete.prop_map(|(round, pages, state_bytes, state_crc)| Message::Complete {
            round: Round(round),
            pages,
            state_bytes,
            state_crc,
        }),
        (lane(), "[a-zé ]{0,300}").prop_map(|(lane, text)| Message::LaneLost { lane, text }),
        lane().prop_map(Message::Fence),
        (lane(), any::<u64>(), any::<u64>()).prop_map(|(lane, frames, pages)| Message::Fenced {
            lane,
            frames,
            pages,
        }),
        (lane(), 1_u32.., any::<u16>(), 0..PAGE_NUMBER_END).prop_map(
            |(lane, round, region, page)| Message::Mismatch {
                lane,
                round: Round(round),
                region,
                page,
            }
        ),
        (0..512_u16, data_runs()).prop_map(|(region, runs)| Message::Ahead { region, runs }),
        "[a-zé ]{0,300}".prop_map(|reason| Message::Returned { reason }),
        (any::<u16>(), "[a-zé ]{0,300}").prop_map(|(code, text)| Message::Abort {
            code: AbortCode::from_number(code),
            text,
        }),
    ]
}

/// The frames of `messages`, one after the other, and where each ends.
fn wire(messages: &[Message]) -> (Vec<u8>, Vec<usize>) {
    let mut wire = Vec::new();
    let mut ends = Vec::new();
    for (message, sequence) in messages.iter().zip(0..) {
        let mut payload = BytesMut::new();
        message.encode(&mut payload).unwrap();
        wire.extend(sealed(
            message.kind(),
            LaneIndex::CONTROL,
            sequence,
            &payload,
        ));
        ends.push(wire.len());
    }
    (wire, ends)
}

fn sealed(kind: Kind, lane: LaneIndex, sequence: u64, payload: &[u8]) -> Vec<u8> {
    let header = Header {
        kind,
        position: Position {
            lane,
            generation: Generation::default(),
            sequence,
        },
        length: u32::try_from(payload.len()).unwrap(),
    };
    let mut hasher = header.seed();
    hasher.update(payload);
    [&header.to_bytes(hasher.finalize()), payload].concat()
}

/// Everything that comes out of `pieces`, and how it ended.
fn decode<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> (Vec<Message>, Result<(), Error>) {
    let mut decoder = Decoder::new(LaneIndex::CONTROL, Generation::default());
    let mut messages = Vec::new();
    for piece in pieces {
        decoder.push(piece);
        loop {
            match decoder.next_frame() {
                Ok(None) => break,
                Ok(Some(frame)) => match Message::decode(frame.header.kind, frame.payload) {
                    Ok(message) => messages.push(message),
                    Err(error) => return (messages, Err(error)),
                },
                Err(error) => {
                    let again = decoder.next_frame().unwrap_err();
                    assert_eq!(again.to_string(), error.to_string());
                    return (messages, Err(error));
                }
            }
        }
    }
    (messages, decoder.finish())
}

fn split<'a>(mut bytes: &'a [u8], cuts: &[Index]) -> Vec<&'a [u8]> {
    let mut at: Vec<_> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
    at.sort_unstable();
    let mut pieces = Vec::new();
    let mut done = 0;
    for at in at {
        let (piece, rest) = bytes.split_at(at - done);
        pieces.push(piece);
        bytes = rest;
        done = at;
    }
    pieces.push(bytes);
    pieces
}

proptest! {
    #[test]
    fn messages_survive_any_split(
        messages in vec(message(), 1..6),
        cuts in vec(any::<Index>(), 0..12),
    ) {
        let (wire, _) = wire(&messages);
        let (decoded, end) = decode(split(&wire, &cuts));
        prop_assert!(end.is_ok(), "{end:?}");
        prop_assert_eq!(&decoded, &messages);
        let (decoded, end) = decode(wire.chunks(1));
        prop_assert!(end.is_ok(), "{end:?}");
        prop_assert_eq!(decoded, messages);
    }

    #[test]
    fn no_damaged_message_comes_out(
        messages in vec(message(), 1..6),
        at in any::<Index>(),
        bit in 0..8,
    ) {
        let (mut wire, ends) = wire(&messages);
        let at = at.index(wire.len());
        wire[at] ^= 1_u8 << bit;
        let whole = ends.iter().take_while(|end| **end <= at).count();
        let (decoded, end) = decode([&*wire]);
        prop_assert!(end.is_err());
        prop_assert_eq!(decoded, &messages[..whole]);
    }

    #[test]
    fn a_cut_stream_is_noticed(messages in vec(message(), 1..6), at in any::<Index>()) {
        let (wire, ends) = wire(&messages);
        let at = at.index(wire.len());
        let whole = ends.iter().take_while(|end| **end <= at).count();
        let (decoded, end) = decode([&wire[..at]]);
        prop_assert_eq!(decoded, &messages[..whole]);
        if at == 0 || ends.contains(&at) {
            prop_assert!(end.is_ok());
        } else {
            let truncated = matches!(end, Err(Error::Truncated { .. }));
            prop_assert!(truncated);
        }
    }

    #[test]
    fn no_bytes_make_the_decoder_panic(bytes in vec(any::<u8>(), 0..200)) {
        let (messages, _) = decode([&*bytes]);
        prop_assert_eq!(messages, []);
    }

    #[test]
    fn what_a_payload_decodes_to_can_be_sent_again(
        kind in select(Kind::ALL.to_vec()),
        payload in vec(prop_oneof![0..4_u8, any::<u8>()], 0..80),
    ) {
        if let Ok(message) = Message::decode(kind, Bytes::from(payload)) {
            let mut again = BytesMut::new();
            message.encode(&mut again).unwrap();
            prop_assert_eq!(Message::decode(kind, again.freeze()).unwrap(), message);
        }
    }

    #[test]
    fn texts_for_people_arrive_short_and_clean(text in any::<String>(), times in 0..200_usize) {
        let text = text.repeat(times);
        let mut payload = BytesMut::new();
        Message::Returned { reason: text.clone() }.encode(&mut payload).unwrap();
        let message = Message::decode(Kind::Returned, payload.freeze()).unwrap();
        let Message::Returned { reason } = message else {
            panic!("another message came out");
        };
        prop_assert!(reason.len() <= MAX_TEXT);
        prop_assert!(!reason.chars().any(char::is_control));
        let mut kept = reason.chars().zip(text.chars());
        prop_assert!(kept.all(|(ours, theirs)| ours == theirs || theirs.is_control()));
    }
}

const LANE: LaneIndex = LaneIndex(7);

/// Bytes in a record of a page frame's table.
const RECORD_BYTES: usize = 24;

/// Pages in the region that the tests move.
const PAGES: u32 = 32;

/// What is in every page of the sender's memory that the receiver looks at.
const FOUND: u8 = 0x77;

/// What becomes of one run of pages.
#[derive(Clone, Debug)]
enum Step {
    Zero(PageRun),
    Shared(PageRun),
    /// The bytes that each page is filled with, and whether zeros are looked for.
    Raw(PageRun, Vec<u8>, Option<Zeros>),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let run = (0..PAGES).prop_flat_map(|first| {
        (1..=PAGES - first).prop_map(move |count| PageRun {
            region: 0,
            first: first.into(),
            count,
        })
    });
    let zeros = select(vec![None, Some(Zeros::Tell), Some(Zeros::Skip)]);
    let step = (run, 0..4_u8, vec(0..3_u8, PAGES as usize), zeros);
    vec(
        step.prop_map(|(run, kind, fill, zeros)| match kind {
            0 => Step::Zero(run),
            1 => Step::Shared(run),
            _ => Step::Raw(run, fill, zeros),
        }),
        1..8,
    )
}

/// Sends the steps as one round, a frame being sent whenever the next step does not fit. Returns
/// the wire, and RAM as it must be at the receiver.
///
/// With an effort every frame is packed.
fn send(steps: &[Step], effort: Option<Effort>) -> (Vec<u8>, Vec<u8>) {
    let mut wire = Vec::new();
    let mut packer = Packer::new();
    let mut ram = vec![0xEE; PAGES as usize * PAGE_BYTES];
    let mut writer = PageLaneWriter::new(LaneId::first(LANE));
    let mut frame = PageFrame::new(40);
    for step in steps {
        match step {
            Step::Zero(run) => {
                frame.push_zero(*run).unwrap();
                ram[bytes_of(run)].fill(0);
            }
            Step::Shared(run) => {
                frame.push_shared(*run).unwrap();
                ram[bytes_of(run)].fill(FOUND);
            }
            Step::Raw(run, fill, zeros) => {
                if frame.raw_room() < run.count {
                    pack(&mut frame, &mut packer, effort);
                    writer.send(&mut wire, &mut frame).unwrap();
                    frame.begin(Round(1));
                }
                let into = frame.push_raw(*run).unwrap();
                for ((fill, into), ram) in fill
                    .iter()
                    .zip(into.chunks_exact_mut(PAGE_BYTES))
                    .zip(ram[bytes_of(run)].chunks_exact_mut(PAGE_BYTES))
                {
                    into.fill(*fill);
                    if *fill != 0 || *zeros != Some(Zeros::Skip) {
                        ram.fill(*fill);
                    }
                }
                if let Some(zeros) = zeros {
                    let none = fill
                        .iter()
                        .take(run.count as usize)
                        .filter(|fill| **fill == 0);
                    assert_eq!(frame.elide_zeros(*zeros), none.count() as u64);
                }
            }
        }
    }
    pack(&mut frame, &mut packer, effort);
    writer.send(&mut wire, &mut frame).unwrap();
    writer.end_round(&mut wire, Round(1)).unwrap();
    (wire, ram)
}

fn pack(frame: &mut PageFrame, packer: &mut Packer, effort: Option<Effort>) {
    if let Some(effort) = effort {
        let before = frame.wire_bytes();
        let packed = frame.pack(packer, effort);
        assert_eq!(packed, frame.wire_bytes() < before);
        assert!(!frame.pack(packer, effort) || !packed, "packed again");
        assert!(!packed || frame.raw_room() == 0);
    }
}

fn efforts() -> impl Strategy<Value = Option<Effort>> {
    select(vec![
        None,
        Some(Effort::Lz4),
        Some(Effort::Zstd(1)),
        Some(Effort::Zstd(3)),
    ])
}

fn bytes_of(run: &PageRun) -> std::ops::Range<usize> {
    let start = usize::try_from(run.first).unwrap() * PAGE_BYTES;
    start..start + run.count as usize * PAGE_BYTES
}

/// Places what comes until the round's end, and notes the runs that were written to.
fn receive(from: &mut impl Read, ram: &mut [u8]) -> (Vec<PageRun>, Result<u64, Error>) {
    let mut touched = Vec::new();
    let mut reader = PageLaneReader::new(LaneId::first(LANE));
    let end = loop {
        match reader.next(from) {
            Ok(Incoming::Pages(body)) => {
                let placed = body.place(|record, data, mut hasher| {
                    touched.push(record.run);
                    let into = &mut ram[bytes_of(&record.run)];
                    match record.encoding {
                        Encoding::Zero => into.fill(0),
                        Encoding::Shared => into.fill(FOUND),
                        _ => {
                            data.read_exact(into)?;
                            hasher.update(into);
                        }
                    }
                    Ok::<_, Error>(hasher)
                });
                if let Err(error) = placed {
                    break Err(error);
                }
            }
            Ok(Incoming::RoundEnd { pages, .. }) => break Ok(pages),
            Ok(Incoming::End) => break Err(Error::Truncated { missing: 0 }),
            Err(error) => break Err(error),
        }
    };
    (touched, end)
}

/// Gives out at most `most` bytes at a time.
struct Trickle<'a> {
    from: &'a [u8],
    most: usize,
}

impl Read for Trickle<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let most = into.len().min(self.most);
        self.from.read(&mut into[..most])
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn pages_survive_any_split(
        steps in steps(),
        effort in efforts(),
        most in 1..9000_usize,
    ) {
        let (wire, expected) = send(&steps, effort);
        let mut ram = vec![0xEE; expected.len()];
        let mut from = Trickle { from: &wire, most };
        let (touched, end) = receive(&mut from, &mut ram);
        let pages: u64 = touched.iter().map(|run| u64::from(run.count)).sum();
        prop_assert_eq!(end.unwrap(), pages);
        prop_assert!(ram == expected, "RAM differs");
    }

    #[test]
    fn damage_is_noticed_and_kept_to_the_pages_named(
        steps in steps(),
        effort in efforts(),
        at in any::<Index>(),
        bit in 0..8,
    ) {
        let (mut wire, expected) = send(&steps, effort);
        let (named, _) = receive(&mut &*wire, &mut vec![0; expected.len()]);
        let at = at.index(wire.len());
        wire[at] ^= 1_u8 << bit;
        let mut ram = vec![0xEE; expected.len()];
        let (touched, end) = receive(&mut &*wire, &mut ram);
        prop_assert!(end.is_err());
        prop_assert_eq!(&touched[..], &named[..touched.len()]);
    }

    #[test]
    fn a_cut_lane_is_noticed(
        steps in steps(),
        effort in efforts(),
        at in any::<Index>(),
    ) {
        let (wire, expected) = send(&steps, effort);
        let mut cut = &wire[..at.index(wire.len())];
        let (_, end) = receive(&mut cut, &mut vec![0; expected.len()]);
        let truncated = matches!(end, Err(Error::Truncated { .. }));
        prop_assert!(truncated);
    }

    #[test]
    fn no_packed_bytes_panic_or_fill_pages_wrongly(
        packing in 1..3_u8,
        good in any::<bool>(),
        noise in vec((any::<Index>(), any::<u8>()), 1..4),
    ) {
        let run = PageRun { region: 0, first: 0, count: PAGES };
        let effort = if packing == 1 { Effort::Lz4 } else { Effort::Zstd(1) };
        let mut frame = PageFrame::new(PAGES);
        let pages = frame.push_raw(run).unwrap();
        for (at, byte) in (0_u32..).zip(pages.iter_mut()) {
            *byte = u8::try_from(at / 3 % 251).unwrap();
        }
        let expected = pages.to_vec();
        assert!(frame.pack(&mut Packer::new(), effort));
        let mut data = frame.data().to_vec();
        for (at, byte) in noise.iter().filter(|_| !good) {
            let at = at.index(data.len());
            data[at] = *byte;
        }
        let record = raw_record(PAGES);
        let wire = sealed(Kind::Pages, LANE, 0, &payload(1, packing, &record, &data));
        let mut ram = vec![0xEE; expected.len()];
        let (touched, end) = receive(&mut &*wire, &mut ram);
        if good {
            prop_assert!(ram == expected);
        }
        // The checksum is right, so what came of the data is all that can be told from it: either
        // exactly as many bytes as the table has pages for, or none in place.
        let refused = matches!(end, Err(Error::BadPacking { .. }));
        let expected = if refused { vec![] } else { vec![run] };
        prop_assert_eq!(touched, expected);
    }

    #[test]
    fn no_table_makes_the_page_lane_panic_or_break_a_limit(
        round in 0..4_u32,
        packing in prop_oneof![9 => Just(0_u8), 1 => 1..4_u8],
        records in vec(record(), 1..4),
        surplus in prop_oneof![8 => Just(0_usize), 1 => 1..9000_usize],
    ) {
        let table: Vec<u8> = records.iter().flat_map(|(record, _)| *record).collect();
        let data_bytes: usize = records.iter().map(|(_, data_bytes)| data_bytes).sum();
        let count = u16::try_from(records.len()).unwrap();
        let payload = payload(round, packing, &table, &vec![1; data_bytes + surplus]);
        assert_eq!(payload[4..6], count.to_le_bytes());
        let wire = sealed(Kind::Pages, LANE, 0, &payload);
        let mut reader = PageLaneReader::new(LaneId::first(LANE));
        if let Ok(Incoming::Pages(body)) = reader.next(&mut &*wire) {
            prop_assert_eq!(body.records().len(), records.len());
            let told: u64 = body.records().iter().map(Record::data_bytes).sum();
            prop_assert!(told <= MAX_PAGE_DATA as u64);
            if packing == 0 {
                prop_assert_eq!((surplus, told), (0, data_bytes as u64));
            }
            for PageRun { first, count, .. } in body.records().iter().map(|record| record.run) {
                prop_assert!(count > 0 && first <= PAGE_NUMBER_END - u64::from(count));
            }
        }
    }
}

/// The record of so many raw pages from the first on.
fn raw_record(pages: u32) -> Vec<u8> {
    let mut record = vec![0; RECORD_BYTES];
    record[2] = 1;
    record[4..8].copy_from_slice(&pages.to_le_bytes());
    record[16..20].copy_from_slice(&(pages * 4096).to_le_bytes());
    record
}

/// The payload of a page frame whose table has its checksum.
fn payload(round: u32, packing: u8, table: &[u8], data: &[u8]) -> Vec<u8> {
    let records = u16::try_from(table.len() / RECORD_BYTES).unwrap();
    let [low, high] = records.to_le_bytes();
    let fixed = [round.to_le_bytes(), [low, high, packing, 0]].concat();
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&fixed);
    hasher.update(table);
    let crc = hasher.finalize().to_le_bytes();
    [&*fixed, &crc, table, data].concat()
}

/// A record as it travels, more often right than wrong, and the bytes of data that go with it.
fn record() -> impl Strategy<Value = ([u8; RECORD_BYTES], usize)> {
    let encoding = prop_oneof![9 => select(vec![0, 1, 3_u8]), 1 => any::<u8>()];
    let count = prop_oneof![9 => 1..4_u32, 1 => 0..2_u32, 1 => any::<u32>()];
    let last = PAGE_NUMBER_END - 3..=PAGE_NUMBER_END;
    let first = prop_oneof![9 => 0..100_u64, 1 => last, 1 => any::<u64>()];
    let reserved = prop_oneof![9 => Just(0), 1 => any::<u8>()];
    (any::<u16>(), encoding, count, first, reserved).prop_map(
        |(region, encoding, count, first, reserved)| {
            let pages = if encoding == 1 { count % 256 } else { 0 };
            let data_bytes = pages * 4096;
            let mut bytes = [0; RECORD_BYTES];
            bytes[0..2].copy_from_slice(&region.to_le_bytes());
            bytes[2..4].copy_from_slice(&[encoding, reserved]);
            bytes[4..8].copy_from_slice(&count.to_le_bytes());
            bytes[8..16].copy_from_slice(&first.to_le_bytes());
            bytes[16..20].copy_from_slice(&data_bytes.to_le_bytes());
            (bytes, data_bytes as usize)
        },
    )
}
