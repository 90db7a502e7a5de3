//! Every way in which a peer's frame can be wrong, each with its own error.

use bytes::{Bytes, BytesMut};
use ferry_stream::Error;
use ferry_stream::frame::{Decoder, Generation, HEADER_BYTES, Header, Kind, Position};
use ferry_stream::lane::{Incoming, PageLaneReader};
use ferry_stream::limits::{
    MAX_AHEAD_RUNS, MAX_LANES, MAX_NAME, MAX_RAW_PAGES, MAX_RECORDS, MAX_REGIONS, MAX_SHARED_PAGES,
    MAX_STATE_BYTES, MAX_ZERO_PAGES, PAGE_BYTES, PAGE_NUMBER_END,
};
use ferry_stream::message::{
    AbortCode, DataRun, Features, Hello, LaneId, LaneIndex, Message, Mode, Offer, Purpose,
    RegionInfo, Round, SessionId, Versions,
};
use ferry_stream::pages::{DeltaBuffer, Packing, PageFrame, PageRun};

/// `$result` is the error `$error`; says what it is otherwise.
macro_rules! assert_error {
    ($result:expr => $($error:tt)+) => {
        match $result {
            Err(Error::$($error)+) => {}
            other => panic!("{:?} is not {}", other.map(|_| "success"), stringify!($($error)+)),
        }
    };
}

const LANE: LaneIndex = LaneIndex(1);

fn header(kind: Kind, lane: LaneIndex, length: u32) -> Header {
    Header {
        kind,
        position: Position::first(lane, Generation(4)),
        length,
    }
}

/// A header whose bytes `change` has changed, as the first of a control lane.
fn first(change: impl FnOnce(&mut [u8; HEADER_BYTES])) -> Result<bool, Error> {
    let header = header(Kind::Ping, LaneIndex::CONTROL, 0);
    let mut bytes = header.to_bytes(header.seed().finalize());
    change(&mut bytes);
    let mut decoder = Decoder::new(LaneIndex::CONTROL, Generation(4));
    decoder.push(&bytes);
    Ok(decoder.next_frame()?.is_some())
}

#[test]
fn headers() {
    assert!(first(|_| {}).unwrap());
    assert_error!(
        first(|b| b[..4].copy_from_slice(b"HTTP")) => BadMagic { found: [b'H', b'T', b'T', b'P'] }
    );
    assert_error!(first(|b| b[4] = 1) => BadVersion { found: 1 });
    assert_error!(first(|b| b[6] = 99) => UnknownKind { found: 99 });
    assert_error!(first(|b| b[7] = 1) => BadFlags { kind: Kind::Ping, found: 1 });
    assert_error!(first(|b| b[8] = 1) => WrongLane { expected: LaneIndex::CONTROL, found: LANE });
    assert_error!(
        first(|b| b[10] = 3)
            => WrongGeneration { expected: Generation(4), found: Generation(3), .. }
    );
    assert_error!(first(|b| b[12] = 9) => OutOfSequence { expected: 0, found: 9, .. });
    assert_error!(first(|b| b[20] = 1) => Oversized { kind: Kind::Ping, length: 1, limit: 0 });
    assert_error!(first(|b| b[24] = 1) => BadReserved { kind: Kind::Ping, found: 1 });
    assert_error!(first(|b| b[28] ^= 1) => Corrupt { kind: Kind::Ping, lane: LaneIndex::CONTROL, sequence: 0 });
}

#[test]
fn a_length_beyond_the_limit_is_refused_by_the_header_alone() {
    for kind in Kind::ALL {
        let lane = if kind.is_for_page_lanes() {
            LANE
        } else {
            LaneIndex::CONTROL
        };
        let limit = kind.max_payload();
        let length = u32::try_from(limit).unwrap() + 1;
        let mut decoder = Decoder::new(lane, Generation(4));
        decoder.push(&header(kind, lane, length).to_bytes(0));
        assert_error!(decoder.next_frame() => Oversized { .. });
        let mut decoder = Decoder::new(lane, Generation(4));
        decoder.push(&header(kind, lane, length - 1).to_bytes(0));
        if limit == 0 {
            assert_error!(decoder.next_frame() => Corrupt { .. });
        } else {
            assert_eq!(decoder.next_frame().unwrap(), None);
        }
    }
}

