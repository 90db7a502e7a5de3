//! Going on with a post-copy whose engine died: the guest runs at the target, and waits for pages.
//!
//! Nothing of the dead engine is needed but what it left: at the source the journal, which says that the
//! guest was given away, and guest RAM in a VMM that stands; at the target the journal, which says that it
//! was taken, and faults that are still armed. The target tells what it lacks, so neither needs to know
//! what the other had.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use ferry_stream::link::{Acceptor, Connector};
use ferry_stream::message::{
    AbortCode, Features, LaneId, LaneIndex, Message, Purpose, SessionId, Verdict, Versions, Welcome,
};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};

use super::FETCH_LANES;
use super::fetcher::Fetcher;
use super::server::Server;
use crate::core::layout::Layout;
use crate::core::message::{GuestLeft, Input, Moment, Notice, Outcome, Reason, Record};
use crate::core::meter::{PostcopyReport, Report};
use crate::core::outcome::in_full;
use crate::core::pageset::PageSet;
use crate::dial::inquire;
use crate::greeting::{Arrival, MAX_GREETINGS, accept};
use crate::job::{Finished, JournalPlace, Retire};
use crate::journal::{Journal, JournalError};
use crate::pacer::{Bandwidth, Pacer};
use crate::send::{GREETING_LIMIT, PARTING, keep};
use crate::vmm::{Faults, Guest, Pager, Ram, VmmError};
use crate::worker::{Clock, Facts};

/// How often it is told how much is left.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// How long the target stays for a source that has not heard that all is there.
const LINGER: Duration = Duration::from_secs(90);

/// Between two attempts to reach the target.
const ASK_AGAIN: Duration = Duration::from_millis(250);

