//! A source, a target, and what must hold once a migration between them has ended.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ferry_engine::core::converge::{Converge, Verdict, View};
use ferry_engine::core::message::{GuestLeft, Outcome};
use ferry_engine::core::source::SourceLimits;
use ferry_engine::core::target::TargetLimits;
use ferry_engine::job::{JournalPlace, SourceBuilder, TargetBuilder};
use ferry_engine::link::{Acceptor, Connector, TcpAcceptor, TcpConnector};
use ferry_engine::vmm::RunState;
use ferry_engine::{Finished, Migration, Silence};
use tempfile::TempDir;

use super::{Model, Toy, World};

/// How long a toy migration may wait for anything: it takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(5);

/// A convergence rule that goes on copying until it is told to stop.
#[derive(Debug)]
pub struct Until(pub Arc<AtomicBool>);

impl Converge for Until {
    fn decide(&mut self, _: &View<'_>) -> Verdict {
        if self.0.load(Ordering::Acquire) {
            Verdict::Stop
        } else {
            Verdict::Continue
        }
    }
}

/// Two toys for one guest.
#[derive(Debug)]
pub struct Pair {
    /// The truth about the guest.
    pub world: Arc<World>,
    /// Where it is.
    pub source: Toy,
    /// Where it shall go.
    pub target: Toy,
    folder: TempDir,
}

/// How both ends of a migration ended.
#[derive(Debug)]
pub struct Ended {
    /// The source's view.
    pub source: Finished,
    /// The target's.
    pub target: Finished,
}

impl Pair {
    /// A running guest of this model, and a place for it.
    pub fn new(model: &Model) -> io::Result<Self> {
        let world = Arc::new(World::new(model.shapes.clone(), model.change));
        Ok(Self {
            source: Toy::booted(model, &world)?,
            target: Toy::waiting(model, &world)?,
            folder: tempfile::tempdir()?,
            world,
        })
    }

    /// Where the journal of the source is.
    pub fn source_journal(&self) -> JournalPlace {
        self.journal("source")
    }

    /// Where the journal of the target is.
    pub fn target_journal(&self) -> JournalPlace {
        self.journal("target")
    }

    fn journal(&self, name: &str) -> JournalPlace {
        JournalPlace {
            folder: self.folder.path().to_owned(),
            name: name.to_owned(),
        }
    }

    /// Journals that are still there.
    pub fn journals(&self) -> io::Result<Vec<String>> {
        let mut names = self
            .folder
            .path()
            .read_dir()?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<io::Result<Vec<_>>>()?;
        names.sort();
        Ok(names)
    }

    /// A source that reaches `connector`, with bounds fit for a toy.
    pub fn sending(&self, connector: Arc<dyn Connector>) -> SourceBuilder {
        Migration::source(self.source.vm(), connector, "toy", self.source_journal())
            .with_limits(source_limits())
            .with_silence(silence())
    }

    /// A source that reaches `address` over TCP.
    pub fn sending_to(&self, address: SocketAddr) -> SourceBuilder {
        let connector = TcpConnector::new(address.to_string(), PATIENCE);
        self.sending(Arc::new(connector))
    }

    /// A target behind `acceptor`, with bounds fit for a toy.
    pub fn receiving(&self, acceptor: Box<dyn Acceptor>) -> TargetBuilder {
        Migration::target(self.target.vm(), acceptor, self.target_journal())
            .with_limits(target_limits())
            .with_silence(silence())
    }

    /// A target behind TCP on loopback, and where it listens.
    pub async fn listening(&self) -> io::Result<(TargetBuilder, SocketAddr)> {
        let acceptor = TcpAcceptor::bind("127.0.0.1:0").await?;
        let address = acceptor.local_addr()?;
        Ok((self.receiving(Box::new(acceptor)), address))
    }

    /// What must hold whatever happened: one owner at every moment, and that one has every page. The
    /// guest ran at the source before, and was to run wherever it ends. Leaves it paused.
    ///
    /// # Panics
    ///
    /// When it does not hold.
    pub fn check(&self, ended: &Ended) {
        let (source, target) = (&ended.source.outcome, &ended.target.outcome);
        let seen = format!("source {source:?}\ntarget {target:?}");
        assert!(!self.world.ran_twice(), "two VMMs ran the guest: {seen}");
        assert!(!self.source.was_paused_slow(), "paused slow: {seen}");
        let owner = match (source, target) {
            (Outcome::Moved, Outcome::Moved) => {
                assert!(self.source.has_quit(), "the source lives on: {seen}");
                &self.target
            }
            (Outcome::Kept { guest, .. }, Outcome::Kept { .. }) => {
                let ended = matches!(
                    target,
                    Outcome::Kept {
                        guest: GuestLeft::Ended,
                        ..
                    }
                );
                assert_eq!(self.target.has_quit(), ended, "{seen}");
                assert!(!matches!(guest, GuestLeft::Damaged(_)), "{seen}");
                assert!(self.source.is_clean(), "something is left: {seen}");
                &self.source
            }
            _ => panic!("the two disagree: {seen}"),
        };
        assert_eq!(owner.state(), RunState::Running, "nobody runs: {seen}");
        assert_eq!(
            self.journals().unwrap(),
            [""; 0],
            "a journal is left: {seen}"
        );
        self.check_ram(owner);
    }

    /// Every page of `owner` holds what the guest left there. Leaves the guest paused.
    ///
    /// # Panics
    ///
    /// When one does not.
    pub fn check_ram(&self, owner: &Toy) {
        owner.pause();
        assert_eq!(owner.bad_pages(), [], "pages were lost");
        assert_eq!(self.world.bad_pages(), 0, "the guest found bad pages");
    }
}

fn silence() -> Silence {
    Silence {
        ping: Duration::from_millis(100),
        limit: Duration::from_secs(2),
    }
}

fn source_limits() -> SourceLimits {
    SourceLimits {
        greeting: PATIENCE,
        preparing: PATIENCE,
        flushing: PATIENCE,
        stopping: PATIENCE,
        draining: PATIENCE,
        offering: PATIENCE,
        given: Duration::from_secs(1),
        asking: Duration::from_millis(500),
        ask_again: Duration::from_millis(20),
        ..SourceLimits::default()
    }
}

fn target_limits() -> TargetLimits {
    TargetLimits {
        preparing: PATIENCE,
        offered: PATIENCE,
        linger: Duration::from_secs(2),
        parting: Duration::from_millis(100),
        ..TargetLimits::default()
    }
}
