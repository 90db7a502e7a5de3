//! How a migration is set up.

use std::io;
use std::num::NonZeroU16;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ferry_stream::limits::MAX_LANES;
use ferry_stream::link::{Acceptor, Connector};
use ferry_stream::message::{Features, Mode, SessionId};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

use super::{Job, Steering, TargetJob};
use crate::control::Silence;
use crate::core::converge::{Converge, DowntimeLimit};
use crate::core::encoding::Compression;
use crate::core::message::{Input, Notice, Record};
use crate::core::source::{AtTimeout, LanePlan, Postcopy, Source, SourceConfig, SourceLimits};
use crate::core::target::{Target, TargetConfig, TargetLimits};
use crate::core::throttle::Throttling;
use crate::journal::{Entry, Journal, JournalError};
use crate::near::WithinHost;
use crate::near::lender::Lender;
use crate::pacer::{Bandwidth, Pacer};
use crate::send::{Flush, GREETING_LIMIT, VmSide};
use crate::vmm::{Inventory, Ram, RunState, Vm, VmmError};
use crate::worker::{Clock, Facts};
use crate::{receive, send};

/// The default of the downtime limit.
pub const DEFAULT_DOWNTIME_LIMIT: Duration = Duration::from_millis(100);

/// What two QEMUs take of a switchover: pause, device state both ways, resume; 7 to 8 ms with an idle
/// TCG guest on a quiet machine. What the engine adds is measured during the move.
pub const DEFAULT_SWITCHOVER_FLOOR: Duration = Duration::from_millis(8);

const PAUSED_BY_A_DEAD_ENGINE: &str = "the guest is paused, and ran when an earlier migration began \
    that died: it is taken for running, and will be let run wherever it ends up";

/// Most page lanes that a target accepts by default.
const DEFAULT_MAX_LANES: u16 = MAX_LANES;

/// What becomes of the source's VMM when the guest has moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retire {
    /// It is ended.
    Quit,
    /// It is left stopped. It must never be resumed: the guest lives elsewhere.
    LeaveStopped,
}

/// Where a VM's journal is: a folder of the host and a name that is the VM's alone, always the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JournalPlace {
    /// The folder; made when it does not exist.
    pub folder: PathBuf,
    /// The name, without an ending.
    pub name: String,
}

