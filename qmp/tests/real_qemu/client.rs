//! Connecting, talking, and every way in which that ends.

use std::time::{Duration, Instant};

use ferry_qmp::commands::{
    Cont, QomGet, QueryStatus, QueryVersion, QueryYank, Quit, RunState, Stop,
};
use ferry_qmp::{Address, Client, Error, ErrorClass, EventKind, Options};
use serde_json::json;

use crate::launch::{Qemu, bounded, wait_for};

/// A machine with as little as possible in it.
const BARE: &str = "-machine none";

with_every_qemu! {
    knows_whom_it_talks_to
    tells_of_stop_and_cont
    answers_out_of_band
    serves_one_client_at_a_time
    quit_is_seen_as_a_close
    death_is_seen_as_a_close
    names_the_class_of_an_error
    speaks_over_tcp
    answers_all_that_is_pipelined
}

async fn knows_whom_it_talks_to(version: &str) {
    let Some(qemu) = Qemu::start(version, BARE) else {
        return;
    };
    let (client, _events) = qemu.connect().await;
    let told = &client.greeting().version;
    assert_eq!(format!("{}.{}", told.major, told.minor), version);
    assert_eq!(told.at_least(10, 0), version == "10.0");
    assert!(client.greeting().oob);
    assert_eq!(client.peer().unwrap().pid, qemu.pid());
    assert_eq!(client.execute(QueryVersion).await.unwrap(), *told);
}

async fn tells_of_stop_and_cont(version: &str) {
    let Some(qemu) = Qemu::start(version, BARE) else {
        return;
    };
    let (client, mut events) = qemu.connect().await;
    let status = client.execute(QueryStatus).await.unwrap();
    assert_eq!(
        (status.status, status.running),
        (RunState::Prelaunch, false)
    );

    let before = Instant::now();
    client.execute(Cont).await.unwrap();
    let resumed = bounded(events.next()).await.unwrap();
    assert_eq!(resumed.kind(), EventKind::Resume);
    assert!(resumed.received_at >= before && resumed.timestamp.seconds > 0);
    assert!(client.execute(QueryStatus).await.unwrap().running);

    client.execute(Stop).await.unwrap();
    let stopped = bounded(events.next()).await.unwrap();
    assert_eq!(stopped.kind(), EventKind::Stop);
    let status = client.execute(QueryStatus).await.unwrap();
    assert_eq!((status.status, status.running), (RunState::Paused, false));
}

async fn answers_out_of_band(version: &str) {
    let Some(qemu) = Qemu::start(version, BARE) else {
        return;
    };
    let (client, _events) = qemu.connect().await;
    assert!(!client.execute_oob(QueryYank).await.unwrap().is_empty());
    let refused = client.execute_oob(QueryStatus).await.unwrap_err();
    assert!(matches!(refused, Error::Class { .. }), "{refused:?}");
    assert!(!client.execute(QueryStatus).await.unwrap().running);
}

async fn serves_one_client_at_a_time(version: &str) {
    let Some(qemu) = Qemu::start(version, BARE) else {
        return;
    };
    let (client, _events) = qemu.connect().await;
    let impatient = Options {
        greeting_timeout: Duration::from_millis(100),
        ..Options::default()
    };
    let address = qemu.address();
    let second = Client::connect(&address, &impatient);
    let third = Client::connect(&address, &impatient);
    let fourth = Client::connect(&address, &impatient);
    let (second, third, fourth) = tokio::join!(second, third, fourth);
    for other in [second, third, fourth] {
        assert!(matches!(other, Err(Error::NoGreeting { .. })), "{other:?}");
    }
    client.execute(QueryStatus).await.unwrap();
    drop(client);
    let (client, _events) = qemu.connect().await;
    client.execute(QueryStatus).await.unwrap();
}

async fn quit_is_seen_as_a_close(version: &str) {
    let Some(qemu) = Qemu::start(version, BARE) else {
        return;
    };
    let (client, mut events) = qemu.connect().await;
    client.execute(Quit).await.unwrap();
    let ended = wait_for(&mut events, |kind| {
        matches!(kind, EventKind::Shutdown { .. })
    })
    .await;
    let reason = "host-qmp-quit".to_owned();
    let guest = false;
    assert_eq!(ended, EventKind::Shutdown { guest, reason });
    assert!(bounded(events.next()).await.is_none());
    assert!(matches!(client.ended(), Some(Error::Closed { .. })));
    let after = client.execute(QueryStatus).await;
    assert!(matches!(after, Err(Error::Closed { .. })), "{after:?}");
}

async fn death_is_seen_as_a_close(version: &str) {
    let Some(mut qemu) = Qemu::start(version, BARE) else {
        return;
    };
    let (client, mut events) = qemu.connect().await;
    qemu.kill();
    let answer = bounded(client.execute(QueryStatus)).await;
    assert!(matches!(answer, Err(Error::Closed { .. })), "{answer:?}");
    assert!(bounded(events.next()).await.is_none());
}

async fn names_the_class_of_an_error(version: &str) {
    let Some(qemu) = Qemu::start(version, BARE) else {
        return;
    };
    let (client, _events) = qemu.connect().await;
    let class_of = |answer: Result<serde_json::Value, Error>| match answer {
        Err(Error::Class { class, .. }) => class,
        other => panic!("{other:?}"),
    };
    let unknown = client.execute_raw("no-such-command", json!(null)).await;
    assert_eq!(class_of(unknown), ErrorClass::CommandNotFound);
    let nowhere = client.execute(QomGet::new("/nowhere", "type")).await;
    assert_eq!(class_of(nowhere), ErrorClass::DeviceNotFound);
    let odd = client.execute_raw("query-status", json!({"a": 1})).await;
    assert_eq!(class_of(odd), ErrorClass::GenericError);
    let no_object = client.execute_raw("query-status", json!([1])).await;
    assert_eq!(class_of(no_object), ErrorClass::GenericError);
}

async fn speaks_over_tcp(version: &str) {
    let args = format!("{BARE} -qmp tcp:127.0.0.1:0,server=on,wait=off");
    let Some(qemu) = Qemu::start(version, &args) else {
        return;
    };
    let (client, _events) = qemu.connect().await;
    let chardevs = client
        .execute_raw("query-chardev", json!({}))
        .await
        .unwrap();
    let address: Address = chardevs
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|chardev| chardev["filename"].as_str()?.strip_prefix("disconnected:"))
        .find_map(|name| name.starts_with("tcp:").then(|| name.split(',').next())?)
        .unwrap()
        .parse()
        .unwrap();
    let (other, mut events) = Client::connect(&address, &Options::default())
        .await
        .unwrap();
    assert_eq!(other.peer(), None);
    client.execute(Cont).await.unwrap();
    wait_for(&mut events, |kind| *kind == EventKind::Resume).await;
    assert!(other.execute(QueryStatus).await.unwrap().running);
    other.execute(Quit).await.unwrap();
    while bounded(events.next()).await.is_some() {}
    assert!(matches!(other.ended(), Some(Error::Closed { .. })));
}

async fn answers_all_that_is_pipelined(version: &str) {
    let Some(qemu) = Qemu::start(version, BARE) else {
        return;
    };
    let (client, _events) = qemu.connect().await;
    let pipelined: Vec<_> = (0..50)
        .map(|_| (client.execute(QueryStatus), client.execute_oob(QueryYank)))
        .collect();
    for (status, yank) in pipelined {
        assert!(!bounded(status).await.unwrap().running);
        bounded(yank).await.unwrap();
    }
}
