//! Links between hosts.
#![cfg(feature = "tcp")]

use std::io;
use std::thread;
use std::time::Duration;

use ferry_stream::lane::{ControlLane, Incoming, PageLaneReader, PageLaneWriter};
use ferry_stream::link::{
    Acceptor as _, Connection, Connector as _, Lane, TcpAcceptor, TcpConnector,
};
use ferry_stream::message::{LaneId, LaneIndex, Message, Round};

const LIMIT: Duration = Duration::from_secs(10);

async fn greet(connection: Box<dyn Connection>, say: Message, hear: Message) -> Box<dyn Lane> {
    let mut lane = ControlLane::new(connection);
    lane.writer.send(&say).await.unwrap();
    assert_eq!(lane.reader.next().await.unwrap(), Some(hear));
    lane.into_inner().unwrap().into_lane().unwrap()
}

#[tokio::test]
async fn links_become_lanes() {
    let mut acceptor = TcpAcceptor::bind("127.0.0.1:0").await.unwrap();
    let address = acceptor.local_addr().unwrap().to_string();
    let connector = TcpConnector::new(&*address, LIMIT);
    let (source, target) = tokio::join!(connector.connect(), acceptor.accept());
    let (source, target) = (source.unwrap(), target.unwrap());
    assert_eq!(source.peer(), address);
    let (mut source, mut target) = tokio::join!(
        greet(source, Message::Ping, Message::Prepared),
        greet(target, Message::Prepared, Message::Ping),
    );
    let sender = thread::spawn(move || {
        let mut writer = PageLaneWriter::new(LaneId::first(LaneIndex(1)));
        writer.end_round(&mut *source, Round(1)).unwrap();
        source.closer().unwrap().close().unwrap();
    });
    let mut reader = PageLaneReader::new(LaneId::first(LaneIndex(1)));
    let end = reader.next(&mut *target).unwrap();
    assert!(matches!(
        end,
        Incoming::RoundEnd {
            round: Round(1),
            pages: 0
        }
    ));
    assert!(matches!(reader.next(&mut *target).unwrap(), Incoming::End));
    sender.join().unwrap();
}

#[tokio::test]
async fn a_refused_connect_is_an_error() {
    let acceptor = TcpAcceptor::bind("127.0.0.1:0").await.unwrap();
    let address = acceptor.local_addr().unwrap().to_string();
    drop(acceptor);
    let error = TcpConnector::new(address, LIMIT)
        .connect()
        .await
        .unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
}
