//! The arguments.

use std::fmt;
use std::num::{NonZeroU16, NonZeroU64};
use std::path::PathBuf;
use std::str::FromStr;
use std::thread;
use std::time::Duration;

use clap::{Parser, Subcommand, ValueEnum, value_parser};
use ferry_engine::core::source::{AtTimeout, LanePlan, MAX_LANES, Postcopy};
use ferry_engine::core::throttle::MOST_PERCENT;
use ferry_engine::host::control::{JobName, MAX_DOWNTIME_MS, Speed};
use ferry_engine::{Compression, Throttling, WithinHost};

/// The longest `--timeout`: a year, which clocks and timers can still hold.
const MAX_TIMEOUT_S: u64 = 365 * 24 * 60 * 60;

/// Moves running QEMU guests to another host.
///
/// QEMU is driven over QMP and otherwise untouched: no libvirt, no patched QEMU. The guest is in one
/// place at every moment, and the exit code says which.
#[derive(Debug, Parser)]
#[command(name = "ferry", version, propagate_version = true, after_help = EXIT_CODES)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXIT_CODES: &str = "\
Exit codes:
  0  moved: the guest is at the target
  1  failed and kept: the guest is at the source, as it was
  2  refused: wrong usage, or something that cannot be moved; nothing was changed
  3  in doubt: only the target knows whose the guest is, and it could not be asked; neither QEMU was
     touched, and neither may be resumed before somebody has looked at both";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Move the guest of a QEMU on this host to a waiting target
    Migrate(Migrate),
    /// Wait, on the target's host, for one guest, and take it into a QEMU started with -incoming defer
    Receive(Receive),
    /// List the migrations that run on this host
    Jobs(Jobs),
    /// Tell how far a migration is
    Jobinfo(Jobinfo),
    /// Change a migration's bandwidth while it runs
    Setspeed(Setspeed),
    /// Change a migration's downtime limit while it runs
    Setmaxdowntime(Setmaxdowntime),
    /// Hand a migration's guest over now, before its pages
    Postcopy(PostcopyNow),
    /// Go on with a post-copy whose engine here died: the guest waits for pages at the target
    Resume(Resume),
    /// Give a migration up: the guest stays where it is
    Jobabort(Jobabort),
}

const ORDER_EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  not done: it is too late, or the engine does not answer
  2  refused: wrong usage, no such job, or several where none was named";

#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a flag of the command line"
)]
#[derive(Debug, clap::Args)]
#[command(after_help = EXIT_CODES)]
pub(crate) struct Migrate {
    /// QMP socket of the QEMU whose guest moves: a path
    #[arg(long, value_name = "SOCKET")]
    pub(crate) qmp: ferry_qmp::Address,

    /// Where `ferry receive` waits: ferry://HOST:PORT
    #[arg(value_name = "TARGET")]
    pub(crate) target: TargetUri,

    /// Let the guest run while its RAM is copied; without it the guest is paused for the whole copy
    #[arg(long)]
    pub(crate) live: bool,

    /// Leave the guest paused at the target
    #[arg(long)]
    pub(crate) suspend: bool,

    /// Longest blackout that is wanted, in ms; the guest runs on until it fits
    #[arg(long, value_name = "MS", default_value_t = 100, value_parser = value_parser!(u64).range(..=MAX_DOWNTIME_MS))]
    pub(crate) max_downtime: u64,

    /// Several connections for pages: as many as cores and link are good for. This is the default
    #[arg(long)]
    pub(crate) parallel: bool,

    /// So many connections for pages, no more and no fewer
    #[arg(long, value_name = "N", value_parser = value_parser!(u16).range(1..=i64::from(MAX_LANES)))]
    pub(crate) parallel_connections: Option<u16>,

    /// At most so many MiB a second on the link while RAM is copied; the last round, with the guest
    /// stopped, may use all of it. Without it, as fast as it goes
    #[arg(long, value_name = "MIB_PER_S")]
    pub(crate) bandwidth: Option<NonZeroU64>,

    /// How pages travel: auto packs them where that makes them arrive earlier
    #[arg(long, value_name = "HOW", value_enum, default_value_t = Packing::Auto)]
    pub(crate) compression: Packing,

    /// What becomes of pages when the target is on this very host: auto lets it take them from the
    /// source's RAM files, never sends them over the connection all the same
    #[arg(long, value_name = "WHEN", value_enum, default_value_t = Sharing::Auto)]
    pub(crate) within_host: Sharing,

    /// Allow post-copy: the guest is handed over before its pages, which follow as it wants them, when
    /// copying them first cannot meet --max-downtime, or `ferry postcopy` says so. Once it is handed
    /// over it lives on both hosts: the loss of either loses the guest
    #[arg(long, requires = "live")]
    pub(crate) postcopy: bool,

