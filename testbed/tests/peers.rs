//! Peers that are no ferries, or hostile ones: what they can do to a target and to a source.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use bytes::Bytes;
use ferry_engine::core::message::{GuestLeft, Outcome, Phase, Reason};
use ferry_engine::core::outcome::in_full;
use ferry_engine::link::Connection;
use ferry_engine::message::{
    AbortCode, Features, Hello, LaneId, LaneIndex, Message, Mode, Offer, Purpose, RegionInfo,
    Round, Run, SessionId, Versions, Welcome,
};
use ferry_engine::{Bandwidth, Finished};
use ferry_stream::lane::{ControlLane, PageLaneWriter};
use ferry_stream::link::Lane;
use ferry_stream::pages::{PageFrame, PageRun};
use ferry_testbed::toy::{Call, Ended, Fault, Model, Pair};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Longer than any test here may take.
const BOUND: Duration = Duration::from_secs(30);

/// More strangers than a target greets at one time.
const CROWD: usize = 60;

type Outcomes = Result<(), Box<dyn std::error::Error>>;

type Control = ControlLane<Box<dyn Connection>>;

const SESSION: SessionId = SessionId([7; 16]);

async fn dial(address: SocketAddr) -> Control {
    let stream = TcpStream::connect(address).await.unwrap();
    ControlLane::new(Box::new(stream))
}

async fn next(lane: &mut Control) -> Option<Message> {
    loop {
        let message = timeout(BOUND, lane.reader.next())
            .await
            .expect("a bounded wait");
        match message {
            Ok(Some(Message::Ping)) => {}
            message => return message.unwrap_or(None),
        }
    }
}

fn hello(purpose: Purpose, session: SessionId) -> Hello {
    Hello {
        versions: Versions::OURS,
        features: Features::NONE,
        session,
        purpose,
        offer: None,
    }
}

/// What an honest source of this guest says first.
fn offer(pair: &Pair) -> Hello {
    let vm = pair.target.vm();
    let regions = vm.ram.layout().iter().map(|(_, region)| RegionInfo {
        name: region.name.clone(),
        bytes: region.bytes,
        backing_page_bytes: region.backing_page_bytes,
    });
    Hello {
        offer: Some(Offer {
            arch: "toy64".to_owned(),
            machine: "toy-1.0".to_owned(),
            vmm: "toy 1.0".to_owned(),
            regions: regions.collect(),
            lanes: 1,
            mode: Mode::Live,
        }),
        ..hello(Purpose::Migrate, SESSION)
    }
}

/// An honest move, after whatever came before: the target is none the worse.
async fn still_moves(pair: &Pair, address: SocketAddr, target: ferry_engine::TargetJob) {
    let job = pair.sending_to(address).start().await.unwrap();
    let both = async { tokio::join!(job.finish(), target.finish()) };
    let (source, target) = timeout(BOUND, both).await.unwrap();
    let ended = Ended { source, target };
    assert!(matches!(ended.source.outcome, Outcome::Moved), "{ended:?}");
    pair.check(&ended);
}

/// Says `bytes` to the target and reads until it closes.
async fn shout(address: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    let mut heard = Vec::new();
    // It may close with some of ours unread.
    let closed = timeout(BOUND, stream.read_to_end(&mut heard)).await;
    drop(closed.expect("a stranger is not kept"));
    heard
}