#[test]
fn kinds_keep_to_their_lanes() {
    for kind in Kind::ALL {
        let lane = if kind.is_for_page_lanes() {
            LaneIndex::CONTROL
        } else {
            LANE
        };
        let mut decoder = Decoder::new(lane, Generation(4));
        decoder.push(&header(kind, lane, 0).to_bytes(0));
        assert_error!(decoder.next_frame() => MisplacedKind { .. });
    }
}

#[test]
fn a_repeated_frame_is_refused() {
    let header = header(Kind::Ping, LaneIndex::CONTROL, 0);
    let bytes = header.to_bytes(header.seed().finalize());
    let mut decoder = Decoder::new(LaneIndex::CONTROL, Generation(4));
    decoder.push(&bytes);
    decoder.push(&bytes);
    assert!(decoder.next_frame().unwrap().is_some());
    assert_error!(decoder.next_frame() => OutOfSequence { expected: 1, found: 0, .. });
}

fn region(name: &str) -> RegionInfo {
    RegionInfo {
        name: name.into(),
        bytes: 1 << 30,
        backing_page_bytes: 4096,
    }
}

fn offer() -> Offer {
    Offer {
        arch: "a".into(),
        machine: "m".into(),
        vmm: "v".into(),
        regions: vec![region("r")],
        lanes: 1,
        mode: Mode::Live,
    }
}

fn hello(purpose: Purpose, offer: Option<Offer>) -> Hello {
    Hello {
        versions: Versions::OURS,
        features: Features::NONE,
        session: SessionId([7; 16]),
        purpose,
        offer,
    }
}

fn encode(message: &Message) -> Result<Vec<u8>, Error> {
    let mut payload = BytesMut::new();
    message.encode(&mut payload)?;
    Ok(payload.to_vec())
}

fn encode_offer(change: impl FnOnce(&mut Offer)) -> Result<Vec<u8>, Error> {
    let mut offer = offer();
    change(&mut offer);
    encode(&Message::Hello(hello(Purpose::Migrate, Some(offer))))
}

fn ahead(runs: &[(u64, u64)]) -> Message {
    let runs = runs
        .iter()
        .map(|&(first, count)| DataRun { first, count })
        .collect();
    Message::Ahead { region: 0, runs }
}

fn decode(kind: Kind, payload: &[u8]) -> Result<Message, Error> {
    Message::decode(kind, Bytes::copy_from_slice(payload))
}

#[test]
fn what_breaks_a_limit_is_not_sent() {
    let long = "n".repeat(MAX_NAME + 1);
    assert!(encode_offer(|_| {}).is_ok());
    assert_error!(encode_offer(|o| o.arch = long.clone()) => BadField { found: 256, .. });
    assert_error!(encode_offer(|o| o.machine = String::new()) => BadField { found: 0, .. });
    assert_error!(encode_offer(|o| o.vmm = "\x1b[2J".into()) => BadText { .. });
    assert_error!(encode_offer(|o| o.regions[0].name = long) => BadField { .. });
    assert_error!(encode_offer(|o| o.regions.clear()) => BadField { found: 0, .. });
    assert_error!(
        encode_offer(|o| o.regions = vec![region("r"); MAX_REGIONS + 1])
            => BadField { found: 513, .. }
    );
    assert_error!(encode_offer(|o| o.lanes = 0) => BadField { found: 0, .. });
    assert_error!(encode_offer(|o| o.lanes = MAX_LANES + 1) => BadField { found: 65, .. });
    let no_offer = Message::Hello(hello(Purpose::Migrate, None));
    assert_error!(encode(&no_offer) => BadField { found: 0, .. });
    let needless = Message::Hello(hello(Purpose::Inquire, Some(offer())));
    assert_error!(encode(&needless) => BadField { found: 1, .. });
    let control = Message::Hello(hello(
        Purpose::Lane(LaneId::first(LaneIndex::CONTROL)),
        None,
    ));
    assert_error!(encode(&control) => BadField { found: 0, .. });
    let no_state = Message::State {
        offset: 0,
        bytes: Bytes::new(),
    };
    assert_error!(encode(&no_state) => BadField { found: 0, .. });
    let far_state = Message::State {
        offset: MAX_STATE_BYTES,
        bytes: Bytes::from_static(b"x"),
    };
    assert_error!(encode(&far_state) => BadField { found: MAX_STATE_BYTES, .. });
    assert_error!(encode(&ahead(&[])) => BadField { found: 0, .. });
    assert_error!(encode(&ahead(&[(3, 0)])) => BadField { found: 0, .. });
    assert_error!(encode(&ahead(&[(3, 2), (4, 1)])) => BadField { found: 4, .. });
    assert_error!(encode(&ahead(&[(PAGE_NUMBER_END, 1)])) => BadField { .. });
    assert_error!(encode(&ahead(&[(1, PAGE_NUMBER_END)])) => BadField { .. });
    let many: Vec<_> = (0..=MAX_AHEAD_RUNS as u64).map(|at| (2 * at, 1)).collect();
    assert_error!(encode(&ahead(&many)) => BadField { found: 1025, .. });
    let no_round = Message::RoundDone {
        round: Round(0),
        pages: 0,
    };
    assert_error!(encode(&no_round) => BadField { found: 0, .. });
    let lane = LaneId::first(LANE);
    for (lane, round, page) in [
        (LaneId::first(LaneIndex::CONTROL), 1, 0),
        (lane, 0, 0),
        (lane, 1, PAGE_NUMBER_END),
    ] {
        let mismatch = Message::Mismatch {
            lane,
            round: Round(round),
            region: 0,
            page,
        };
        assert_error!(encode(&mismatch) => BadField { kind: Kind::Mismatch, .. });
    }
}

