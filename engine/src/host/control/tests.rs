//! The protocol line by line, and the server with all kinds of clients.

use std::fs::{self, Permissions, set_permissions};
use std::io::{BufRead as _, BufReader as StdReader, Write as _};
use std::num::NonZeroU64;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::os::unix::net::{UnixListener as StdListener, UnixStream as StdStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::unistd::Uid;
use proptest::prelude::*;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::folder::may_steer;
use super::protocol::{Came, LineError, decode, encode, read_line};
use super::*;
use crate::core::encoding::EncodingTotals;
use crate::core::message::{Command as Order, Phase};
use crate::core::meter::Progress;
use crate::core::postcopy::Way;
use crate::job::Steering;
use crate::pacer::{Bandwidth, Pacer};

/// How long anything may take here.
const BOUND: Duration = Duration::from_secs(20);

fn rate(bytes: u64) -> NonZeroU64 {
    NonZeroU64::new(bytes).unwrap()
}

fn commands() -> Vec<(Command, &'static str)> {
    let limited = Speed::BytesPerS(rate(1 << 20));
    vec![
        (Command::Info, r#"{"version":1,"command":"info"}"#),
        (
            Command::SetSpeed { limit: limited },
            r#"{"version":1,"command":"set-speed","limit":{"bytes-per-s":1048576}}"#,
        ),
        (
            Command::SetSpeed {
                limit: Speed::Unlimited,
            },
            r#"{"version":1,"command":"set-speed","limit":"unlimited"}"#,
        ),
        (
            Command::SetMaxDowntime { ms: 50 },
            r#"{"version":1,"command":"set-max-downtime","ms":50}"#,
        ),
        (Command::Abort, r#"{"version":1,"command":"abort"}"#),
    ]
}

#[test]
fn requests_are_written_and_read_as_documented() {
    for (command, line) in commands() {
        assert_eq!(encode(&command), format!("{line}\n").into_bytes());
        assert_eq!(decode(line.as_bytes()), Ok(command));
    }
}

#[test]
fn what_is_no_request_of_this_version_is_none() {
    for wrong in [
        "",
        "info",
        "[]",
        "7",
        "{}",
        r#"{"command":"info"}"#,
        r#"{"version":"1","command":"info"}"#,
        r#"{"version":1}"#,
        r#"{"version":1,"command":"fly"}"#,
        r#"{"version":1,"command":"set-speed"}"#,
        r#"{"version":1,"command":"set-speed","limit":null}"#,
        r#"{"version":1,"command":"set-speed","limit":{"bytes-per-s":0}}"#,
        r#"{"version":1,"command":"set-max-downtime","ms":-1}"#,
        r#"{"version":1,"command":"info"} {"version":1,"command":"abort"}"#,
    ] {
        let read = decode::<Command>(wrong.as_bytes());
        assert_eq!(read, Err(LineError::Malformed), "{wrong}");
    }
    let newer = r#"{"version":2,"command":{"of":"another kind"}}"#;
    let read = decode::<Command>(newer.as_bytes());
    assert_eq!(read, Err(LineError::Version { found: 2 }));
}

#[test]
fn answers_of_a_later_engine_can_be_read() {
    let refused = br#"{"version":1,"answer":"refused","code":"tired","reason":"later","more":[1]}"#;
    let expected = Answer::Refused {
        code: RefusalCode::Other,
        reason: "later".into(),
    };
    assert_eq!(decode(refused), Ok(expected));
}

#[tokio::test]
async fn no_more_of_a_line_is_held_than_its_limit() {
    let endless = tokio::io::repeat(b'x');
    let mut endless = tokio::io::BufReader::new(endless);
    let mut line = Vec::new();
    let came = read_line(&mut endless, &mut line).await.unwrap();
    assert_eq!((came, line.len()), (Came::TooLong, MAX_LINE_BYTES));
    assert!(line.capacity() <= 2 * MAX_LINE_BYTES);
    let mut half = &b"{\"version\":1}\n{\"ver"[..];
    assert_eq!(read_line(&mut half, &mut line).await.unwrap(), Came::Line);
    assert_eq!(line, b"{\"version\":1}\n");
    assert_eq!(read_line(&mut half, &mut line).await.unwrap(), Came::End);
}

fn pieces() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        Just(r#"{"version":1,"#.to_owned()),
        Just(r#""command":"#.to_owned()),
        Just(r#""set-speed","limit":"#.to_owned()),
        Just(r#""set-max-downtime","ms":"#.to_owned()),
        Just(r#""answer":"info","job":{"#.to_owned()),
        Just("18446744073709551616".to_owned()),
        Just("1e999".to_owned()),
        Just("null".to_owned()),
        Just("\\ud800".to_owned()),
        Just("[".repeat(500)),
        Just("}".to_owned()),
        "\\PC{0,8}",
    ];
    proptest::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat().into_bytes())
}

proptest! {
    #[test]
    fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        _ = decode::<Command>(&bytes);
        _ = decode::<Answer>(&bytes);
    }

    #[test]
    fn neither_does_what_looks_like_a_line(bytes in pieces()) {
        _ = decode::<Command>(&bytes);
        _ = decode::<Answer>(&bytes);
    }

    #[test]
    fn every_answer_is_one_line_and_comes_back(
        texts in proptest::array::uniform3("\\PC{0,200}"),
        bytes in any::<[u64; 5]>(),
        left_ms in any::<Option<u64>>(),
        bandwidth in any::<Option<NonZeroU64>>(),
        // To three digits, as it is told.
        thousandths in 1..1_000_000u32,
    ) {
        let [name, target, reason] = texts;
        let progress = Progress { bytes_wire: bytes[0], ..look(Phase::Copying) };
        let mut figures = Figures::from(&progress);
        figures.done_bytes = bytes[1];
        figures.remaining_bytes = bytes[2];
        figures.elapsed_ms = bytes[3];
        figures.rate_bytes_per_s = bytes[4];
        figures.left_ms = left_ms;
        let ratio = f64::from(thousandths) / 1e3;
        figures.compression = Some(Packed { with: name.clone(), ratio });
        let job = JobInfo {
            qmp: Some(reason.clone()),
            name,
            target,
            engine_pid: 7,
            bandwidth_bytes_per_s: bandwidth,
            figures,
        };
        let code = RefusalCode::TooLate;
        for answer in [Answer::Info { job: Box::new(job) }, Answer::Refused { code, reason }] {
            let line = encode(&answer);
            prop_assert!(line.len() <= MAX_LINE_BYTES);
            let end = line.iter().position(|byte| *byte == b'\n');
            prop_assert_eq!(end, Some(line.len() - 1));
            prop_assert_eq!(decode::<Answer>(&line), Ok(answer));
        }
    }
}

#[test]
fn names_are_plain() {
    for good in ["qemu-42-1234567", "a", "A.b_c-9", &"x".repeat(64)] {
        assert_eq!(good.parse::<JobName>().unwrap().to_string(), good);
    }
    for bad in [
        "",
        ".",
        "..",
        ".x",
        "a/b",
        "a b",
        "ä",
        "a\0",
        &"x".repeat(65),
    ] {
        assert_eq!(bad.parse::<JobName>(), Err(BadName), "{bad:?}");
    }
}

#[test]
fn only_the_user_and_root_may_steer() {
    let (root, one, other) = (Uid::from_raw(0), Uid::from_raw(1000), Uid::from_raw(1001));
    assert!(may_steer(one, one) && may_steer(root, one) && may_steer(root, root));
    assert!(!may_steer(other, one) && !may_steer(one, root));
}

fn look(phase: Phase) -> Progress {
    Progress {
        phase,
        round: 1,
        elapsed: Duration::from_secs(3),
        done_bytes: 30 << 20,
        remaining_bytes: 10 << 20,
        bytes_wire: 20 << 20,
        rate_bytes_per_s: 1 << 20,
        dirty_bytes_per_s: 0,
        predicted_blackout: None,
        left: Some(Duration::from_secs(10)),
        lanes: 2,
        lanes_lost: 0,
        downtime_limit: Duration::from_millis(100),
        throttled_percent: 0,
        throttled_percent_max: 0,
        encoding: EncodingTotals::default(),
        given_away: false,
        postcopy: Way::Closed,
    }
}

/// A migration that does what it is told, and its control socket.
struct Scene {
    state: PathBuf,
    _folder: tempfile::TempDir,
    server: Option<Server>,
    progress: watch::Sender<Progress>,
    pacer: Arc<Pacer>,
    driver: JoinHandle<()>,
}

impl Scene {
    fn at(phase: Phase) -> Self {
        Self::below("state", phase)
    }

    fn below(state: &str, phase: Phase) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join(state);
        let (progress, watched) = watch::channel(look(phase));
        let (commands, mut orders) = mpsc::unbounded_channel();
        let pacer = Arc::new(Pacer::new(Bandwidth::Unlimited));
        let steered = Steered {
            name: name(),
            qmp: Some("/run/guest.qmp".into()),
            target: "ferry://there:1".into(),
            steering: Steering::new(commands, Arc::clone(&pacer)),
            progress: watched,
        };
        let server = Server::open(Folder::make(&state).unwrap(), steered).unwrap();
        let obeyed = progress.clone();
        let driver = tokio::spawn(async move {
            while let Some(order) = orders.recv().await {
                obeyed.send_modify(|now| match order {
                    Order::SetDowntimeLimit(limit) => now.downtime_limit = limit,
                    Order::Cancel if !now.given_away => now.phase = Phase::Undoing,
                    _ => {}
                });
            }
        });
        Self {
            state,
            _folder: folder,
            server: Some(server),
            progress,
            pacer,
            driver,
        }
    }

    fn folder(&self) -> Folder {
        Folder::open(&self.state).unwrap().unwrap()
    }

    fn socket(&self) -> PathBuf {
        self.state.join("jobs/qemu-1-2.sock")
    }

    async fn client(&self) -> Client {
        Client::connect(&self.folder(), &name(), BOUND)
            .await
            .unwrap()
    }

    async fn ask(&self, command: Command) -> Answer {
        self.client().await.ask(&command).await.unwrap()
    }

    /// Somebody is told how far it is.
    async fn answers(&self) {
        let answer = self.ask(Command::Info).await;
        assert!(matches!(answer, Answer::Info { .. }), "{answer:?}");
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

fn name() -> JobName {
    "qemu-1-2".parse().unwrap()
}

fn code(answer: &Answer) -> Option<RefusalCode> {
    match answer {
        Answer::Refused { code, .. } => Some(*code),
        _ => None,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_is_watched_and_steered() {
    let scene = Scene::at(Phase::Copying);
    let mut client = scene.client().await;
    let limit = Speed::BytesPerS(rate(5));
    let ms = 20;
    for order in [Command::SetSpeed { limit }, Command::SetMaxDowntime { ms }] {
        assert_eq!(client.ask(&order).await.unwrap(), Answer::Done);
    }
    assert_eq!(scene.pacer.limit(), Some(5));
    let Answer::Info { job } = client.ask(&Command::Info).await.unwrap() else {
        panic!("no info")
    };
    assert_eq!(job.name, "qemu-1-2");
    assert_eq!(job.qmp.as_deref(), Some("/run/guest.qmp"));
    assert_eq!(job.bandwidth_bytes_per_s, Some(rate(5)));
    assert_eq!(job.engine_pid, std::process::id());
    let figures = &job.figures;
    assert_eq!((figures.phase.as_str(), figures.percent), ("copying", 73));
    assert_eq!((figures.max_downtime_ms, figures.lanes), (20, 2));
    assert_eq!(figures.compression, None);
    let limit = Speed::Unlimited;
    assert_eq!(scene.ask(Command::SetSpeed { limit }).await, Answer::Done);
    assert_eq!(scene.pacer.limit(), None);
    let too_long = Command::SetMaxDowntime {
        ms: MAX_DOWNTIME_MS + 1,
    };
    assert_eq!(code(&scene.ask(too_long).await), Some(RefusalCode::Invalid));
    assert_eq!(client.ask(&Command::Abort).await.unwrap(), Answer::Done);
    assert_eq!(scene.progress.borrow().phase, Phase::Undoing);
    assert_eq!(scene.ask(Command::Abort).await, Answer::Done);
}

#[tokio::test(flavor = "multi_thread")]
async fn orders_that_come_too_late_are_refused() {
    let limit = Speed::Unlimited;
    let scene = Scene::at(Phase::Draining);
    for order in [
        Command::SetSpeed { limit },
        Command::SetMaxDowntime { ms: 5 },
    ] {
        assert_eq!(code(&scene.ask(order).await), Some(RefusalCode::TooLate));
    }
    let phases = [Phase::Given, Phase::Asking, Phase::Leaving, Phase::Ended];
    for phase in phases {
        scene.progress.send_modify(|now| {
            now.phase = phase;
            now.given_away = true;
        });
        let answer = scene.ask(Command::Abort).await;
        assert_eq!(code(&answer), Some(RefusalCode::TooLate), "{phase:?}");
    }
    // Kept of its own in the same moment: that is what was wanted.
    scene.progress.send_modify(|now| now.given_away = false);
    assert_eq!(scene.ask(Command::Abort).await, Answer::Done);
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_make_no_sense_do_no_harm() {
    let scene = Scene::at(Phase::Copying);
    let silent = StdStream::connect(scene.socket()).unwrap();
    let mut half = StdStream::connect(scene.socket()).unwrap();
    half.write_all(br#"{"version":1,"comm"#).unwrap();
    let mut gone = StdStream::connect(scene.socket()).unwrap();
    gone.write_all(&encode(Command::Info)).unwrap();
    drop(gone);
    // Asks again and again and never reads, until nothing more can be written.
    let mut deaf = StdStream::connect(scene.socket()).unwrap();
    deaf.set_nonblocking(true).unwrap();
    let requests = encode(Command::Info).repeat(1000);
    while deaf.write(&requests).is_ok() {}
    for garbage in [
        b"hello\n".to_vec(),
        b"\n".to_vec(),
        b"\xff\xfe\0\n".to_vec(),
        b"x".repeat(3 * MAX_LINE_BYTES),
        encode(Command::Info)[..10].to_vec(),
        b"{\"version\":9,\"command\":\"info\"}\n".to_vec(),
    ] {
        let socket = scene.socket();
        let told = tokio::task::spawn_blocking(move || told(&socket, &garbage));
        let told = told.await.unwrap();
        assert!(told.is_empty() || told.contains("refused"), "{told}");
        scene.answers().await;
    }
    drop((silent, half, deaf));
    scene.answers().await;
}

/// What a client is told that sends `bytes` and nothing more.
fn told(socket: &Path, bytes: &[u8]) -> String {
    let mut stream = StdStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(BOUND)).unwrap();
    // It may be shown out before all is sent.
    _ = stream.write_all(bytes);
    _ = stream.shutdown(std::net::Shutdown::Write);
    let mut told = String::new();
    _ = StdReader::new(stream).read_line(&mut told);
    told
}

#[tokio::test(flavor = "multi_thread")]
async fn one_client_too_many_is_told_so_and_the_next_one_finds_room() {
    let scene = Scene::at(Phase::Copying);
    let mut clients = Vec::new();
    let busy = loop {
        let mut client = scene.client().await;
        let answer = client.ask(&Command::Info).await.unwrap();
        match answer {
            Answer::Info { .. } => clients.push(client),
            other => break other,
        }
        assert!(clients.len() < 1000, "there is no bound");
    };
    assert_eq!(code(&busy), Some(RefusalCode::Busy));
    for client in &mut clients {
        client.ask(&Command::Info).await.unwrap();
    }
    clients.pop();
    let room = async {
        while code(&scene.ask(Command::Info).await).is_some() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(BOUND, room).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_socket_is_private_and_gone_when_it_is_over() {
    let mut scene = Scene::at(Phase::Copying);
    let mode = |path: &Path| fs::symlink_metadata(path).unwrap().mode() & 0o777;
    assert_eq!(mode(&scene.socket()), 0o600);
    assert_eq!(mode(&scene.state.join("jobs")), 0o700);
    assert_eq!(scene.folder().names().unwrap(), [name()]);
    let mut idle = scene.client().await;
    idle.ask(&Command::Info).await.unwrap();
    scene.server.take().unwrap().close().await;
    assert!(!scene.socket().exists());
    assert_eq!(scene.folder().names().unwrap(), []);
    let over = idle.ask(&Command::Info).await;
    assert!(matches!(over, Err(ClientError::Ended)), "{over:?}");
    let nobody = Client::connect(&scene.folder(), &name(), BOUND).await;
    assert!(matches!(nobody, Err(ClientError::Gone)), "{nobody:?}");
    // Whatever else ends the server ends the socket.
    let mut scene = Scene::at(Phase::Copying);
    drop(scene.server.take());
    assert!(!scene.socket().exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_engines_socket_is_told_from_a_live_one_and_replaced() {
    let mut dead = Scene::at(Phase::Copying);
    drop(dead.server.take());
    drop(StdListener::bind(dead.socket()).unwrap());
    let nobody = Client::connect(&dead.folder(), &name(), BOUND).await;
    assert!(matches!(nobody, Err(ClientError::Gone)), "{nobody:?}");
    let (progress, watched) = watch::channel(look(Phase::Copying));
    let steered = || Steered {
        name: name(),
        qmp: None,
        target: "there".into(),
        steering: Steering::new(mpsc::unbounded_channel().0, Arc::clone(&dead.pacer)),
        progress: watched.clone(),
    };
    let first = Server::open(dead.folder(), steered()).unwrap();
    dead.answers().await;
    // The next engine comes before this one has quite ended, and keeps its socket.
    let second = Server::open(dead.folder(), steered()).unwrap();
    first.close().await;
    dead.answers().await;
    drop(second);
    assert!(!dead.socket().exists());
    drop(progress);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_path_may_be_longer_than_a_sockets() {
    let scene = Scene::below(&"long/".repeat(60), Phase::Copying);
    scene.answers().await;
}

#[test]
fn a_folder_that_others_can_write_is_refused() {
    let place = tempfile::tempdir().unwrap();
    let state = place.path();
    assert!(Folder::open(state).unwrap().is_none(), "nothing ran here");
    let jobs = state.join("jobs");
    fs::create_dir(&jobs).unwrap();
    set_permissions(&jobs, Permissions::from_mode(0o770)).unwrap();
    for opened in [Folder::make(state), Folder::open(state).map(Option::unwrap)] {
        assert!(
            matches!(opened, Err(FolderError::Exposed { .. })),
            "{opened:?}"
        );
    }
    set_permissions(&jobs, Permissions::from_mode(0o700)).unwrap();
    Folder::make(state).unwrap();
    let elsewhere = state.join("elsewhere");
    fs::rename(&jobs, &elsewhere).unwrap();
    symlink(&elsewhere, &jobs).unwrap();
    Folder::open(state).unwrap_err();
}