    /// Post-copy after one round of copying
    #[arg(long, requires = "live")]
    pub(crate) postcopy_after_precopy: bool,

    /// Post-copy at once: nothing is copied before the guest is handed over
    #[arg(long, requires = "live", conflicts_with = "postcopy_after_precopy")]
    pub(crate) postcopy_now: bool,

    /// After so many seconds pause the guest and finish, whatever the blackout
    #[arg(long, value_name = "S", value_parser = value_parser!(u64).range(..=MAX_TIMEOUT_S))]
    pub(crate) timeout: Option<u64>,

    /// What --timeout does: pause the guest. This is the default
    #[arg(long, requires = "timeout")]
    pub(crate) timeout_suspend: bool,

    /// What --timeout does: hand the guest over before its pages
    #[arg(long, requires_all = ["timeout", "live"], conflicts_with_all = ["timeout_suspend", "postcopy_now"])]
    pub(crate) timeout_postcopy: bool,

    /// Slow the guest's CPUs, step by step, when it writes faster than the link carries; they have all of
    /// their time again before the guest is stopped. Needs cgroups with the cpu controller
    #[arg(long, requires = "live")]
    pub(crate) auto_converge: bool,

    /// The first step of --auto-converge, in percent of the CPUs' time
    #[arg(long, value_name = "PERCENT", default_value_t = Throttling::default().initial_percent, requires = "auto_converge", value_parser = value_parser!(u8).range(1..=i64::from(MOST_PERCENT)))]
    pub(crate) auto_converge_initial: u8,

    /// What each later step of --auto-converge adds at least, in percent of the CPUs' time
    #[arg(long, value_name = "PERCENT", default_value_t = Throttling::default().increment_percent, requires = "auto_converge", value_parser = value_parser!(u8).range(1..=i64::from(MOST_PERCENT)))]
    pub(crate) auto_converge_increment: u8,

    /// Leave the source's QEMU stopped after the move instead of ending it
    #[arg(long)]
    pub(crate) keep_source: bool,

    /// Show progress: a bar on a terminal, else lines
    #[arg(long, short)]
    pub(crate) verbose: bool,

    #[command(flatten)]
    pub(crate) common: Common,
}

/// The values of `--compression`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Packing {
    Auto,
    None,
    Lz4,
    Zstd,
}

impl From<Packing> for Compression {
    fn from(packing: Packing) -> Self {
        match packing {
            Packing::Auto => Self::Auto,
            Packing::None => Self::None,
            Packing::Lz4 => Self::Lz4,
            Packing::Zstd => Self::Zstd,
        }
    }
}

/// The values of `--within-host`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Sharing {
    Auto,
    Never,
}

impl From<Sharing> for WithinHost {
    fn from(sharing: Sharing) -> Self {
        match sharing {
            Sharing::Auto => Self::Auto,
            Sharing::Never => Self::Never,
        }
    }
}

impl Migrate {
    pub(crate) fn lanes(&self) -> LanePlan {
        let asked = self.parallel_connections.and_then(NonZeroU16::new);
        asked.map_or_else(
            || {
                let cores = thread::available_parallelism().map_or(1, usize::from);
                let cores = u16::try_from(cores).ok().and_then(NonZeroU16::new);
                LanePlan::for_cores(cores.unwrap_or(NonZeroU16::MAX))
            },
            LanePlan::Fixed,
        )
    }

    pub(crate) fn postcopy(&self) -> Postcopy {
        if self.postcopy_now {
            Postcopy::Now
        } else if self.postcopy_after_precopy {
            Postcopy::AfterPrecopy
        } else if self.postcopy || self.timeout_postcopy {
            Postcopy::Allowed
        } else {
            Postcopy::Never
        }
    }

    pub(crate) fn at_timeout(&self) -> AtTimeout {
        if self.timeout_postcopy {
            AtTimeout::Postcopy
        } else {
            AtTimeout::Suspend
        }
    }

    pub(crate) fn downtime_limit(&self) -> Duration {
        Duration::from_millis(self.max_downtime)
    }

    pub(crate) fn throttling(&self) -> Option<Throttling> {
        self.auto_converge.then_some(Throttling {
            initial_percent: self.auto_converge_initial,
            increment_percent: self.auto_converge_increment,
        })
    }
}

#[derive(Debug, clap::Args)]
#[command(after_help = EXIT_CODES)]
pub(crate) struct Receive {
    /// QMP socket of the waiting QEMU, started with -incoming defer and the source's devices: a path
    #[arg(long, value_name = "SOCKET")]
    pub(crate) qmp: ferry_qmp::Address,

    /// Where to wait for the source: ADDR:PORT; port 0 picks a free one
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:0")]
    pub(crate) listen: String,