#[test]
fn hellos() {
    let offered = encode_offer(|_| {}).unwrap();
    for end in 0..offered.len() {
        assert_error!(decode(Kind::Hello, &offered[..end]) => ShortPayload { kind: Kind::Hello });
    }
    let longer = [&*offered, &[0, 0]].concat();
    assert_error!(decode(Kind::Hello, &longer) => TrailingBytes { count: 2, .. });
    // Where the fields of this hello are: see the table in the crate's documentation.
    let change = |at: usize, byte: u8| {
        let mut changed = offered.clone();
        changed[at] = byte;
        decode(Kind::Hello, &changed)
    };
    assert_error!(change(0, 9) => BadField { field: "the lowest version", found: 9, .. });
    assert_error!(change(28, 5) => BadField { field: "the purpose", found: 5, .. });
    assert_error!(change(29, 1) => BadField { field: "the lane", found: 1, .. });
    assert_error!(change(31, 1) => BadField { field: "the lane", found: 0, .. });
    assert_error!(change(33, 3) => BadField { field: "the mode", found: 3, .. });
    assert_error!(change(37, 1) => BadField { field: "the architecture", found: 257, .. });
    assert_error!(change(38, 0xFF) => BadText { field: "the architecture", .. });
    assert_error!(change(38, b'\n') => BadText { field: "the architecture", .. });
    assert_error!(change(46, 3) => BadField { field: "the number of regions", found: 769, .. });
}

#[test]
fn other_control_payloads() {
    assert_error!(decode(Kind::Go, &[3]) => BadField { field: "the run state", found: 3, .. });
    assert_error!(decode(Kind::Answer, &[0]) => BadField { field: "the verdict", found: 0, .. });
    assert_error!(decode(Kind::Prepared, &[0]) => TrailingBytes { count: 1, .. });
    assert_error!(decode(Kind::State, &[0; 8]) => BadField { field: "the length", .. });
    assert_error!(
        decode(Kind::Abort, &[5, 0, 2, 0, 0xC3, 0x28]) => BadText { field: "the text", .. }
    );
    // A count is believed only as far as the bytes behind it go.
    assert_error!(decode(Kind::Ahead, &[0, 0, 0, 4]) => ShortPayload { kind: Kind::Ahead });
    assert_error!(
        decode(Kind::Ahead, &[0, 0, 1, 4]) => BadField { field: "the number of runs", .. }
    );
    assert_error!(
        decode(Kind::Ahead, &[0, 2, 0, 0]) => BadField { field: "the region", found: 512, .. }
    );
    let mut beyond = encode(&ahead(&[(1, 1)])).unwrap();
    beyond[11] = 0xFF;
    assert_error!(
        decode(Kind::Ahead, &beyond) => BadField { field: "a run's first page", .. }
    );
    assert_error!(decode(Kind::Pages, &[]) => MisplacedKind { .. });
    let mismatch = [1, 0, 0, 0, 2, 0, 0, 0, 1, 0, 9, 0, 0, 0, 0, 0, 0, 0];
    assert!(decode(Kind::Mismatch, &mismatch).is_ok());
    let changed = |at: usize, value| {
        let mut bytes = mismatch;
        bytes[at] = value;
        decode(Kind::Mismatch, &bytes)
    };
    assert_error!(changed(0, 0) => BadField { field: "the lane", found: 0, .. });
    assert_error!(changed(4, 0) => BadField { field: "the round", found: 0, .. });
    assert_error!(changed(16, 16) => BadField { field: "the page", .. });
    assert_error!(decode(Kind::Mismatch, &mismatch[..17]) => ShortPayload { .. });
    assert_error!(decode(Kind::Mismatch, &[&mismatch[..], &[0]].concat()) => TrailingBytes { .. });
    let shown = decode(Kind::Abort, b"\x05\x00\x06\x00\x1b[2Jok").unwrap();
    let text = " [2Jok".into();
    let code = AbortCode::Busy;
    assert_eq!(shown, Message::Abort { code, text });
}

