//! Both ends of every kind of lane, over real sockets.

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use ferry_stream::Error;
use ferry_stream::frame::Generation;
use ferry_stream::lane::{ControlLane, Incoming, PageLaneReader, PageLaneWriter};
use ferry_stream::limits::PAGE_BYTES;
use ferry_stream::link::{Acceptor as _, Connection, Connector as _, Lane, local, pair};
use ferry_stream::message::{LaneId, LaneIndex, Message, Round, Run};
use ferry_stream::pages::{PageFrame, PageRun, Zeros};

const LANE: LaneIndex = LaneIndex(1);

fn run(first: u64, count: u32) -> PageRun {
    PageRun {
        region: 0,
        first,
        count,
    }
}

fn fill(page: u64) -> u8 {
    u8::try_from(page % 250 + 1).unwrap()
}

/// Guest RAM of one region, as a receiver of pages has it.
struct Ram(Vec<u8>);

impl Ram {
    fn receive(
        &mut self,
        reader: &mut PageLaneReader,
        from: &mut dyn Lane,
    ) -> Result<Option<(Round, u64)>, Error> {
        loop {
            match reader.next(&mut *from)? {
                Incoming::Pages(body) => {
                    body.place(|record, data, mut hasher| {
                        let start = usize::try_from(record.run.first).unwrap() * PAGE_BYTES;
                        let range = start..start + record.run.count as usize * PAGE_BYTES;
                        if record.data_bytes() == 0 {
                            self.0[range].fill(0);
                            return Ok::<_, Error>(hasher);
                        }
                        data.read_exact(&mut self.0[range.clone()])?;
                        hasher.update(&self.0[range]);
                        Ok(hasher)
                    })?;
                }
                Incoming::RoundEnd { round, pages } => return Ok(Some((round, pages))),
                Incoming::End => return Ok(None),
            }
        }
    }
}

async fn greet(connection: Box<dyn Connection>, say: Message, hear: Message) -> Box<dyn Lane> {
    let mut lane = ControlLane::new(connection);
    lane.writer.send(&say).await.unwrap();
    assert_eq!(lane.reader.next().await.unwrap(), Some(hear));
    lane.into_inner().unwrap().into_lane().unwrap()
}

async fn lanes() -> (Box<dyn Lane>, Box<dyn Lane>) {
    let (one, other) = pair().unwrap();
    tokio::join!(
        greet(one, Message::Ping, Message::Prepared),
        greet(other, Message::Prepared, Message::Ping),
    )
}

#[tokio::test]
async fn moves_pages_round_by_round() {
    let (mut source, mut target) = lanes().await;
    let sender = thread::spawn(move || {
        let mut writer = PageLaneWriter::new(LaneId {
            index: LANE,
            generation: Generation(3),
        });
        let mut frame = PageFrame::new(16);
        for round in [Round(1), Round(2)] {
            frame.begin(round);
            for first in [0, 5, 9] {
                let bytes = frame.push_raw(run(first, 3)).unwrap();
                for (page, bytes) in (first..).zip(bytes.chunks_exact_mut(PAGE_BYTES)) {
                    bytes.fill(if page == 10 { 0 } else { fill(page) });
                }
                let zeros = frame.elide_zeros(Zeros::Tell);
                assert_eq!(zeros, u64::from(first == 9));
            }
            let told = frame.wire_bytes();
            assert_eq!(writer.send(&mut *source, &mut frame).unwrap(), told);
            writer.end_round(&mut *source, round).unwrap();
        }
    });
    let mut ram = Ram(vec![0xAA; 16 * PAGE_BYTES]);
    let mut reader = PageLaneReader::new(LaneId {
        index: LANE,
        generation: Generation(3),
    });
    for round in [Round(1), Round(2)] {
        let end = ram.receive(&mut reader, &mut *target).unwrap();
        assert_eq!(end, Some((round, 9)));
    }
    assert_eq!(ram.receive(&mut reader, &mut *target).unwrap(), None);
    sender.join().unwrap();
    for (page, bytes) in (0..).zip(ram.0.chunks_exact(PAGE_BYTES)) {
        let expected = match page {
            10 => 0,
            0..=2 | 5..=7 | 9..=11 => fill(page),
            _ => 0xAA,
        };
        assert!(bytes.iter().all(|byte| *byte == expected), "page {page}");
    }
}

#[tokio::test]
async fn a_closer_frees_a_blocked_reader() {
    let (_source, mut target) = lanes().await;
    let closer = target.closer().unwrap();
    let (ended, wait) = mpsc::channel();
    let reader = thread::spawn(move || {
        let mut reader = PageLaneReader::new(LaneId::first(LANE));
        let next = reader.next(&mut *target);
        ended.send(matches!(next, Ok(Incoming::End))).unwrap();
    });
    closer.close().unwrap();
    assert_eq!(wait.recv_timeout(Duration::from_secs(10)), Ok(true));
    closer.close().unwrap();
    reader.join().unwrap();
}

#[tokio::test]
async fn no_frame_follows_one_that_was_not_placed() {
    let (mut source, mut target) = lanes().await;
    let mut writer = PageLaneWriter::new(LaneId::first(LANE));
    let mut frame = PageFrame::new(1);
    for first in 0..2 {
        frame.begin(Round(1));
        frame.push_raw(run(first, 1)).unwrap().fill(1);
        writer.send(&mut *source, &mut frame).unwrap();
    }
    let mut reader = PageLaneReader::new(LaneId::first(LANE));
    let _unplaced = reader.next(&mut *target).unwrap();
    let next = reader.next(&mut *target);
    assert!(matches!(next, Err(Error::Broken { lane: LANE })));
}