    #[command(flatten)]
    pub(crate) common: Common,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Common {
    /// Print one JSON object at the end
    #[arg(long)]
    pub(crate) json: bool,

    /// Allow an address that is not loopback, although everything travels in plain text
    #[arg(long)]
    pub(crate) insecure: bool,

    #[command(flatten)]
    pub(crate) state: StateDir,
}

#[derive(Debug, clap::Args)]
pub(crate) struct StateDir {
    /// Where journals and control sockets are kept; it must be the same for every migration of a QEMU
    #[arg(long, value_name = "FOLDER", env = "FERRY_STATE_DIR")]
    pub(crate) state_dir: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
#[command(after_help = EXIT_CODES)]
pub(crate) struct Resume {
    /// The job's name: qemu-PID-START, as the engine that died told it and its journal is named
    #[arg(value_name = "JOB")]
    pub(crate) job: JobName,

    #[command(flatten)]
    pub(crate) common: Common,
}

/// Which migration is meant.
#[derive(Debug, clap::Args)]
pub(crate) struct Which {
    /// The job's name, as `ferry jobs` lists it; needed where several run
    #[arg(value_name = "JOB", conflicts_with = "qmp")]
    pub(crate) job: Option<JobName>,

    /// In place of a name the QMP socket of the QEMU whose guest moves
    #[arg(long, value_name = "SOCKET")]
    pub(crate) qmp: Option<ferry_qmp::Address>,

    #[command(flatten)]
    pub(crate) state: StateDir,
}

#[derive(Debug, clap::Args)]
#[command(after_help = ORDER_EXIT_CODES)]
pub(crate) struct Jobs {
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,

    #[command(flatten)]
    pub(crate) state: StateDir,
}

#[derive(Debug, clap::Args)]
#[command(after_help = ORDER_EXIT_CODES)]
pub(crate) struct Jobinfo {
    /// Print one JSON object; with --watch one a second
    #[arg(long)]
    pub(crate) json: bool,

    /// Tell it again every second until the migration is over
    #[arg(long)]
    pub(crate) watch: bool,

    #[command(flatten)]
    pub(crate) which: Which,
}

#[derive(Debug, clap::Args)]
#[command(after_help = ORDER_EXIT_CODES, allow_missing_positional = true)]
pub(crate) struct Setspeed {
    #[command(flatten)]
    pub(crate) which: Which,

    /// At most so many MiB a second on the link while RAM is copied, or `unlimited`
    #[arg(value_name = "MIB_PER_S", value_parser = speed, required = true)]
    pub(crate) speed: Speed,
}

#[derive(Debug, clap::Args)]
#[command(after_help = ORDER_EXIT_CODES, allow_missing_positional = true)]
pub(crate) struct Setmaxdowntime {
    #[command(flatten)]
    pub(crate) which: Which,

    /// Longest blackout that is wanted, in ms; it counts from the end of the round that is under way
    #[arg(value_name = "MS", value_parser = value_parser!(u64).range(..=MAX_DOWNTIME_MS), required = true)]
    pub(crate) ms: u64,
}

#[derive(Debug, clap::Args)]
#[command(after_help = ORDER_EXIT_CODES)]
pub(crate) struct PostcopyNow {
    #[command(flatten)]
    pub(crate) which: Which,
}

#[derive(Debug, clap::Args)]
#[command(after_help = ORDER_EXIT_CODES)]
pub(crate) struct Jobabort {
    #[command(flatten)]
    pub(crate) which: Which,
}

/// A limit in MiB a second.
fn speed(text: &str) -> Result<Speed, &'static str> {
    if text == "unlimited" {
        return Ok(Speed::Unlimited);
    }
    let mib: NonZeroU64 = text
        .parse()
        .map_err(|_| "a speed is a whole number of MiB a second, at least 1, or `unlimited`")?;
    Ok(Speed::BytesPerS(mib.saturating_mul(MIB)))
}

/// 1 MiB in bytes.
const MIB: NonZeroU64 = NonZeroU64::new(1 << 20).expect("a MiB is not zero");

/// `ferry://HOST:PORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TargetUri {
    /// `HOST:PORT`.
    pub(crate) authority: String,
}

impl FromStr for TargetUri {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let form = "a target is written ferry://HOST:PORT";
        let authority = text.strip_prefix("ferry://").ok_or(form)?;
        let (host, port) = authority.rsplit_once(':').ok_or(form)?;
        let bare_v6 = host.contains(':') && !host.starts_with('[');
        if host.is_empty() || bare_v6 || port.parse::<u16>().is_err() {
            return Err(form);
        }
        Ok(Self {
            authority: authority.to_owned(),
        })
    }
}