#[test]
fn abort_codes_keep_their_numbers() {
    for number in 0..=u16::MAX {
        assert_eq!(AbortCode::from_number(number).number(), number);
    }
    assert_eq!(AbortCode::from_number(13), AbortCode::Timeout);
    assert_eq!(AbortCode::from_number(14), AbortCode::Unknown(14));
}

#[test]
fn sessions_are_written_as_hexadecimal() {
    let session = SessionId([0xAB; 16]);
    assert_eq!(session.to_string(), "ab".repeat(16));
    assert_eq!(session.to_string().parse(), Ok(session));
    for text in [
        "",
        "ab",
        &"ab".repeat(17),
        &"+b".repeat(16),
        &"é".repeat(16),
    ] {
        assert!(text.parse::<SessionId>().is_err(), "{text:?}");
    }
}

#[test]
fn versions_agree_on_the_highest_in_common() {
    let versions = |lowest, highest| Versions { lowest, highest };
    assert_eq!(versions(1, 3).agree(versions(2, 5)), Some(3));
    assert_eq!(versions(1, 1).agree(versions(2, 5)), None);
}

/// A record as it travels, in numbers.
#[derive(Clone, Copy)]
struct Raw {
    encoding: u8,
    reserved: u8,
    count: u32,
    first: u64,
    data_bytes: u32,
    reserved_end: u32,
}

const ONE_PAGE: Raw = Raw {
    encoding: 1,
    reserved: 0,
    count: 1,
    first: 0,
    data_bytes: 4096,
    reserved_end: 0,
};

const ZEROS: Raw = Raw {
    encoding: 0,
    data_bytes: 0,
    ..ONE_PAGE
};

fn table(records: &[Raw]) -> Vec<u8> {
    let mut table = Vec::new();
    for record in records {
        table.extend([0, 0, record.encoding, record.reserved]);
        table.extend(record.count.to_le_bytes());
        table.extend(record.first.to_le_bytes());
        table.extend(record.data_bytes.to_le_bytes());
        table.extend(record.reserved_end.to_le_bytes());
    }
    table
}

/// A frame whose checksums fit.
fn sealed(kind: Kind, sequence: u64, payload: &[u8]) -> Vec<u8> {
    let mut header = header(kind, LANE, u32::try_from(payload.len()).unwrap());
    header.position.sequence = sequence;
    let mut hasher = header.seed();
    hasher.update(payload);
    [&header.to_bytes(hasher.finalize()), payload].concat()
}

fn pages(round: u32, count: u32, table: &[u8], data_bytes: usize) -> Vec<u8> {
    let head = [round.to_le_bytes(), count.to_le_bytes()].concat();
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&head);
    hasher.update(table);
    let crc = hasher.finalize().to_le_bytes();
    [&*head, &crc, table, &vec![0; data_bytes]].concat()
}