#[tokio::test]
async fn a_record_must_be_read_whole() {
    let (mut source, mut target) = lanes().await;
    let mut writer = PageLaneWriter::new(LaneId::first(LANE));
    let mut frame = PageFrame::new(1);
    frame.push_raw(run(0, 1)).unwrap().fill(1);
    writer.send(&mut *source, &mut frame).unwrap();
    let mut reader = PageLaneReader::new(LaneId::first(LANE));
    let Incoming::Pages(body) = reader.next(&mut *target).unwrap() else {
        panic!("pages were sent");
    };
    let placed = body.place(|_, data, hasher| {
        data.read_exact(&mut [0; 96])?;
        Ok::<_, Error>(hasher)
    });
    assert!(matches!(placed, Err(Error::Unread { left: 4000 })));
}

#[tokio::test]
async fn a_lost_link_shows_whatever_the_receiver_makes_of_it() {
    #[derive(Debug)]
    enum Failed {
        Lane(Error),
        Ram,
    }
    impl From<Error> for Failed {
        fn from(error: Error) -> Self {
            Self::Lane(error)
        }
    }
    let mut wire = Vec::new();
    let mut writer = PageLaneWriter::new(LaneId::first(LANE));
    let mut frame = PageFrame::new(2);
    frame.push_raw(run(0, 2)).unwrap().fill(1);
    writer.send(&mut wire, &mut frame).unwrap();
    let mut cut = &wire[..wire.len() - 100];
    let mut reader = PageLaneReader::new(LaneId::first(LANE));
    let Incoming::Pages(body) = reader.next(&mut cut).unwrap() else {
        panic!("pages were sent");
    };
    let placed = body.place(|_, data, hasher| {
        let mut into = [0; 2 * PAGE_BYTES];
        data.read_exact(&mut into).map_err(|_| Failed::Ram)?;
        Ok(hasher)
    });
    let missing = match placed {
        Err(Failed::Lane(Error::Truncated { missing })) => missing,
        other => panic!("{other:?}"),
    };
    assert_eq!(missing, 100);
}

#[tokio::test]
async fn messages_pass_both_ways_and_the_end_is_clean() {
    let (connector, mut acceptor) = local();
    let (source, target) = tokio::join!(connector.connect(), acceptor.accept());
    let mut source = ControlLane::new(source.unwrap());
    let mut target = ControlLane::new(target.unwrap());
    let go = Message::Go { run: Run::Run };
    source.writer.send(&go).await.unwrap();
    source.writer.send(&Message::Ping).await.unwrap();
    assert_eq!(target.reader.next().await.unwrap(), Some(go));
    assert_eq!(target.reader.next().await.unwrap(), Some(Message::Ping));
    target.writer.send(&Message::Finished).await.unwrap();
    target.writer.shutdown().await.unwrap();
    assert_eq!(source.reader.next().await.unwrap(), Some(Message::Finished));
    assert_eq!(source.reader.next().await.unwrap(), None);
    let after = target.writer.send(&Message::Ping).await;
    assert!(matches!(after, Err(Error::Broken { .. })));
}

#[tokio::test]
async fn a_reader_that_is_dropped_at_an_await_loses_nothing() {
    let (ours, theirs) = tokio::io::duplex(7);
    let mut reader = ferry_stream::lane::ControlReader::new(ours);
    let mut writer = ferry_stream::lane::ControlWriter::new(theirs);
    let sent = Message::Abort {
        code: ferry_stream::message::AbortCode::Cancelled,
        text: "x".repeat(200),
    };
    let sending = async {
        for _ in 0..5 {
            writer.send(&sent).await.unwrap();
        }
    };
    let reading = async {
        for _ in 0..5 {
            let message = loop {
                // The other branch wins whenever the reader has to wait.
                tokio::select! {
                    biased;
                    message = reader.next() => break message.unwrap(),
                    () = tokio::task::yield_now() => {}
                }
            };
            assert_eq!(message.as_ref(), Some(&sent));
        }
    };
    tokio::join!(sending, reading);
}

#[tokio::test]
async fn a_send_that_was_dropped_breaks_the_lane() {
    let (ours, _theirs) = tokio::io::duplex(7);
    let mut writer = ferry_stream::lane::ControlWriter::new(ours);
    tokio::select! {
        biased;
        sent = writer.send(&Message::Ping) => panic!("32 bytes do not fit in 7: {sent:?}"),
        () = tokio::task::yield_now() => {}
    }
    let next = writer.send(&Message::Ping).await;
    assert!(matches!(next, Err(Error::Broken { .. })));
}

#[tokio::test]
async fn a_peer_that_speaks_before_its_turn_gets_no_lane() {
    let (one, other) = pair().unwrap();
    let mut one = ControlLane::new(one);
    let mut other = ControlLane::new(other);
    one.writer.send(&Message::Ping).await.unwrap();
    one.writer.send(&Message::Ping).await.unwrap();
    assert_eq!(other.reader.next().await.unwrap(), Some(Message::Ping));
    assert!(matches!(other.into_inner(), Err(Error::Broken { .. })));
}