/// Why a migration did not begin. Nothing was changed; the guest is where it was.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The journal cannot be used.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The VM did not answer.
    #[error("the VM cannot be read")]
    Vm(#[from] VmmError),
    /// The target cannot be reached.
    #[error("the target {target} cannot be reached: is `ferry receive` running there?")]
    Connect {
        /// The target.
        target: String,
        /// Why.
        source: io::Error,
    },
    /// The host cannot give what a migration needs.
    #[error("a thread or random bytes could not be had")]
    Host(#[source] io::Error),
}

/// Sets up a source.
pub struct SourceBuilder {
    vm: Vm,
    connector: Arc<dyn Connector>,
    peer: String,
    journal: JournalPlace,
    config: SourceConfig,
    converge: Box<dyn Converge>,
    bandwidth: Bandwidth,
    compression: Compression,
    within_host: WithinHost,
    retire: Retire,
    silence: Silence,
}

/// Sets up a target.
pub struct TargetBuilder {
    vm: Vm,
    acceptor: Box<dyn Acceptor>,
    journal: JournalPlace,
    config: TargetConfig,
    silence: Silence,
}

/// The beginning of every migration.
#[derive(Debug)]
pub struct Migration;

impl Migration {
    /// Moves the guest of `vm` to the target that `connector` reaches, named `peer` for people.
    pub fn source(
        vm: Vm,
        connector: Arc<dyn Connector>,
        peer: impl Into<String>,
        journal: JournalPlace,
    ) -> SourceBuilder {
        let config = SourceConfig {
            session: SessionId([0; 16]),
            mode: Mode::Live,
            run_at_target: None,
            downtime_limit: DEFAULT_DOWNTIME_LIMIT,
            timeout: None,
            postcopy: Postcopy::Never,
            at_timeout: AtTimeout::Suspend,
            throttling: None,
            features: offered(Compression::default()),
            lanes: LanePlan::Fixed(NonZeroU16::MIN),
            switchover_floor: DEFAULT_SWITCHOVER_FLOOR,
            limits: SourceLimits::default(),
        };
        SourceBuilder {
            vm,
            connector,
            peer: peer.into(),
            journal,
            config,
            converge: Box::new(DowntimeLimit::default()),
            bandwidth: Bandwidth::Unlimited,
            compression: Compression::default(),
            within_host: WithinHost::default(),
            retire: Retire::Quit,
            silence: Silence::default(),
        }
    }

    /// Receives one guest into `vm` from whoever comes over `acceptor`.
    pub fn target(vm: Vm, acceptor: Box<dyn Acceptor>, journal: JournalPlace) -> TargetBuilder {
        let config = TargetConfig {
            lanes: DEFAULT_MAX_LANES,
            limits: TargetLimits::default(),
        };
        TargetBuilder {
            vm,
            acceptor,
            journal,
            config,
            silence: Silence::default(),
        }
    }
}

impl SourceBuilder {
    /// Whether the guest runs while it is copied; default live.
    #[must_use]
    pub fn with_mode(mut self, mode: Mode) -> Self {
        self.config.mode = mode;
        self
    }

    /// Leaves the guest in this state at the target, whatever it is here.
    #[must_use]
    pub fn with_run_at_target(mut self, state: RunState) -> Self {
        self.config.run_at_target = Some(state);
        self
    }

    /// Page lanes to open; default one. The target may take fewer.
    #[must_use]
    pub fn with_lanes(mut self, lanes: LanePlan) -> Self {
        self.config.lanes = lanes;
        self
    }

    /// The longest blackout that is wanted; default [`DEFAULT_DOWNTIME_LIMIT`].
    #[must_use]
    pub fn with_downtime_limit(mut self, limit: Duration) -> Self {
        self.config.downtime_limit = limit;
        self
    }

    /// After this time the move does what [`SourceBuilder::with_at_timeout`] says.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.config.timeout = Some(timeout);
        self
    }

    /// What becomes of it then; default [`AtTimeout::Suspend`].
    #[must_use]
    pub fn with_at_timeout(mut self, what: AtTimeout) -> Self {
        self.config.at_timeout = what;
        self
    }

    /// Whether the guest may be handed over before its pages; default [`Postcopy::Never`].
    #[must_use]
    pub fn with_postcopy(mut self, postcopy: Postcopy) -> Self {
        self.config.postcopy = postcopy;
        self
    }

    /// Slows the guest, step by step, when rounds of a live move do not shrink. It has all of its time
    /// again before it is stopped, and wherever it stays. Default never.
    #[must_use]
    pub fn with_auto_converge(mut self, throttling: Throttling) -> Self {
        self.config.throttling = Some(throttling);
        self
    }

    /// At most so many bytes a second, over all lanes.
    #[must_use]
    pub fn with_bandwidth(mut self, bandwidth: Bandwidth) -> Self {
        self.bandwidth = bandwidth;
        self
    }

    /// Whether pages are packed, and how; default [`Compression::Auto`].
    #[must_use]
    pub fn with_compression(mut self, compression: Compression) -> Self {
        self.compression = compression;
        self.config.features = offered(compression);
        self
    }

    /// What becomes of pages when the target is on this host; default [`WithinHost::Auto`].
    #[must_use]
    pub fn with_within_host(mut self, within_host: WithinHost) -> Self {
        self.within_host = within_host;
        self
    }

    /// A convergence rule in place of [`DowntimeLimit`].
    #[must_use]
    pub fn with_converge(mut self, rule: Box<dyn Converge>) -> Self {
        self.converge = rule;
        self
    }

    /// What this VMM takes of a switchover; default [`DEFAULT_SWITCHOVER_FLOOR`].
    #[must_use]
    pub fn with_switchover_floor(mut self, floor: Duration) -> Self {
        self.config.switchover_floor = floor;
        self
    }

    /// What becomes of the VMM here; default [`Retire::Quit`].
    #[must_use]
    pub fn with_retire(mut self, retire: Retire) -> Self {
        self.retire = retire;
        self
    }

    /// Bounds on peer and VMM.
    #[must_use]
    pub fn with_limits(mut self, limits: SourceLimits) -> Self {
        self.config.limits = limits;
        self
    }

    /// When a silent link is taken for lost.
    #[must_use]
    pub fn with_silence(mut self, silence: Silence) -> Self {
        self.silence = silence;
        self
    }

    /// Connects, and starts the migration. Within a tokio runtime.
    pub async fn start(self) -> Result<Job, StartError> {
        let Self {
            vm,
            connector,
            peer,
            journal,
            mut config,
            ..
        } = self;
        config.session = random_session().map_err(StartError::Host)?;
        let mut journal = Journal::open(&journal.folder, &journal.name, config.session, &peer)?;
        let clock = Clock::start();
        let (sender, inbox) = mpsc::unbounded_channel();
        let facts = Facts::new(sender, clock);
        let (first, vm) = first_look(vm, facts.clone()).await?;
        let connection = match timeout(GREETING_LIMIT, connector.connect()).await {
            Ok(Ok(connection)) => connection,
            Ok(Err(source)) => {
                return Err(StartError::Connect {
                    target: peer,
                    source,
                });
            }
            Err(elapsed) => {
                return Err(StartError::Connect {
                    target: peer,
                    source: elapsed.into(),
                });
            }
        };
        let session = config.session;
        let lender = Lender::open(self.within_host, &*vm.ram, session);
        if lender.is_some() {
            config.features = config.features.union(Features::NEAR);
        }
        let (commands, orders) = mpsc::unbounded_channel();
        let (notices, told) = mpsc::unbounded_channel();
        let wanted = wanted(journal.last(), first.state);
        if wanted != first.state {
            drop(notices.send(Notice::Leftover(PAUSED_BY_A_DEAD_ENGINE.to_owned())));
        }
        journal.set_wanted(wanted);
        let machine = Source::new(config, first.inventory, wanted, self.converge);
        let (progress, watched) = watch::channel(machine.progress(clock.now()));
        let pacer = Arc::new(Pacer::new(self.bandwidth));
        let parts = send::Parts {
            machine,
            session,
            vm: VmSide {
                guest: vm.guest,
                state: vm.state,
            },
            flush: first.flush,
            tracker: vm.tracker,
            ram: vm.ram,
            connector,
            lender,
            journal,
            pacer: Arc::clone(&pacer),
            compression: self.compression,
            retire: self.retire,
            silence: self.silence,
            clock,
            facts,
            inbox,
            commands: orders,
            progress,
            notices,
        };
        let driver = send::Driver::start(parts, connection).map_err(StartError::Host)?;
        Ok(Job {
            steering: Steering::new(commands, pacer),
            progress: watched,
            notices: told,
            driver: tokio::spawn(driver.run()),
        })
    }
}

