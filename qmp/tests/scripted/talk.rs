//! Commands, replies and events, with a peer that behaves.

use std::time::Duration;

use ferry_qmp::commands::{Cont, QueryStatus, QueryTarget, QueryYank, Stop};
use ferry_qmp::{Client, Error, ErrorClass, EventKind, MigrationStatus, Options};
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;

use crate::peer::{GREETING, STOP, Server, bounded};

const GREETING_NO_OOB: &str = r#"{"QMP": {"version": {"qemu": {"micro": 0, "minor": 12, "major": 2}, "package": ""}, "capabilities": []}}"#;

#[tokio::test]
async fn tells_replies_and_events_apart() {
    let server = Server::play(|mut peer| async move {
        peer.greet().await;
        assert_eq!(peer.hear().await, "{\"execute\":\"stop\",\"id\":1}\n");
        peer.say(STOP).await;
        peer.say(r#"{"return": {}, "id": 1}"#).await;
        peer.say(r#"{"timestamp": {"seconds": 3, "microseconds": 4}, "event": "MIGRATION", "data": {"status": "pre-switchover"}}"#).await;
    });
    let (client, mut events) = server.connect().await.unwrap();
    assert_eq!(client.greeting().version.to_string(), "10.0.2");
    assert_eq!(client.greeting().version.package, "Debian");
    assert!(client.greeting().oob);
    let peer = client.peer().unwrap();
    assert_eq!(peer.pid, i32::try_from(std::process::id()).ok());

    client.execute(Stop).await.unwrap();
    let stop = bounded(events.next()).await.unwrap();
    assert_eq!(stop.kind(), EventKind::Stop);
    assert_eq!(
        (stop.timestamp.seconds, stop.timestamp.microseconds),
        (1, 2)
    );
    let migration = bounded(events.next()).await.unwrap();
    let status = MigrationStatus::PreSwitchover;
    assert_eq!(migration.kind(), EventKind::Migration { status });
    assert!(stop.received_at <= migration.received_at);
    assert!(bounded(events.next()).await.is_none());
    server.played().await;
}

#[tokio::test]
async fn pipelines_and_takes_replies_in_any_order() {
    let server = Server::play(|mut peer| async move {
        peer.greet().await;
        assert_eq!(
            peer.hear().await,
            "{\"execute\":\"query-status\",\"id\":1}\n"
        );
        assert_eq!(
            peer.hear().await,
            "{\"execute\":\"query-target\",\"id\":2}\n"
        );
        assert_eq!(
            peer.hear().await,
            "{\"exec-oob\":\"query-yank\",\"id\":3}\n"
        );
        peer.say(r#"{"return": [], "id": 3}"#).await;
        peer.say(r#"{"return": {"arch": "x86_64"}, "id": 2}"#).await;
        peer.say(r#"{"return": {"status": "dreaming", "running": false}, "id": 1}"#)
            .await;
        peer.hear().await;
    });
    let (client, _events) = server.connect().await.unwrap();
    let status = client.execute(QueryStatus);
    let target = client.execute(&QueryTarget);
    let yank = client.execute_oob(QueryYank);
    let (status, target, yank) = bounded(async { tokio::join!(status, target, yank) }).await;
    assert_eq!(status.unwrap().status.as_str(), "dreaming");
    assert_eq!(target.unwrap().arch, "x86_64");
    assert!(yank.unwrap().is_empty());
    drop(client);
    server.played().await;
}

#[tokio::test]
async fn keeps_the_way_open_for_out_of_band_commands() {
    let server = Server::play(|mut peer| async move {
        peer.greet().await;
        for id in 1..=7 {
            let line = format!("{{\"execute\":\"query-status\",\"id\":{id}}}\n");
            assert_eq!(peer.hear().await, line);
        }
        assert_eq!(
            peer.hear().await,
            "{\"exec-oob\":\"query-yank\",\"id\":8}\n"
        );
        peer.say(r#"{"return": [], "id": 8}"#).await;
        let status = r#""return": {"status": "running", "running": true}"#;
        peer.say(&format!("{{{status}, \"id\": 1}}")).await;
        assert_eq!(
            peer.hear().await,
            "{\"execute\":\"query-status\",\"id\":9}\n"
        );
        for id in (2..=7).chain([9]) {
            peer.say(&format!("{{{status}, \"id\": {id}}}")).await;
        }
    });
    let (client, _events) = server.connect().await.unwrap();
    let all: Vec<_> = (0..8).map(|_| client.execute(QueryStatus)).collect();
    bounded(client.execute_oob(QueryYank)).await.unwrap();
    for status in all {
        assert!(bounded(status).await.unwrap().running);
    }
    server.played().await;
}

#[tokio::test]
async fn what_was_given_up_is_not_sent_later() {
    let (go, gone) = tokio::sync::oneshot::channel();
    let server = Server::play(|mut peer| async move {
        peer.greet().await;
        for _ in 1..=7 {
            peer.hear().await;
        }
        gone.await.unwrap();
        let status = r#""return": {"status": "running", "running": true}"#;
        for id in 1..=7 {
            peer.say(&format!("{{{status}, \"id\": {id}}}")).await;
        }
        assert_eq!(peer.hear().await, "{\"execute\":\"stop\",\"id\":8}\n");
    });
    let (client, _events) = server.connect().await.unwrap();
    let all: Vec<_> = (0..7).map(|_| client.execute(QueryStatus)).collect();
    let given_up = client.execute_within(Cont, Duration::from_millis(20)).await;
    assert!(
        matches!(given_up, Err(Error::TimedOut { .. })),
        "{given_up:?}"
    );
    let stop = client.execute(Stop);
    go.send(()).unwrap();
    for status in all {
        bounded(status).await.unwrap();
    }
    server.played().await;
    let closed = bounded(stop).await;
    assert!(matches!(closed, Err(Error::Closed { .. })), "{closed:?}");
}

#[tokio::test]
async fn an_error_class_is_the_answer_of_one_command_alone() {
    let server = Server::play(|mut peer| async move {
        peer.greet().await;
        peer.hear().await;
        peer.say(r#"{"id": 1, "error": {"class": "CommandNotFound", "desc": "no such thing"}}"#)
            .await;
        assert_eq!(
            peer.hear().await,
            "{\"execute\":\"do it\",\"id\":2,\"arguments\":{\"a\":[1]}}\n"
        );
        peer.say(r#"{"id": 2, "return": null}"#).await;
    });
    let (client, _events) = server.connect().await.unwrap();
    let refused = client.execute_raw("nonsense", json!({})).await.unwrap_err();
    assert_eq!(
        refused.to_string(),
        "nonsense: no such thing (CommandNotFound)"
    );
    let Error::Class { class, .. } = refused else {
        panic!("{refused:?}");
    };
    assert_eq!(class, ErrorClass::CommandNotFound);
    let answer = client
        .execute_raw("do it".to_owned(), json!({"a": [1]}))
        .await;
    assert_eq!(answer.unwrap(), json!(null));
    server.played().await;
}

#[tokio::test]
async fn a_reply_of_another_shape_is_the_error_of_one_command_alone() {
    let server = Server::play(|mut peer| async move {
        peer.greet().await;
        peer.hear().await;
        peer.say(r#"{"id": 1, "return": {"status": 5}}"#).await;
        peer.hear().await;
        peer.say(r#"{"id": 2, "return": {}}"#).await;
    });
    let (client, _events) = server.connect().await.unwrap();
    let answer = client.execute(QueryStatus).await;
    assert!(
        matches!(&answer, Err(Error::Reply { command, .. }) if command == "query-status"),
        "{answer:?}"
    );
    client.execute(Cont).await.unwrap();
    server.played().await;
}

#[tokio::test]
async fn a_late_reply_is_not_taken_for_another() {
    let (go, gone) = tokio::sync::oneshot::channel();
    let server = Server::play(|mut peer| async move {
        peer.greet().await;
        peer.hear().await;
        gone.await.unwrap();
        peer.say(r#"{"id": 1, "return": {}}"#).await;
        peer.hear().await;
        peer.say(r#"{"id": 2, "return": {"status": "paused", "running": false}}"#)
            .await;
    });
    let (client, _events) = server.connect().await.unwrap();
    let after = Duration::from_millis(30);
    let late = client.execute_within(Stop, after).await;
    assert!(
        matches!(&late, Err(Error::TimedOut { command, after: bound }) if command == "stop" && *bound == after),
        "{late:?}"
    );
    go.send(()).unwrap();
    assert!(!bounded(client.execute(QueryStatus)).await.unwrap().running);
    server.played().await;
}

#[tokio::test]
async fn out_of_band_needs_an_offer() {
    let server = Server::play(|mut peer| async move {
        peer.say(GREETING_NO_OOB).await;
        assert_eq!(
            peer.hear().await,
            "{\"execute\":\"qmp_capabilities\",\"id\":0}\n"
        );
        peer.say(r#"{"return": {}, "id": 0}"#).await;
        peer.hear().await;
    });
    let (client, _events) = server.connect().await.unwrap();
    assert!(!client.greeting().oob);
    let refused = client.execute_oob(QueryYank).await;
    assert!(
        matches!(&refused, Err(Error::NoOutOfBand { command }) if command == "query-yank"),
        "{refused:?}"
    );
    drop(client);
    server.played().await;
}

#[tokio::test]
async fn unread_events_are_bounded_and_their_loss_is_told() {
    let server = Server::play(|mut peer| async move {
        peer.greet().await;
        let noise = STOP.replace("STOP", "RTC_CHANGE");
        for _ in 0..4000 {
            peer.say(&noise).await;
        }
        peer.say(STOP).await;
        peer.hear().await;
        peer.say(r#"{"return": {}, "id": 1}"#).await;
        peer.hear().await;
        // More of what must not be lost than is ever kept: the client hangs up in the middle.
        let flood = format!("{STOP}\r\n").repeat(8000);
        let _ = peer.stream.write_all(flood.as_bytes()).await;
    });
    let (client, mut events) = server.connect().await.unwrap();
    bounded(client.execute(Cont)).await.unwrap();
    let dropped = events.dropped();
    assert!(dropped > 0);
    for _ in dropped..4000 {
        assert_eq!(bounded(events.next()).await.unwrap().name, "RTC_CHANGE");
    }
    assert_eq!(bounded(events.next()).await.unwrap().name, "STOP");

    let end = bounded(client.execute(Cont)).await;
    assert!(matches!(end, Err(Error::EventsUnread { .. })), "{end:?}");
    let mut read = 0;
    while let Some(event) = bounded(events.next()).await {
        assert_eq!(event.name, "STOP");
        read += 1;
    }
    assert!(read > 1000, "{read}");
    server.played().await;
}

#[tokio::test]
async fn events_that_nobody_wants_cost_nothing() {
    let server = Server::play(|mut peer| async move {
        peer.greet().await;
        peer.hear().await;
        let flood = format!("{STOP}\r\n").repeat(8000);
        peer.stream.write_all(flood.as_bytes()).await.unwrap();
        peer.say(r#"{"return": {}, "id": 1}"#).await;
    });
    let (client, events) = server.connect().await.unwrap();
    drop(events);
    bounded(client.execute(Cont)).await.unwrap();
    server.played().await;
}

#[tokio::test]
async fn tcp_has_no_peer_credentials() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("tcp:{}", listener.local_addr().unwrap());
    let served = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        let words = format!("{GREETING}\r\n{{\"return\": {{}}, \"id\": 0}}\r\n");
        stream.write_all(words.as_bytes()).await.unwrap();
        stream
    };
    let address = address.parse().unwrap();
    let options = Options::default();
    let (connected, _stream) =
        bounded(async { tokio::join!(Client::connect(&address, &options), served) }).await;
    let (client, _events) = connected.unwrap();
    assert_eq!(client.peer(), None);
    assert_eq!(client.address(), &address);
}
