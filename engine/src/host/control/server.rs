//! The migration's side of its control socket.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nix::unistd::{Uid, geteuid};
use tokio::io::{AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Mutex, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{sleep, timeout};

use super::folder::{Folder, FolderError, JobName, Socket, may_steer};
use super::protocol::{
    Answer, Came, Command, Figures, JobInfo, LineError, MAX_DOWNTIME_MS, RefusalCode, Speed,
    decode, encode, read_line,
};
use crate::core::message::Phase;
use crate::core::meter::Progress;
use crate::core::postcopy::Way;
use crate::job::Steering;
use crate::pacer::Bandwidth;

/// Most clients at a time; the next one is told so and shown out.
const MAX_CLIENTS: usize = 32;

/// How long a client may take for its next request.
const REQUEST_LIMIT: Duration = Duration::from_secs(30);

/// How long an answer may take to leave: a client that does not read is no client.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// How long the migration may take to obey. It never waits for anything but facts.
const OBEY_LIMIT: Duration = Duration::from_secs(5);

/// How long answers may take to leave when the migration is over.
const PARTING: Duration = Duration::from_secs(1);

/// How long nobody is let in when the host has no descriptor left for the next client.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A running migration, as clients see it.
#[derive(Clone, Debug)]
pub struct Steered {
    /// Its name: the journal's.
    pub name: JobName,
    /// The QMP socket of its guest, where there is one.
    pub qmp: Option<PathBuf>,
    /// Where the guest goes, for people.
    pub target: String,
    /// What steers it.
    pub steering: Steering,
    /// How far it is.
    pub progress: watch::Receiver<Progress>,
}

/// The control socket of a running migration. It is gone when the value is.
#[derive(Debug)]
pub struct Server {
    /// Removed first: whoever finds the socket finds somebody who listens.
    socket: Option<Socket>,
    /// Dropped when the migration is over.
    running: Option<watch::Sender<()>>,
    serving: JoinHandle<()>,
}

impl Server {
    /// Opens the socket of `steered` in `folder`. The caller holds the journal of that name. Within a
    /// tokio runtime.
    pub fn open(folder: Folder, steered: Steered) -> Result<Self, FolderError> {
        let (listener, socket) = folder.listen(&steered.name)?;
        let (running, ends) = watch::channel(());
        let desk = Arc::new(Desk {
            steered,
            orders: Mutex::new(()),
        });
        Ok(Self {
            socket: Some(socket),
            running: Some(running),
            serving: tokio::spawn(serve(listener, desk, ends)),
        })
    }

    /// The migration is over: the socket is removed, and whoever waits for an answer gets it.
    pub async fn close(mut self) {
        self.socket = None;
        self.running = None;
        // Whoever does not read in time is left without.
        _ = timeout(PARTING, &mut self.serving).await;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.socket = None;
        self.serving.abort();
    }
}

async fn serve(listener: UnixListener, desk: Arc<Desk>, mut ends: watch::Receiver<()>) {
    let mut clients = JoinSet::new();
    loop {
        tokio::select! {
            _ = ends.changed() => break,
            Some(_) = clients.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => let_in(stream, &mut clients, &desk, &ends),
                Err(error) => {
                    tracing::debug!(%error, "a client could not be let in");
                    sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
    drop(listener);
    while clients.join_next().await.is_some() {}
}

fn let_in(
    stream: UnixStream,
    clients: &mut JoinSet<()>,
    desk: &Arc<Desk>,
    ends: &watch::Receiver<()>,
) {
    let peer = stream.peer_cred().map(|peer| Uid::from_raw(peer.uid()));
    if !peer.is_ok_and(|peer| may_steer(peer, geteuid())) {
        return;
    }
    while clients.try_join_next().is_some() {}
    if clients.len() >= MAX_CLIENTS {
        let reason = "there are too many clients: end one, or wait a moment".to_owned();
        let busy = refused(RefusalCode::Busy, reason);
        // Nobody waits for this one: its buffer is empty still, and takes a line.
        _ = stream.try_write(&encode(busy));
        return;
    }
    let (desk, ends) = (Arc::clone(desk), ends.clone());
    clients.spawn(async move {
        if let Err(error) = desk.attend(stream, ends).await {
            tracing::debug!(%error, "a client is gone");
        }
    });
}

fn refused(code: RefusalCode, reason: String) -> Answer {
    Answer::Refused { code, reason }
}

/// Where clients are attended to.
#[derive(Debug)]
struct Desk {
    steered: Steered,
    /// One order at a time, so that each sees whether it was obeyed.
    orders: Mutex<()>,
}

impl Desk {
    /// Answers one client until it has no more requests, or makes no sense.
    async fn attend(&self, stream: UnixStream, mut ends: watch::Receiver<()>) -> io::Result<()> {
        let (reader, mut writer) = stream.into_split();
        let (mut reader, mut line) = (BufReader::new(reader), Vec::new());
        loop {
            let came = tokio::select! {
                came = timeout(REQUEST_LIMIT, read_line(&mut reader, &mut line)) => came??,
                _ = ends.changed() => return Ok(()),
            };
            let request = match came {
                Came::End => return Ok(()),
                Came::TooLong => Err(LineError::Malformed),
                Came::Line => decode(&line),
            };
            let answer = match &request {
                Ok(command) => self.obey(command).await,
                Err(error) => refused(code_of(*error), error.to_string()),
            };
            timeout(ANSWER_LIMIT, writer.write_all(&encode(answer))).await??;
            if request.is_err() {
                return Ok(());
            }
        }
    }

    async fn obey(&self, command: &Command) -> Answer {
        match *command {
            Command::Info => Answer::Info {
                job: Box::new(self.info()),
            },
            Command::SetSpeed { limit } => self.set_speed(limit).await,
            Command::SetMaxDowntime { ms } => self.set_max_downtime(ms).await,
            Command::Postcopy => self.postcopy().await,
            Command::Abort => self.abort().await,
        }
    }

    fn info(&self) -> JobInfo {
        let Steered {
            name,
            qmp,
            target,
            steering,
            progress,
        } = &self.steered;
        JobInfo {
            name: name.to_string(),
            qmp: qmp.as_ref().map(|path| path.to_string_lossy().into_owned()),
            target: target.clone(),
            engine_pid: std::process::id(),
            bandwidth_bytes_per_s: match steering.bandwidth() {
                Bandwidth::Unlimited => None,
                Bandwidth::BytesPerSecond(rate) => Some(rate),
            },
            figures: Figures::from(&*progress.borrow()),
        }
    }

    async fn set_speed(&self, limit: Speed) -> Answer {
        let _order = self.orders.lock().await;
        if let Some(too_late) = self.too_late_to_change() {
            return too_late;
        }
        self.steered.steering.set_bandwidth(limit.into());
        Answer::Done
    }

    async fn set_max_downtime(&self, ms: u64) -> Answer {
        let _order = self.orders.lock().await;
        if ms > MAX_DOWNTIME_MS {
            let reason = format!("the longest downtime limit is {MAX_DOWNTIME_MS} ms");
            return refused(RefusalCode::Invalid, reason);
        }
        if let Some(too_late) = self.too_late_to_change() {
            return too_late;
        }
        let limit = Duration::from_millis(ms);
        self.steered.steering.set_downtime_limit(limit);
        self.see(|now| now.downtime_limit == limit).await
    }

    async fn postcopy(&self) -> Answer {
        let _order = self.orders.lock().await;
        let (way, phase) = {
            let now = self.steered.progress.borrow();
            (now.postcopy, now.phase)
        };
        match way {
            Way::Closed => {
                let reason =
                    "post-copy was not allowed with --postcopy, or the target cannot do it";
                refused(RefusalCode::Invalid, reason.to_owned())
            }
            Way::Open if !matches!(phase, Phase::Preparing | Phase::Copying) => {
                let reason = format!("it is too late for post-copy: the migration is {phase}");
                refused(RefusalCode::TooLate, reason)
            }
            Way::Open => {
                self.steered.steering.start_postcopy();
                self.see(|now| now.postcopy != Way::Open).await
            }
            // It is what is being done.
            Way::Due | Way::Taken | Way::Whole => Answer::Done,
        }
    }

    async fn abort(&self) -> Answer {
        let _order = self.orders.lock().await;
        self.steered.steering.cancel();
        let gives_up = |now: &Progress| matches!(now.phase, Phase::Undoing | Phase::Ended);
        let seen = self.see(|now| now.given_away || gives_up(now)).await;
        if self.steered.progress.borrow().given_away {
            let reason = "the guest was given away to the target; it is too late to give up";
            return refused(RefusalCode::TooLate, reason.to_owned());
        }
        seen
    }

    /// Limits mean something as long as the guest is not being handed over.
    fn too_late_to_change(&self) -> Option<Answer> {
        let phase = self.steered.progress.borrow().phase;
        let holds = matches!(phase, Phase::Greeting | Phase::Preparing | Phase::Copying);
        (!holds).then(|| {
            let reason = format!("it is too late for another limit: the migration is {phase}");
            refused(RefusalCode::TooLate, reason)
        })
    }

    /// Waits until the migration is seen to have obeyed, or is over.
    async fn see(&self, obeyed: impl FnMut(&Progress) -> bool) -> Answer {
        let mut progress = self.steered.progress.clone();
        match timeout(OBEY_LIMIT, progress.wait_for(obeyed)).await {
            Ok(Ok(_)) => Answer::Done,
            Ok(Err(_)) => {
                let reason = "the migration has ended meanwhile".to_owned();
                refused(RefusalCode::TooLate, reason)
            }
            Err(_) => {
                let reason = "the engine has the order and does not react; look again in a while";
                refused(RefusalCode::Silent, reason.to_owned())
            }
        }
    }
}

fn code_of(error: LineError) -> RefusalCode {
    match error {
        LineError::Malformed => RefusalCode::Malformed,
        LineError::Version { .. } => RefusalCode::Version,
    }
}