/// Why there is nothing to go on with.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ResumeError {
    /// The journal cannot be used.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The journal does not say that the guest is being handed over.
    #[error(
        "there is nothing to go on with: the journal {} says that {found}", path.display()
    )]
    Nothing {
        /// The journal.
        path: std::path::PathBuf,
        /// What it says.
        found: &'static str,
    },
    /// The VMM cannot be used.
    #[error("the VM cannot be used")]
    Vm(#[from] VmmError),
    /// The host cannot give what it takes.
    #[error("a thread could not be had")]
    Host(#[from] io::Error),
}

/// What a source goes on with.
pub struct ResumedSource {
    /// Guest RAM, as it was when the guest was given away.
    pub ram: Arc<dyn Ram>,
    /// The VMM, which ends when the guest has all of its pages.
    pub guest: Box<dyn Guest>,
    /// The target.
    pub connector: Arc<dyn Connector>,
    /// Where the journal is.
    pub journal: JournalPlace,
    /// What becomes of the VMM.
    pub retire: Retire,
}

impl ResumedSource {
    /// Serves the target until it has every page, however long that takes. Within a tokio runtime.
    /// `told` is told how many pages are left that are known to be missing, from time to time.
    pub async fn run(self, mut told: impl FnMut(u64)) -> Result<Finished, ResumeError> {
        let mut journal = Journal::reopen(&self.journal.folder, &self.journal.name)?;
        let session = session_of(&journal, Record::Given)?;
        let began = Instant::now();
        match self.whose(session).await {
            Verdict::Taken => {}
            verdict => return not_taken(journal, verdict),
        }
        let clock = Clock::start();
        let (sender, mut facts) = mpsc::unbounded_channel();
        let facts_in = Facts::new(sender, clock);
        let pacer = Arc::new(Pacer::new(Bandwidth::Unlimited));
        let server = Server::new(Arc::clone(&self.ram), pacer, facts_in);
        let nothing = PageSet::empty(self.ram.layout());
        server.serve(nothing.clone(), &nothing);
        let mut lanes = tokio::task::JoinSet::new();
        for index in 1..=FETCH_LANES {
            let lane = LaneId::first(LaneIndex(index));
            let connector = Arc::clone(&self.connector);
            lanes.spawn(keep(connector, session, server.clone(), lane));
        }
        wait_whole(&mut facts, || {
            told(server.served().map_or(0, |served| served.left));
        })
        .await;
        let served = server.served().unwrap_or_default();
        server.close();
        lanes.shutdown().await;
        journal.write(Record::Moved)?;
        let retire = self.retire;
        let mut guest = self.guest;
        let retired = tokio::task::spawn_blocking(move || match retire {
            Retire::Quit => guest.quit(),
            Retire::LeaveStopped => guest.restore(),
        });
        retired
            .await
            .unwrap_or_else(|error| Err(VmmError::failed("ending the VMM", error)))?;
        if retire == Retire::Quit {
            journal.remove()?;
        }
        let report = Report {
            total: began.elapsed(),
            bytes_wire: served.bytes,
            postcopy: Some(PostcopyReport {
                last_page: Some(began.elapsed()),
                bytes_wire: served.bytes,
                asked_pages: served.asked_pages,
                ..PostcopyReport::default()
            }),
            ..Report::default()
        };
        let outcome = Outcome::Moved;
        Ok(Finished { outcome, report })
    }

    /// Asks the target whose the guest is, as often as it takes: nothing may be done before.
    async fn whose(&self, session: SessionId) -> Verdict {
        loop {
            let asked = timeout(GREETING_LIMIT, inquire(&*self.connector, session)).await;
            match asked {
                Ok(Ok(verdict)) => return verdict,
                Ok(Err(error)) => {
                    tracing::debug!(error = in_full(&error), "the target could not be asked");
                }
                Err(_) => {}
            }
            sleep(ASK_AGAIN).await;
        }
    }
}

/// The guest is ours, by the target's own word.
fn not_taken(mut journal: Journal, verdict: Verdict) -> Result<Finished, ResumeError> {
    journal.write(Record::Kept)?;
    journal.remove()?;
    let reason = match verdict {
        Verdict::Returned => Reason::Returned {
            text: "the target says so when asked".to_owned(),
        },
        _ => Reason::Refused,
    };
    let guest = GuestLeft::As(crate::vmm::RunState::Paused);
    Ok(Finished {
        outcome: Outcome::Kept { reason, guest },
        report: Report::default(),
    })
}

/// What a target goes on with.
pub struct ResumedTarget {
    /// Guest RAM.
    pub layout: Layout,
    /// The faults that are armed still.
    pub faults: Box<dyn Faults>,
    /// What serves them.
    pub pager: Arc<dyn Pager>,
    /// Pages without memory: all that may be missing. What of them never was is zero at the source too.
    pub missing: PageSet,
    /// Where the source comes.
    pub acceptor: Box<dyn Acceptor>,
    /// Where the journal is.
    pub journal: JournalPlace,
}

impl ResumedTarget {
    /// Fetches every page that is missing, however long that takes. Within a tokio runtime. `told` is
    /// told how many are, from time to time.
    pub async fn run(self, mut told: impl FnMut(u64)) -> Result<Finished, ResumeError> {
        let journal = Journal::reopen(&self.journal.folder, &self.journal.name)?;
        let session = session_of(&journal, Record::Taken)?;
        let began = Instant::now();
        let clock = Clock::start();
        let (sender, mut facts) = mpsc::unbounded_channel();
        let facts_in = Facts::new(sender, clock);
        let (notices, mut leftovers) = mpsc::unbounded_channel();
        let fetcher = Fetcher::new(self.layout, clock, facts_in, notices.clone());
        fetcher.begin(self.missing, &self.pager)?;
        let serving = tokio::spawn(take_lanes(self.acceptor, session, fetcher.clone(), notices));
        let left = || fetcher.figures().map_or(0, |figures| figures.missing_pages);
        wait_whole(&mut facts, || {
            told(left());
            while let Ok(notice) = leftovers.try_recv() {
                tracing::debug!(?notice, "while fetching");
            }
        })
        .await;
        let mut faults = self.faults;
        let disarmed = tokio::task::spawn_blocking(move || faults.disarm());
        disarmed
            .await
            .unwrap_or_else(|error| Err(VmmError::failed("disarming page faults", error)))?;
        linger(&fetcher).await;
        serving.abort();
        let figures = fetcher.figures();
        let ended = tokio::task::spawn_blocking(move || fetcher.end());
        drop(ended.await);
        journal.remove()?;
        Ok(Finished {
            outcome: Outcome::Moved,
            report: Report {
                total: began.elapsed(),
                fetched: figures,
                ..Report::default()
            },
        })
    }
}

/// Until the source knows that all is there: then it closes its lanes.
async fn linger(fetcher: &Fetcher) {
    let until = Instant::now() + LINGER;
    while Instant::now() < until && !fetcher.source_knows() {
        sleep(Duration::from_millis(10)).await;
    }
}

/// Takes the source's lanes, and answers whoever asks whose the guest is.
async fn take_lanes(
    acceptor: Box<dyn Acceptor>,
    session: SessionId,
    fetcher: Fetcher,
    notices: mpsc::UnboundedSender<Notice>,
) {
    let (greeted, mut arrivals) = mpsc::channel(MAX_GREETINGS);
    // Nothing is lent to a target that only fetches.
    let (_passed, passing) = mpsc::channel(1);
    let accepting = tokio::spawn(accept(acceptor, passing, greeted, notices));
    let mut talks = tokio::task::JoinSet::new();
    while let Some(arrival) = arrivals.recv().await {
        while talks.try_join_next().is_some() {}
        if talks.len() < MAX_GREETINGS {
            talks.spawn(serve_arrival(arrival, session, fetcher.clone()));
        }
    }
    accepting.abort();
}

async fn serve_arrival(mut arrival: Arrival, session: SessionId, fetcher: Fetcher) {
    let known = arrival.hello.session == session;
    let served = async {
        let welcome = Message::Welcome(Welcome {
            version: Versions::OURS.highest,
            features: Features::NONE,
            lanes: 0,
        });
        match arrival.hello.purpose {
            Purpose::Fetch(id) if known => {
                arrival.lane.writer.send(&welcome).await?;
                fetcher.add(id, arrival.lane.into_inner()?.into_lane()?)?;
            }
            Purpose::Inquire if known => {
                arrival.lane.writer.send(&welcome).await?;
                if let Some(Message::Inquire) = arrival.lane.reader.next().await? {
                    let answer = Message::Answer(Verdict::Taken);
                    arrival.lane.writer.send(&answer).await?;
                }
            }
            _ => {
                let abort = Message::Abort {
                    code: AbortCode::Session,
                    text: "that session is not at work here".to_owned(),
                };
                arrival.lane.writer.send(&abort).await?;
            }
        }
        Ok::<_, ferry_stream::Error>(())
    };
    if !matches!(timeout(GREETING_LIMIT + PARTING, served).await, Ok(Ok(()))) {
        tracing::debug!("a connection came to nothing");
    }
}

/// Waits until every page is there, and says from time to time that it waits.
async fn wait_whole(facts: &mut mpsc::UnboundedReceiver<(Moment, Input)>, mut waits: impl FnMut()) {
    loop {
        match timeout(TELL_EVERY, facts.recv()).await {
            Ok(Some((_, Input::Whole)) | None) => return,
            Ok(Some(_)) => {}
            Err(_) => waits(),
        }
    }
}

/// The migration that the journal tells of, where it says `record`.
fn session_of(journal: &Journal, record: Record) -> Result<SessionId, ResumeError> {
    match journal.last() {
        Some(entry) if entry.record == record => Ok(entry.session),
        Some(entry) => Err(nothing(journal, said(entry.record))),
        None => Err(nothing(journal, "nothing was begun")),
    }
}

fn nothing(journal: &Journal, found: &'static str) -> ResumeError {
    ResumeError::Nothing {
        path: journal.path().to_owned(),
        found,
    }
}

/// What a record says, in words.
fn said(record: Record) -> &'static str {
    match record {
        Record::Migrating => "the guest was not handed over: it is here, and can be moved anew",
        Record::Given => "the guest was given to a target",
        Record::Moved => "the guest has moved, with all of its pages",
        Record::Kept => "the guest stayed here",
        Record::Receiving => "the guest never came here: end this QEMU, it is the source's",
        Record::Taken => "the guest was taken from a source",
        Record::Refused => "the guest was refused: it is the source's",
        Record::Returned => "the guest was given back to the source",
    }
}