/// The first frame of a connection, with one thing wrong.
fn spoilt_header(spoil: impl FnOnce(&mut [u8; 32])) -> Vec<u8> {
    let mut header = [0; 32];
    header[..4].copy_from_slice(&ferry_stream::frame::MAGIC);
    header[4] = 1;
    header[6] = 1;
    spoil(&mut header);
    header.to_vec()
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_do_a_target_no_harm() -> Outcomes {
    let noise: Vec<u8> = (0..5000_u32)
        .map(|at| ((at * at) >> 3).to_le_bytes()[0])
        .collect();
    let strangers = [
        b"GET / HTTP/1.1\r\nHost: ferry\r\n\r\n".repeat(3),
        noise,
        spoilt_header(|header| header[4] = 9),
        spoilt_header(|header| header[6] = 200),
        spoilt_header(|header| header[20..24].fill(0xff)),
        spoilt_header(|header| header[7] = 1),
        // The header of a ping, as the first frame: with a checksum that does not fit.
        spoilt_header(|header| header[6] = 12),
    ];
    let pair = Pair::new(&Model::default())?;
    let (target, address) = pair.listening().await?;
    let target = target.start().await?;
    for bytes in &strangers {
        let heard = shout(address, bytes).await;
        // Whoever speaks something like our language is told why.
        assert!(heard.is_empty() || heard.starts_with(&ferry_stream::frame::MAGIC));
    }
    drop(TcpStream::connect(address).await?);
    still_moves(&pair, address, target).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn who_begins_with_anything_but_hello_is_dropped() -> Outcomes {
    let pair = Pair::new(&Model::default())?;
    let (target, address) = pair.listening().await?;
    let target = target.start().await?;
    for message in [
        Message::Ping,
        Message::Go { run: Run::Run },
        Message::Inquire,
    ] {
        let mut lane = dial(address).await;
        lane.writer.send(&message).await?;
        assert_eq!(next(&mut lane).await, None, "{message:?}");
    }
    // A session that is not at work here, yet.
    for purpose in [Purpose::Lane(LaneId::first(LaneIndex(1))), Purpose::Inquire] {
        let mut lane = dial(address).await;
        lane.writer
            .send(&Message::Hello(hello(purpose, SESSION)))
            .await?;
        let answer = next(&mut lane).await;
        let refused = matches!(
            answer,
            Some(Message::Abort {
                code: AbortCode::Session,
                ..
            })
        );
        assert!(refused, "{answer:?}");
    }
    still_moves(&pair, address, target).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_crowd_does_not_keep_a_source_out() -> Outcomes {
    let pair = Pair::new(&Model::default())?;
    let (target, address) = pair.listening().await?;
    let target = target.start().await?;
    let mut crowd = Vec::new();
    for _ in 0..CROWD {
        crowd.push(TcpStream::connect(address).await?);
    }
    let began = Instant::now();
    still_moves(&pair, address, target).await;
    // A greeting may take 10 s; nobody waits for those of strangers.
    assert!(
        began.elapsed() < Duration::from_secs(8),
        "{:?}",
        began.elapsed()
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_source_is_told_to_wait_and_a_wrong_lane_is_refused() -> Outcomes {
    let pair = Pair::new(&Model::default())?;
    let (target, address) = pair.listening().await?;
    let target = target.start().await?;
    let mut phase = target.phase();
    let slow = Bandwidth::BytesPerSecond(std::num::NonZeroU64::new(1 << 20).unwrap());
    let job = pair
        .sending_to(address)
        .with_bandwidth(slow)
        .start()
        .await?;
    timeout(BOUND, phase.wait_for(|now| *now == Phase::Receiving)).await??;
    let mut second = dial(address).await;
    second.writer.send(&Message::Hello(offer(&pair))).await?;
    let answer = next(&mut second).await;
    let busy = matches!(
        answer,
        Some(Message::Abort {
            code: AbortCode::Busy,
            ..
        })
    );
    assert!(busy, "{answer:?}");
    let mut lane = dial(address).await;
    lane.writer
        .send(&Message::Hello(hello(
            Purpose::Lane(LaneId::first(LaneIndex(1))),
            SESSION,
        )))
        .await?;
    let answer = next(&mut lane).await;
    let refused = matches!(
        answer,
        Some(Message::Abort {
            code: AbortCode::Session,
            ..
        })
    );
    assert!(refused, "{answer:?}");
    let both = async { tokio::join!(job.finish(), target.finish()) };
    let (source, target) = timeout(BOUND, both).await?;
    pair.check(&Ended { source, target });
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_of_another_version_or_guest_is_told_so() -> Outcomes {
    let honest = offer(&Pair::new(&Model::default())?);
    let other_version = Hello {
        versions: Versions {
            lowest: 7,
            highest: 9,
        },
        ..honest.clone()
    };
    let other_guest = |change: fn(&mut Offer)| {
        let mut hello = honest.clone();
        hello.offer.as_mut().map(change);
        hello
    };
    let spoilt = [
        (other_version, AbortCode::Version),
        (
            other_guest(|offer| offer.machine = "toy-9".into()),
            AbortCode::Machine,
        ),
        (
            other_guest(|offer| offer.arch = "toy32".into()),
            AbortCode::Machine,
        ),
        (
            other_guest(|offer| offer.regions[0].bytes *= 2),
            AbortCode::Layout,
        ),
        (
            other_guest(|offer| offer.regions.reverse()),
            AbortCode::Protocol,
        ),
    ];
    for (hello, code) in spoilt {
        let pair = Pair::new(&Model::default())?;
        let (target, address) = pair.listening().await?;
        let target = target.start().await?;
        let mut lane = dial(address).await;
        lane.writer.send(&Message::Hello(hello)).await?;
        let answer = next(&mut lane).await;
        let named = matches!(answer, Some(Message::Abort { code: found, .. }) if found == code);
        assert!(named, "{code:?}: {answer:?}");
        let ended = timeout(BOUND, target.finish()).await?;
        let untouched = matches!(
            ended.outcome,
            Outcome::Kept {
                guest: GuestLeft::Untouched,
                ..
            }
        );
        assert!(untouched, "{ended:?}");
        assert!(!pair.target.has_quit());
    }
    Ok(())
}

/// A source that says what a test wants, up to where its pages are awaited.
struct Impostor {
    control: Control,
    lane: Box<dyn Lane>,
    writer: PageLaneWriter,
}

impl Impostor {
    async fn greeted(pair: &Pair, address: SocketAddr) -> Self {
        let mut control = dial(address).await;
        control
            .writer
            .send(&Message::Hello(offer(pair)))
            .await
            .unwrap();
        let welcome = next(&mut control).await;
        assert!(matches!(welcome, Some(Message::Welcome(_))), "{welcome:?}");
        let mut lane = dial(address).await;
        let first = LaneIndex(1);
        let hello = hello(Purpose::Lane(LaneId::first(first)), SESSION);
        lane.writer.send(&Message::Hello(hello)).await.unwrap();
        let welcome = next(&mut lane).await;
        assert!(matches!(welcome, Some(Message::Welcome(_))), "{welcome:?}");
        assert_eq!(next(&mut control).await, Some(Message::Prepared));
        Self {
            control,
            lane: lane.into_inner().unwrap().into_lane().unwrap(),
            writer: PageLaneWriter::new(LaneId::first(first)),
        }
    }

    fn send_page(
        &mut self,
        round: u32,
        region: u16,
        first: u64,
    ) -> Result<u64, ferry_stream::Error> {
        let mut frame = PageFrame::new(1);
        frame.begin(Round(round));
        let run = PageRun {
            region,
            first,
            count: 1,
        };
        frame.push_raw(run)?.fill(0x5a);
        self.writer.send(&mut *self.lane, &mut frame)
    }

    /// What the target says until it gives up.
    async fn refusal(&mut self) -> (AbortCode, String) {
        loop {
            match next(&mut self.control).await {
                Some(Message::Abort { code, text }) => return (code, text),
                Some(_) => {}
                None => panic!("the target left without a word"),
            }
        }
    }
}

async fn refused(pair: &Pair, target: ferry_engine::TargetJob) -> Finished {
    let ended = timeout(BOUND, target.finish()).await.unwrap();
    assert!(
        matches!(
            ended.outcome,
            Outcome::Kept {
                guest: GuestLeft::Ended,
                ..
            }
        ),
        "{ended:?}"
    );
    assert!(pair.target.has_quit());
    assert_eq!(pair.target.faults().count(Call::Resume), 0);
    ended
}

/// Strangers that were turned away are forgotten: the source's own question is heard.
#[tokio::test(flavor = "multi_thread")]
async fn who_was_turned_away_keeps_nobody_from_asking() -> Outcomes {
    let pair = Pair::new(&Model::default())?;
    let (target, address) = pair.listening().await?;
    let target = target.start().await?;
    let source = Impostor::greeted(&pair, address).await;
    for _ in 0..CROWD {
        let mut second = dial(address).await;
        second.writer.send(&Message::Hello(offer(&pair))).await?;
        let answer = next(&mut second).await;
        assert!(matches!(answer, Some(Message::Abort { .. })), "{answer:?}");
        assert_eq!(next(&mut second).await, None);
    }
    let mut asks = dial(address).await;
    let hello = hello(Purpose::Inquire, SESSION);
    asks.writer.send(&Message::Hello(hello)).await?;
    let answer = next(&mut asks).await;
    assert!(matches!(answer, Some(Message::Welcome(_))), "{answer:?}");
    drop(source);
    refused(&pair, target).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_outside_ram_end_the_migration() -> Outcomes {
    let pages = Model::default().shapes[0].pages;
    for (region, first) in [(0, pages), (0, (1 << 52) - 1), (2, 0), (u16::MAX, 0)] {
        let pair = Pair::new(&Model::default())?;
        let (target, address) = pair.listening().await?;
        let target = target.start().await?;
        let mut source = Impostor::greeted(&pair, address).await;
        source.send_page(1, region, first)?;
        let (_, text) = source.refusal().await;
        assert!(text.contains("moving pages failed"), "{text}");
        let ended = refused(&pair, target).await;
        assert!(
            matches!(
                &ended.outcome,
                Outcome::Kept { reason: Reason::Failed(failure), .. }
                    if in_full(failure).contains("page lane 1: ") && in_full(failure).contains("outside guest RAM")
            ),
            "{ended:?}"
        );
        assert_eq!(
            pair.target.faults().count(Call::Receive),
            0,
            "nothing was written"
        );
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_must_not_come_ends_the_migration() -> Outcomes {
    let wrong = [
        Message::Go { run: Run::Run },
        Message::Finished,
        Message::Running { resume_us: 0 },
        Message::Welcome(Welcome {
            version: Versions::OURS.highest,
            features: Features::NONE,
            lanes: 1,
        }),
        Message::Hello(hello(Purpose::Inquire, SESSION)),
        Message::State {
            offset: 5,
            bytes: Bytes::from_static(b"gap"),
        },
    ];
    for message in wrong {
        let pair = Pair::new(&Model::default())?;
        let (target, address) = pair.listening().await?;
        let target = target.start().await?;
        let mut source = Impostor::greeted(&pair, address).await;
        source.control.writer.send(&message).await?;
        let (_, text) = source.refusal().await;
        let is_named = text.contains(message.name()) || text.contains("device state at 5");
        assert!(is_named, "{message:?}: {text}");
        refused(&pair, target).await;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn no_page_is_placed_after_the_last_round() -> Outcomes {
    let pair = Pair::new(&Model::default())?;
    let hang = Fault::Hang(Duration::from_secs(2));
    pair.target.faults().plan(Call::Load, 1, hang);
    let (target, address) = pair.listening().await?;
    let target = target.start().await?;
    let phase = target.phase();
    let mut source = Impostor::greeted(&pair, address).await;
    source.send_page(1, 0, 3)?;
    source.writer.end_round(&mut *source.lane, Round(1))?;
    let complete = Message::Complete {
        round: Round(1),
        pages: 1,
        state_bytes: 0,
        state_crc: 0,
    };
    source.control.writer.send(&complete).await?;
    // The target ends the lane before it lets the load have what was held back.
    let end = tokio::task::block_in_place(|| source.lane.read(&mut [0]));
    assert!(!matches!(end, Ok(1)), "nothing is said on a page lane");
    assert_eq!(*phase.borrow(), Phase::Loading);
    // Whether the sends still find somebody to take them does not matter.
    for page in 0..100 {
        if source.send_page(2, 0, page).is_err() {
            break;
        }
    }
    refused(&pair, target).await;
    assert_eq!(
        pair.target.faults().count(Call::Receive),
        1,
        "the page of round 1"
    );
    Ok(())
}