/// Reads `frames` to the end of the stream, or to the first error.
fn receive(frames: &[Vec<u8>]) -> Result<(), Error> {
    let wire = frames.concat();
    let mut from = &*wire;
    let mut reader = PageLaneReader::new(LaneId {
        index: LANE,
        generation: Generation(4),
    });
    loop {
        match reader.next(&mut from)? {
            Incoming::End => return Ok(()),
            Incoming::RoundEnd { .. } => {}
            Incoming::Pages(body) => {
                let mut data = vec![0; MAX_RAW_PAGES as usize * PAGE_BYTES];
                body.place(|record, from, mut hasher| {
                    let data = &mut data[..usize::try_from(record.data_bytes()).unwrap()];
                    from.read_exact(data)?;
                    hasher.update(data);
                    Ok::<_, Error>(hasher)
                })?;
            }
        }
    }
}

fn receive_records(records: &[Raw], data_bytes: usize) -> Result<(), Error> {
    let count = u32::try_from(records.len()).unwrap();
    let payload = pages(1, count, &table(records), data_bytes);
    receive(&[sealed(Kind::Pages, 0, &payload)])
}

#[test]
fn page_tables() {
    assert!(receive_records(&[ONE_PAGE, ZEROS], 4096).is_ok());
    let with = |change: fn(&mut Raw)| {
        let mut record = ONE_PAGE;
        change(&mut record);
        receive_records(&[record], 4096)
    };
    assert_error!(with(|r| r.encoding = 2) => BadField { field: "the length of a delta", .. });
    assert_error!(with(|r| r.encoding = 3) => WrongDataLength { needed: 0, found: 4096 });
    assert_error!(with(|r| r.encoding = 4) => UnknownEncoding { found: 4 });
    assert_error!(with(|r| r.reserved = 1) => BadReserved { found: 1, .. });
    assert_error!(with(|r| r.reserved_end = 1) => BadReserved { found: 1, .. });
    let delta = |count, data_bytes| {
        let record = Raw {
            encoding: 2,
            count,
            data_bytes,
            ..ONE_PAGE
        };
        receive_records(&[record], data_bytes as usize)
    };
    delta(1, 8).unwrap();
    delta(1, 2048).unwrap();
    assert_error!(delta(1, 7) => BadField { field: "the length of a delta", found: 7, .. });
    assert_error!(delta(1, 2049) => BadField { found: 2049, .. });
    assert_error!(delta(2, 16) => BadField { field: "the number of pages in a record", .. });
    assert_error!(with(|r| r.count = 0) => BadField { found: 0, .. });
    assert_error!(with(|r| r.count = MAX_RAW_PAGES + 1) => BadField { found: 257, .. });
    assert_error!(with(|r| r.first = PAGE_NUMBER_END) => BadField { found: PAGE_NUMBER_END, .. });
    assert_error!(with(|r| r.first = u64::MAX) => BadField { found: u64::MAX, .. });
    assert_error!(with(|r| r.data_bytes = 4095) => WrongDataLength { needed: 4096, found: 4095 });
    let many_zeros = Raw {
        count: MAX_ZERO_PAGES + 1,
        ..ZEROS
    };
    assert_error!(receive_records(&[many_zeros], 0) => BadField { found: 65_537, .. });
    let shared = |count| {
        let record = Raw {
            encoding: 3,
            count,
            ..ZEROS
        };
        receive_records(&[ONE_PAGE, record], 4096)
    };
    shared(MAX_SHARED_PAGES).unwrap();
    assert_error!(shared(0) => BadField { found: 0, .. });
    assert_error!(shared(MAX_SHARED_PAGES + 1) => BadField { found: 4097, .. });
    let zero_data = Raw {
        data_bytes: 4096,
        ..ZEROS
    };
    assert_error!(receive_records(&[zero_data], 4096) => WrongDataLength { needed: 0, .. });
    assert_error!(
        receive_records(&[ONE_PAGE, ONE_PAGE], 4096)
            => WrongDataLength { needed: 8192, found: 4096 }
    );
    assert_error!(receive_records(&[ZEROS], 1) => WrongDataLength { needed: 0, found: 1 });
    assert_error!(receive_records(&[], 16) => BadField { found: 0, .. });
    let many = u32::try_from(MAX_RECORDS).unwrap() + 1;
    let counted = sealed(Kind::Pages, 0, &pages(1, many, &table(&[ZEROS]), 0));
    assert_error!(receive(&[counted]) => BadField { found: 1025, .. });
    let short = sealed(Kind::Pages, 0, &pages(1, 2, &table(&[ZEROS]), 0));
    assert_error!(receive(&[short]) => ShortPayload { kind: Kind::Pages });
    let mut moved = pages(1, 1, &table(&[ZEROS]), 0);
    moved[20] ^= 1;
    assert_error!(
        receive(&[sealed(Kind::Pages, 0, &moved)]) => Corrupt { kind: Kind::Pages, lane: LANE, sequence: 0 }
    );
}

