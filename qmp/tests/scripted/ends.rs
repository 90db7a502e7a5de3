//! Every way in which a peer can end, or spoil, a connection.

use std::net::Shutdown;
use std::time::Duration;

use ferry_qmp::commands::{QueryStatus, Quit};
use ferry_qmp::{Address, Client, Error, Options};
use tokio::io::{AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use crate::peer::{GREETING, STOP, Script, Server, bounded};

fn short(greeting_ms: u64) -> Options {
    Options {
        greeting_timeout: Duration::from_millis(greeting_ms),
        ..Options::default()
    }
}

#[tokio::test]
async fn last_words_are_heard_though_nothing_can_be_said() {
    let (go, gone) = tokio::sync::oneshot::channel();
    let server = Server::play(|mut peer| async move {
        peer.greet().await;
        let stream = peer.stream.into_inner().into_std().unwrap();
        // From here on, whatever the client writes is a broken pipe.
        stream.shutdown(Shutdown::Read).unwrap();
        gone.await.unwrap();
        let mut stream = UnixStream::from_std(stream).unwrap();
        let last_words = format!("{STOP}\r\n");
        stream.write_all(last_words.as_bytes()).await.unwrap();
    });
    let (client, mut events) = server.connect().await.unwrap();
    // Answered by nobody, and no reason to hang up.
    let unheard = client
        .execute_within(QueryStatus, Duration::from_millis(50))
        .await;
    assert!(
        matches!(unheard, Err(Error::TimedOut { .. })),
        "{unheard:?}"
    );
    go.send(()).unwrap();
    assert_eq!(bounded(events.next()).await.unwrap().name, "STOP");
    assert!(bounded(events.next()).await.is_none());
    server.played().await;
}

/// What the connection ends with when `line` comes while a command is in flight.
async fn end_by(line: &'static str) -> Error {
    let server = Server::play(move |mut peer| async move {
        peer.greet().await;
        peer.hear().await;
        peer.say(line).await;
        peer.hear().await;
    });
    let options = Options {
        max_line: 1024,
        ..Options::default()
    };
    let (client, mut events) = server.connect_with(&options).await.unwrap();
    let error = bounded(client.execute(QueryStatus)).await.unwrap_err();
    assert!(bounded(events.next()).await.is_none());
    // The connection is closed though the client lives: the peer's last `hear` ended.
    server.played().await;
    error
}

#[tokio::test]
async fn a_close_is_told_to_everyone() {
    let server = Server::play(|mut peer| async move {
        peer.greet().await;
        peer.hear().await;
        peer.hear().await;
        peer.say(r#"{"id": 1, "return": {}}"#).await;
    });
    let (client, mut events) = server.connect().await.unwrap();
    let quit = client.execute(Quit);
    let status = client.execute(QueryStatus);
    bounded(quit).await.unwrap();
    let closed = bounded(status).await;
    assert!(
        matches!(&closed, Err(Error::Closed { in_flight }) if in_flight[..] == ["query-status"]),
        "{closed:?}"
    );
    assert!(bounded(events.next()).await.is_none());
    assert!(matches!(client.ended(), Some(Error::Closed { .. })));
    let after = bounded(client.execute(QueryStatus)).await;
    assert!(matches!(after, Err(Error::Closed { .. })), "{after:?}");
    server.played().await;
}

#[tokio::test]
async fn garbage_ends_the_connection() {
    for line in [
        "hello",
        "{}",
        "[]",
        "{\"return\": {}, \"id\": \"1\"}",
        "{\"return\": {}, \"error\": {\"class\": \"a\", \"desc\": \"b\"}, \"id\": 1}",
        "{\"event\": \"STOP\"}",
        GREETING,
    ] {
        let error = end_by(line).await;
        assert!(matches!(error, Error::Garbage { .. }), "{line}: {error:?}");
    }
}

#[tokio::test]
async fn a_reply_that_nobody_asked_for_ends_the_connection() {
    let error = end_by(r#"{"return": {}, "id": 77}"#).await;
    assert!(
        matches!(error, Error::StrayReply { id: Some(77), .. }),
        "{error:?}"
    );
    let error = end_by(r#"{"error": {"class": "GenericError", "desc": "JSON parse error"}}"#).await;
    assert!(
        matches!(&error, Error::StrayReply { id: None, excerpt } if excerpt == "JSON parse error"),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_line_that_is_too_long_ends_the_connection() {
    let error = end_by(Box::leak("x".repeat(1025).into_boxed_str())).await;
    assert!(
        matches!(error, Error::LineTooLong { limit: 1024 }),
        "{error:?}"
    );
}

#[tokio::test]
async fn silence_is_told_from_refusal() {
    let server = Server::play(|mut peer| async move {
        peer.hear().await;
    });
    let silent = server.connect_with(&short(50)).await.unwrap_err();
    assert!(
        silent
            .to_string()
            .contains("another client may hold the socket"),
        "{silent}"
    );
    assert!(matches!(silent, Error::NoGreeting { .. }));
    server.played().await;

    let server = Server::play(|mut peer| async move {
        peer.say(GREETING).await;
        peer.hear().await;
        assert_eq!(peer.hear().await, "");
    });
    let half = server.connect_with(&short(50)).await.unwrap_err();
    assert!(
        matches!(&half, Error::TimedOut { command, .. } if command == "qmp_capabilities"),
        "{half:?}"
    );
    server.played().await;

    let nowhere = Address::Unix("/nonexistent/qmp".into());
    let refused = Client::connect(&nowhere, &Options::default()).await;
    assert!(
        matches!(&refused, Err(Error::Connect { source, .. }) if source.kind() == std::io::ErrorKind::NotFound),
        "{refused:?}"
    );
}

#[tokio::test]
async fn another_protocol_is_told_by_its_first_words() {
    for banner in ["SSH-2.0-OpenSSH_9.2", "{\"return\": {}}", STOP, "{"] {
        let server = Server::play(move |mut peer| async move {
            peer.say(banner).await;
            peer.hear().await;
        });
        let error = server.connect().await.unwrap_err();
        assert!(
            matches!(&error, Error::NotQmp { excerpt } if excerpt == banner),
            "{error:?}"
        );
        server.played().await;
    }
    let server = Server::play(|mut peer| async move {
        peer.stream.write_all(b"(qemu) ").await.unwrap();
    });
    let error = server.connect().await.unwrap_err();
    assert!(
        matches!(&error, Error::NotQmp { excerpt } if excerpt == "(qemu) "),
        "{error:?}"
    );
    server.played().await;
}

#[tokio::test]
async fn a_close_before_the_greeting_is_a_close() {
    let server = Server::play(|peer| async move { drop(peer) });
    let error = server.connect().await.unwrap_err();
    assert!(
        matches!(&error, Error::Closed { in_flight } if in_flight.is_empty()),
        "{error:?}"
    );
    server.played().await;
}

#[tokio::test]
async fn a_queue_that_is_full_is_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("qmp");
    let socket = tokio::net::UnixSocket::new_stream().unwrap();
    socket.bind(&path).unwrap();
    let listener = socket.listen(0).unwrap();
    // A queue of length 0 takes one: the next is turned away until somebody is accepted.
    let first = UnixStream::connect(&path).await.unwrap();
    let address = Address::Unix(path);
    let turned_away = Client::connect(&address, &short(50)).await;
    assert!(
        matches!(&turned_away, Err(Error::NoGreeting { .. })),
        "{turned_away:?}"
    );
    let options = Options::default();
    let served = async {
        drop((listener.accept().await.unwrap(), first));
        let (stream, _) = listener.accept().await.unwrap();
        let stream = BufReader::new(stream);
        Script { stream }.greet().await;
    };
    let (connected, ()) =
        bounded(async { tokio::join!(Client::connect(&address, &options), served) }).await;
    connected.unwrap();
}
