//! A migration: how it is set up, watched and steered, and how it ends.

mod setup;

pub use crate::postcopy::resume::{ResumeError, ResumedSource, ResumedTarget};

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

pub use self::setup::{
    DEFAULT_DOWNTIME_LIMIT, DEFAULT_SWITCHOVER_FLOOR, JournalPlace, Migration, Retire,
    SourceBuilder, StartError, TargetBuilder,
};
use crate::core::message::{Command, Notice, Outcome, Phase};
use crate::core::meter::{Progress, Report};
use crate::pacer::{Bandwidth, Pacer};

/// How a migration ended, and what it cost.
#[derive(Clone, Debug)]
pub struct Finished {
    /// Where the guest is.
    pub outcome: Outcome,
    /// The figures; at the target only the total, and how faults were served.
    pub report: Report,
}

/// Steers a running source; may be cloned and kept by anybody.
#[derive(Clone, Debug)]
pub struct Steering {
    commands: mpsc::UnboundedSender<Command>,
    pacer: Arc<Pacer>,
}

impl Steering {
    pub(crate) fn new(commands: mpsc::UnboundedSender<Command>, pacer: Arc<Pacer>) -> Self {
        Self { commands, pacer }
    }

    /// Gives up, if the guest was not given away yet.
    pub fn cancel(&self) {
        _ = self.commands.send(Command::Cancel);
    }

    /// Changes the downtime limit.
    pub fn set_downtime_limit(&self, limit: Duration) {
        _ = self.commands.send(Command::SetDowntimeLimit(limit));
    }

    /// Pauses the guest now and finishes the move without it running.
    pub fn suspend(&self) {
        _ = self.commands.send(Command::Suspend);
    }

    /// Hands the guest over now, before its pages, where post-copy was allowed and can be had.
    pub fn start_postcopy(&self) {
        _ = self.commands.send(Command::Postcopy);
    }

    /// Changes the bandwidth limit.
    pub fn set_bandwidth(&self, bandwidth: Bandwidth) {
        self.pacer.set(bandwidth);
    }

    /// The bandwidth limit that holds.
    pub fn bandwidth(&self) -> Bandwidth {
        self.pacer.rate()
    }
}

/// A running source.
#[derive(Debug)]
pub struct Job {
    steering: Steering,
    progress: watch::Receiver<Progress>,
    notices: mpsc::UnboundedReceiver<Notice>,
    driver: JoinHandle<Finished>,
}

impl Job {
    /// The handle that steers it.
    pub fn steering(&self) -> Steering {
        self.steering.clone()
    }

    /// Hands the guest over now: see [`Steering::start_postcopy`].
    pub fn start_postcopy(&self) {
        self.steering.start_postcopy();
    }

    /// How far it is: a channel that always holds the latest look.
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.clone()
    }

    /// The next thing that a user should be told; `None` after the end.
    pub async fn notice(&mut self) -> Option<Notice> {
        self.notices.recv().await
    }

    /// Waits for the end.
    pub async fn finish(self) -> Finished {
        joined(self.driver).await
    }
}

/// A running target.
#[derive(Debug)]
pub struct TargetJob {
    commands: mpsc::UnboundedSender<Command>,
    phase: watch::Receiver<Phase>,
    notices: mpsc::UnboundedReceiver<Notice>,
    driver: JoinHandle<Finished>,
}

impl TargetJob {
    /// What is going on: a channel that always holds the latest.
    pub fn phase(&self) -> watch::Receiver<Phase> {
        self.phase.clone()
    }

    /// Gives up, if the guest was not taken yet.
    pub fn cancel(&self) {
        _ = self.commands.send(Command::Cancel);
    }

    /// The next thing that a user should be told; `None` after the end.
    pub async fn notice(&mut self) -> Option<Notice> {
        self.notices.recv().await
    }

    /// Waits for the end.
    pub async fn finish(self) -> Finished {
        joined(self.driver).await
    }
}

/// A driver that panicked has left its journal, which says whose the guest is; nobody else may.
async fn joined(driver: JoinHandle<Finished>) -> Finished {
    match driver.await {
        Ok(finished) => finished,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}