/// A frame of `pages` raw pages whose data is `data`, packed as told or not.
fn packed(packing: u8, pages: u32, data: &[u8]) -> Vec<u8> {
    let runs = (0..pages.div_ceil(MAX_RAW_PAGES)).map(|run| {
        let count = MAX_RAW_PAGES.min(pages - run * MAX_RAW_PAGES);
        Raw {
            count,
            data_bytes: count * 4096,
            ..ONE_PAGE
        }
    });
    let runs: Vec<_> = runs.collect();
    let count = u32::try_from(runs.len()).unwrap() | u32::from(packing) << 16;
    let payload = self::pages(1, count, &table(&runs), 0);
    sealed(Kind::Pages, 0, &[&*payload, data].concat())
}

#[test]
fn packed_data() {
    let lz4 = |pages: u32| lz4_flex::block::compress(&vec![7; pages as usize * PAGE_BYTES]);
    let zstd = |pages: u32| zstd::bulk::compress(&vec![7; pages as usize * PAGE_BYTES], 1).unwrap();
    for (number, packing, data) in [
        (1, Packing::Lz4, lz4 as fn(u32) -> Vec<u8>),
        (2, Packing::Zstd, zstd),
    ] {
        receive(&[packed(number, 3, &data(3))]).unwrap();
        for wrong in [1, 2, 4, 250] {
            assert_error!(
                receive(&[packed(number, 3, &data(wrong))])
                    => BadPacking { needed: 12_288, .. }
            );
        }
        // What would unpack to gigabytes unpacks to no more than the table has pages for.
        let bomb = match packing {
            Packing::Lz4 => lz4_flex::block::compress(&vec![7; 1 << 24]),
            _ => zstd::bulk::compress(&vec![7; 1 << 28], 1).unwrap(),
        };
        let room = u32::try_from(bomb.len().div_ceil(PAGE_BYTES)).unwrap() + 1;
        assert_error!(
            receive(&[packed(number, room, &bomb)]) => BadPacking { found: None, .. }
        );
        assert_error!(receive(&[packed(number, 1, b"no such thing")]) => BadPacking { .. });
        assert_error!(receive(&[packed(number, 1, &[])]) => WrongDataLength { found: 0, .. });
        // Packed data is shorter than what it is packed from, or it would not be packed.
        assert_error!(
            receive(&[packed(number, 1, &[0; PAGE_BYTES])]) => WrongDataLength { .. }
        );
        assert_error!(
            receive(&[packed(number, MAX_RAW_PAGES + 1, &data(257))]) => WrongDataLength { .. }
        );
    }
    assert_error!(receive(&[packed(3, 1, &[0])]) => UnknownPacking { found: 3 });
    let mut reserved = pages(1, 1, &table(&[ZEROS]), 0);
    reserved[7] = 1;
    assert_error!(
        receive(&[sealed(Kind::Pages, 0, &reserved)]) => BadReserved { found: 1, .. }
    );
}

#[test]
fn rounds() {
    let zeros =
        |sequence, round| sealed(Kind::Pages, sequence, &pages(round, 1, &table(&[ZEROS]), 0));
    let end = |sequence, round: u32, pages: u64| {
        let payload = [&round.to_le_bytes()[..], &pages.to_le_bytes()].concat();
        sealed(Kind::RoundEnd, sequence, &payload)
    };
    assert!(
        receive(&[
            zeros(0, 4),
            zeros(1, 4),
            end(2, 4, 2),
            zeros(3, 5),
            end(4, 5, 1)
        ])
        .is_ok()
    );
    assert_error!(receive(&[zeros(0, 0)]) => BadField { field: "the round", .. });
    assert_error!(receive(&[end(0, 0, 0)]) => BadField { field: "the round", .. });
    assert_error!(
        receive(&[zeros(0, 1), zeros(1, 2)])
            => WrongRound { expected: Round(1), found: Round(2), .. }
    );
    assert_error!(
        receive(&[end(0, 1, 0), zeros(1, 1)])
            => WrongRound { expected: Round(2), found: Round(1), .. }
    );
    assert_error!(
        receive(&[zeros(0, 1), end(1, 1, 2)])
            => WrongPageCount { round: Round(1), told: 2, came: 1, .. }
    );
    assert_error!(
        receive(&[zeros(0, 1), zeros(0, 1)]) => OutOfSequence { lane: LANE, expected: 1, found: 0 }
    );
    let short_end = sealed(Kind::RoundEnd, 0, &[1, 0, 0, 0]);
    assert_error!(receive(&[short_end, vec![0; 8]]) => ShortPayload { kind: Kind::RoundEnd });
}