impl TargetBuilder {
    /// Most page lanes that are accepted.
    #[must_use]
    pub fn with_max_lanes(mut self, lanes: u16) -> Self {
        self.config.lanes = lanes;
        self
    }

    /// Bounds on the source.
    #[must_use]
    pub fn with_limits(mut self, limits: TargetLimits) -> Self {
        self.config.limits = limits;
        self
    }

    /// When a silent link is taken for lost.
    #[must_use]
    pub fn with_silence(mut self, silence: Silence) -> Self {
        self.silence = silence;
        self
    }

    /// Blanks the RAM and starts to serve. Within a tokio runtime.
    ///
    /// RAM is blanked before a source comes: nobody waits for it then.
    pub async fn start(self) -> Result<TargetJob, StartError> {
        let Self {
            vm,
            acceptor,
            journal,
            config,
            silence,
        } = self;
        let session = SessionId([0; 16]);
        let journal = Journal::open(&journal.folder, &journal.name, session, "")?;
        let clock = Clock::start();
        let (sender, inbox) = mpsc::unbounded_channel();
        let facts = Facts::new(sender, clock);
        let (first, vm) = first_look(vm, facts.clone()).await?;
        blank(Arc::clone(&vm.ram)).await?;
        let machine = Target::new(config, first.inventory);
        let (commands, orders) = mpsc::unbounded_channel();
        let (notices, told) = mpsc::unbounded_channel();
        let (phase, watched) = watch::channel(machine.phase());
        let parts = receive::Parts {
            machine,
            vm: VmSide {
                guest: vm.guest,
                state: vm.state,
            },
            ram: vm.ram,
            faults: vm.faults,
            acceptor,
            journal,
            silence,
            clock,
            facts,
            inbox,
            commands: orders,
            phase,
            notices,
        };
        let driver = receive::Driver::start(parts).map_err(StartError::Host)?;
        Ok(TargetJob {
            commands,
            phase: watched,
            notices: told,
            driver: tokio::spawn(driver.run()),
        })
    }
}

/// In which state people want a guest that is in state `now`. An engine that died in the middle of a
/// move may have paused it, for a copy or for the hand-over, and nobody has let it run since.
fn wanted(last: Option<&Entry>, now: RunState) -> RunState {
    match last {
        Some(Entry {
            record: Record::Migrating,
            wanted: Some(RunState::Running),
            ..
        }) => RunState::Running,
        _ => now,
    }
}

/// What a source is able to do, with pages packed in this way.
fn offered(compression: Compression) -> Features {
    compression.features().union(Features::AHEAD)
}

/// What is read of a VM before its thread is started.
struct FirstLook {
    inventory: Inventory,
    state: RunState,
    flush: Flush,
}

/// Begins to watch the guest and reads what it is: on a thread that may block, like all that the VM
/// is asked.
async fn first_look(mut vm: Vm, facts: Facts) -> Result<(FirstLook, Vm), StartError> {
    let look = tokio::task::spawn_blocking(move || {
        vm.guest
            .watch(Arc::new(move |event| facts.tell(Input::Guest(event))))?;
        let (inventory, state) = (vm.guest.inventory()?, vm.guest.run_state()?);
        Ok((
            FirstLook {
                inventory,
                state,
                flush: vm.guest.flusher(),
            },
            vm,
        ))
    });
    look.await
        .unwrap_or_else(|error| Err(VmmError::failed("reading the VM", error)))
        .map_err(Into::into)
}

async fn blank(ram: Arc<dyn Ram>) -> Result<(), VmmError> {
    let blanked = tokio::task::spawn_blocking(move || ram.blank()).await;
    blanked.unwrap_or_else(|error| Err(VmmError::failed("blanking guest RAM", error)))
}

fn random_session() -> io::Result<SessionId> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(io::Error::from)?;
    Ok(SessionId(bytes))
}