impl fmt::Display for TargetUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ferry://{}", self.authority)
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_parser_is_sound() {
        Args::command().debug_assert();
    }

    #[test]
    fn a_job_may_be_left_out() {
        let parse = |args: &[&str]| {
            let all = ["ferry"].iter().chain(args);
            Args::try_parse_from(all).map(|args| args.command)
        };
        let Ok(Command::Setspeed(alone)) = parse(&["setspeed", "7"]) else {
            panic!("a speed alone is enough")
        };
        assert!(alone.which.job.is_none());
        let seven = NonZeroU64::new(7 << 20).unwrap();
        assert_eq!(alone.speed, Speed::BytesPerS(seven));
        let Ok(Command::Setspeed(named)) = parse(&["setspeed", "qemu-1-2", "unlimited"]) else {
            panic!("a job is named first")
        };
        assert_eq!(named.which.job.unwrap().to_string(), "qemu-1-2");
        assert_eq!(named.speed, Speed::Unlimited);
        let Ok(Command::Setmaxdowntime(found)) = parse(&["setmaxdowntime", "--qmp=/q", "50"])
        else {
            panic!("a job is found by its socket")
        };
        assert_eq!((found.which.job, found.ms), (None, 50));
        for wrong in [
            &["setspeed"][..],
            &["setspeed", "0"],
            &["setspeed", "-1"],
            &["setspeed", "fast"],
            &["setspeed", "../x", "1"],
            &["setspeed", "--qmp=/q", "a-job", "1"],
            &["setmaxdowntime", "86400001"],
            &["jobinfo", "a/b"],
        ] {
            parse(wrong).unwrap_err();
        }
    }

    #[test]
    fn ways_to_postcopy() {
        let parse = |args: &[&str]| {
            let all = ["ferry", "migrate", "--qmp=/q", "ferry://a:1"];
            let all = all.iter().chain(args);
            Args::try_parse_from(all).map(|args| match args.command {
                Command::Migrate(migrate) => (migrate.postcopy(), migrate.at_timeout()),
                other => panic!("{other:?}"),
            })
        };
        let suspend = AtTimeout::Suspend;
        for (args, expected) in [
            (&["--live"][..], (Postcopy::Never, suspend)),
            (&["--live", "--postcopy"], (Postcopy::Allowed, suspend)),
            (
                &["--live", "--postcopy", "--postcopy-after-precopy"],
                (Postcopy::AfterPrecopy, suspend),
            ),
            (&["--live", "--postcopy-now"], (Postcopy::Now, suspend)),
            (
                &["--live", "--timeout=3", "--timeout-postcopy"],
                (Postcopy::Allowed, AtTimeout::Postcopy),
            ),
            (
                &["--timeout=3", "--timeout-suspend"],
                (Postcopy::Never, suspend),
            ),
        ] {
            assert_eq!(parse(args).unwrap(), expected, "{args:?}");
        }
        for wrong in [
            &["--postcopy"][..],
            &["--postcopy-now"],
            &["--live", "--postcopy-now", "--postcopy-after-precopy"],
            &["--live", "--timeout-postcopy"],
            &["--timeout=3", "--timeout-postcopy"],
            &["--live", "--timeout-suspend"],
        ] {
            parse(wrong).unwrap_err();
        }
    }

    #[test]
    fn only_a_live_guest_is_slowed() {
        let parse = |args: &[&str]| {
            let all = ["ferry", "migrate", "--qmp=/q", "ferry://a:1"];
            match Args::try_parse_from(all.iter().chain(args))?.command {
                Command::Migrate(migrate) => Ok(migrate.throttling()),
                command => panic!("{command:?}"),
            }
        };
        let both = ["--live", "--auto-converge"];
        assert_eq!(parse(&[]).unwrap(), None);
        assert_eq!(parse(&both).unwrap(), Some(Throttling::default()));
        let steps = ["--auto-converge-initial=50", "--auto-converge-increment=99"];
        let found = parse(&[&both[..], &steps].concat()).unwrap().unwrap();
        assert_eq!((found.initial_percent, found.increment_percent), (50, 99));
        for wrong in [
            &["--auto-converge"][..],
            &["--live", "--auto-converge-initial=20"],
            &["--live", "--auto-converge-increment=10"],
            &["--live", "--auto-converge", "--auto-converge-initial=0"],
            &["--live", "--auto-converge", "--auto-converge-increment=100"],
        ] {
            parse(wrong)
                .map_err(|error: clap::Error| error)
                .unwrap_err();
        }
    }

    #[test]
    fn targets_are_checked() {
        for good in [
            "ferry://localhost:4444",
            "ferry://[::1]:1",
            "ferry://10.0.0.1:65535",
        ] {
            assert_eq!(good.parse::<TargetUri>().unwrap().to_string(), good);
        }
        for bad in [
            "tcp://a:1",
            "ferry://a",
            "ferry://:1",
            "ferry://a:b",
            "ferry://a:70000",
            "ferry://::1:1",
        ] {
            bad.parse::<TargetUri>().unwrap_err();
        }
    }
}