#[test]
fn full_frames_take_no_more() {
    let run = |count| PageRun {
        region: 0,
        first: 0,
        count,
    };
    let mut frame = PageFrame::new(2);
    assert_error!(frame.push_raw(run(3)) => FrameFull { count: 3 });
    frame.push_raw(run(2)).unwrap();
    assert_eq!(frame.raw_room(), 0);
    assert_error!(frame.push_shared(run(MAX_SHARED_PAGES + 1)) => BadField { .. });
    assert_error!(frame.push_zero(run(0)) => BadField { .. });
    assert_error!(frame.push_zero(run(frame.zero_room() + 1)) => BadField { .. });
    for _ in 1..MAX_RECORDS {
        frame.push_zero(run(frame.zero_room())).unwrap();
    }
    assert_eq!(frame.zero_room(), 0);
    assert_error!(frame.push_zero(run(1)) => FrameFull { count: 1 });
    assert_error!(frame.push_shared(run(1)) => FrameFull { count: 1 });
    frame.begin(Round(1));
    assert_eq!(frame.raw_room(), 2);
}

#[test]
fn a_full_table_keeps_zeros_as_bytes() {
    let run = |first, count| PageRun {
        region: 0,
        first,
        count,
    };
    let mut frame = PageFrame::new(4);
    for page in 2..MAX_RECORDS as u64 {
        frame.push_zero(run(page, 1)).unwrap();
    }
    // Two records are left, for a run of three pieces.
    let bytes = frame.push_raw(run(0, 4)).unwrap();
    bytes.fill(1);
    bytes[PAGE_BYTES..2 * PAGE_BYTES].fill(0);
    let before = frame.pages();
    assert_eq!(frame.elide_zeros(ferry_stream::pages::Zeros::Tell), 0);
    assert_eq!(frame.pages(), before);
    let mut wire = Vec::new();
    let mut writer = ferry_stream::lane::PageLaneWriter::new(LaneId {
        index: LANE,
        generation: Generation(4),
    });
    writer.send(&mut wire, &mut frame).unwrap();
    receive(&[wire]).unwrap();
}

#[test]
fn only_a_page_alone_that_is_much_the_same_is_told_as_a_delta() {
    let run = |first, count| PageRun {
        region: 0,
        first,
        count,
    };
    let (base, mut scratch) = ([1; PAGE_BYTES], DeltaBuffer::new());
    let mut frame = PageFrame::new(8);
    assert!(!frame.tell_as_delta(&base, &mut scratch));
    frame.push_raw(run(0, 2)).unwrap().fill(1);
    assert!(!frame.tell_as_delta(&base, &mut scratch));
    frame.push_raw(run(2, 1)).unwrap().fill(2);
    assert!(!frame.tell_as_delta(&base, &mut scratch));
    frame.push_raw(run(3, 1)).unwrap().fill(1);
    assert!(frame.tell_as_delta(&base, &mut scratch));
    assert!(!frame.tell_as_delta(&base, &mut scratch));
    frame.push_raw(run(4, 1)).unwrap().fill(3);
    assert_eq!(frame.pages(), 5);
    assert_eq!(frame.data().len(), 4 * PAGE_BYTES + 8);
    let mut wire = Vec::new();
    let mut writer = ferry_stream::lane::PageLaneWriter::new(LaneId {
        index: LANE,
        generation: Generation(4),
    });
    writer.send(&mut wire, &mut frame).unwrap();
    receive(&[wire]).unwrap();
}
