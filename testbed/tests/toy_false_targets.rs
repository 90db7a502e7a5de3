//! Targets that are no ferries, or that lie: a source keeps its guest, and says why.

use std::sync::Arc;
use std::time::Duration;

use ferry_engine::Finished;
use ferry_engine::core::layout::PAGE_SIZE;
use ferry_engine::core::message::{GuestLeft, Outcome, Reason};
use ferry_engine::link::{Acceptor as _, Connection, LocalAcceptor, local};
use ferry_engine::message::{AbortCode, Features, Message, Round, Run, Versions, Welcome};
use ferry_engine::vmm::RunState;
use ferry_stream::lane::ControlLane;
use ferry_testbed::toy::{Model, Pair};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::{sleep, timeout};

/// Longer than any test here may take.
const BOUND: Duration = Duration::from_secs(30);

/// How often a false target says that it is there.
const PING: Duration = Duration::from_millis(200);

type Control = ControlLane<Box<dyn Connection>>;

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

/// A source whose target is `play`ed by the test.
async fn facing<F>(play: impl FnOnce(LocalAcceptor) -> F) -> (Pair, Finished)
where
    F: Future<Output = ()> + Send + 'static,
{
    let pair = Pair::new(&Model::default()).unwrap();
    let (connector, acceptor) = local();
    let playing = tokio::spawn(play(acceptor));
    let job = pair.sending(Arc::new(connector)).start().await.unwrap();
    let ended = timeout(BOUND, job.finish()).await.unwrap();
    playing.abort();
    assert!(matches!(ended.outcome, Outcome::Kept { .. }), "{ended:?}");
    assert_eq!(pair.source.state(), RunState::Running);
    assert!(pair.source.is_clean());
    assert_eq!(pair.journals().unwrap(), [""; 0]);
    pair.check_ram(&pair.source);
    (pair, ended)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_is_no_ferry_keeps_the_guest() {
    let pages = PAGE_SIZE;
    let answers: [&[u8]; 4] = [
        b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n",
        b"220 mail.example ESMTP ready and waiting for somebody to speak\r\n",
        &[0; 64],
        b"",
    ];
    for answer in answers {
        let (_, ended) = facing(move |mut acceptor| async move {
            let mut stream = acceptor.accept().await.unwrap();
            let mut heard = vec![0; pages];
            let _hello = stream.read(&mut heard).await.unwrap();
            stream.write_all(answer).await.unwrap();
            if answer.is_empty() {
                return;
            }
            std::future::pending::<()>().await;
        })
        .await;
        let Outcome::Kept { reason, guest } = &ended.outcome else {
            panic!("{ended:?}");
        };
        assert!(matches!(guest, GuestLeft::Untouched), "{ended:?}");
        let text = reason.to_string();
        assert!(
            text.contains("not a ferry") || text.contains("closed"),
            "{text}"
        );
    }
}

/// Welcomes a source and takes its lanes; then says `last`, and waits.
async fn false_target(mut acceptor: LocalAcceptor, welcome: Welcome, last: Message) {
    let mut control: Control = ControlLane::new(acceptor.accept().await.unwrap());
    let hello = next(&mut control).await;
    assert!(matches!(hello, Some(Message::Hello(_))), "{hello:?}");
    control
        .writer
        .send(&Message::Welcome(welcome))
        .await
        .unwrap();
    let mut lanes = Vec::new();
    for _ in 0..welcome.lanes.min(1) {
        let mut lane: Control = ControlLane::new(acceptor.accept().await.unwrap());
        let _hello = next(&mut lane).await;
        lane.writer.send(&Message::Welcome(welcome)).await.unwrap();
        lanes.push(lane);
    }
    if !matches!(last, Message::Ping) {
        control.writer.send(&Message::Prepared).await.unwrap();
    }
    control.writer.send(&last).await.unwrap();
    // It lies and does not fall silent: on a slow machine the source would hear of that first.
    while control.writer.send(&Message::Ping).await.is_ok() {
        sleep(PING).await;
    }
    std::future::pending::<()>().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_lies_keeps_the_guest() {
    let honest = Welcome {
        version: Versions::OURS.highest,
        features: Features::NONE,
        lanes: 1,
    };
    let welcomes = [
        Welcome {
            version: 2,
            ..honest
        },
        Welcome { lanes: 2, ..honest },
        Welcome { lanes: 0, ..honest },
        Welcome {
            features: Features(1),
            ..honest
        },
    ];
    for welcome in welcomes {
        facing(move |acceptor| false_target(acceptor, welcome, Message::Ping)).await;
    }
    let lies = [
        Message::RoundDone {
            round: Round(1),
            pages: 1_000_000,
        },
        Message::RoundDone {
            round: Round(9),
            pages: 0,
        },
        Message::Ready { load_us: u32::MAX },
        Message::Running {
            resume_us: u32::MAX,
        },
        Message::Returned {
            reason: "no".to_owned(),
        },
        Message::Go { run: Run::Run },
        Message::Prepared,
        Message::Abort {
            code: AbortCode::Memory,
            text: "full".to_owned(),
        },
    ];
    for lie in lies {
        let said = lie.clone();
        let (_, ended) = facing(move |acceptor| false_target(acceptor, honest, said)).await;
        let Outcome::Kept { reason, .. } = &ended.outcome else {
            panic!("{ended:?}");
        };
        let named = matches!(
            reason,
            Reason::Protocol { .. } | Reason::Miscounted { .. } | Reason::PeerAborted { .. }
        );
        assert!(named, "{lie:?}: {reason:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_says_nothing_keeps_the_guest() {
    let (_, ended) = facing(|mut acceptor| async move {
        let _silent = acceptor.accept().await.unwrap();
        std::future::pending::<()>().await;
    })
    .await;
    let Outcome::Kept { reason, .. } = &ended.outcome else {
        panic!("{ended:?}");
    };
    assert!(matches!(reason, Reason::NoFerry { .. }), "{reason:?}");
}
