//! The arguments, and the plan that they make.

use std::error::Error;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use ferry_benches::case::{Case, Wire};
use ferry_benches::guest::{Own, Verifies};
use ferry_benches::hold;
use ferry_benches::hosts::There;
use ferry_benches::matrix::Plan;
use ferry_benches::peer::{Compression, Peer};

/// Moves by each way.
const RUNS: usize = 5;
const QUICK_RUNS: usize = 2;

/// The ways of a short run.
const QUICK_PEERS: [Peer; 4] = [
    Peer::Ferry,
    Peer::Precopy,
    Peer::Multifd {
        channels: 2,
        compression: Compression::Zstd,
    },
    Peer::Switchover,
];

/// Moves guests from QEMU to QEMU, by Ferry and by QEMU's own migration in turn, and compares what the
/// guests saw.
#[derive(Debug, Parser)]
#[command(name = "benches/run")]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) what: What,
    #[command(flatten)]
    pub(crate) there: Target,
    #[command(flatten)]
    pub(crate) own: OwnGuest,
    #[command(flatten)]
    pub(crate) told: Told,
    /// List the cases
    #[arg(long)]
    pub(crate) list: bool,
    /// Serve a run on another host: what --target-host calls
    #[arg(long, hide = true)]
    pub(crate) serve: bool,
}

/// What to compare.
#[derive(Debug, clap::Args)]
pub(crate) struct What {
    /// A few small cases and ways, for a few minutes
    #[arg(long)]
    quick: bool,
    /// Only these cases
    #[arg(long = "case", value_name = "NAME", value_delimiter = ',')]
    cases: Vec<String>,
    /// Only these ways: ferry[:LANES], ferry:postcopy, ferry:hybrid, precopy, postcopy, hybrid,
    /// multifd:CHANNELS[:zstd], switchover
    #[arg(long, value_delimiter = ',')]
    peers: Option<Vec<Peer>>,
    /// Moves by each way; 5 without, 2 with --quick
    #[arg(long)]
    runs: Option<NonZeroUsize>,
    /// On one machine: have guests verify their memory only after Ferry's moves, to save time
    #[arg(long)]
    trust_qemu: bool,
    /// Measure nothing: take the figures that an earlier run wrote with --json
    #[arg(long, value_name = "FILE", conflicts_with_all = ["quick", "cases", "peers", "runs"])]
    pub(crate) from: Option<PathBuf>,
}

/// Where to.
#[derive(Debug, clap::Args)]
pub(crate) struct Target {
    /// Move to this host, reached over ssh, instead of within this machine: user@host
    #[arg(long = "target-host", value_name = "HOST")]
    host: Option<String>,
    /// ssh with its options
    #[arg(long, value_name = "COMMAND", default_value = "ssh -o BatchMode=yes")]
    ssh: String,
    /// What is this command there; by default, where it is here
    #[arg(long = "target-run", value_name = "COMMAND")]
    run: Option<String>,
    /// The target's IPv4 address for the move; by default, that of its name
    #[arg(long = "target-address", value_name = "ADDRESS")]
    address: Option<String>,
}

/// A guest of one's own.
#[derive(Debug, clap::Args)]
pub(crate) struct OwnGuest {
    /// Move a guest of your own that boots from this image: a copy, as its QEMU is killed in the end
    #[arg(long, value_name = "FILE")]
    image: Option<PathBuf>,
    /// Move a guest of your own with these arguments of QEMU, besides RAM and QMP
    #[arg(
        long = "qemu-args",
        value_name = "ARGUMENTS",
        allow_hyphen_values = true
    )]
    arguments: Option<String>,
    /// RAM of your own guest, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 2048)]
    guest_mib: u64,
    /// The downtime limit for your own guest, in ms
    #[arg(long, value_name = "MS", default_value_t = 100)]
    max_downtime: u64,
    /// Seconds that your own guest takes to boot and to come to its work
    #[arg(long, value_name = "S", default_value_t = 30)]
    settle: u64,
}

/// What to do with the figures.
#[derive(Debug, clap::Args)]
pub(crate) struct Told {
    /// Write every move to this file, as JSON
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Write every move to this file, as comma-separated values
    #[arg(long, value_name = "FILE")]
    pub(crate) csv: Option<PathBuf>,
    /// Write a page with charts to this file
    #[arg(long, value_name = "FILE")]
    pub(crate) html: Option<PathBuf>,
    /// Write this run's ratios to this file, for --compare
    #[arg(long, value_name = "FILE")]
    pub(crate) save_baseline: Option<PathBuf>,
    /// Fail when a figure that must hold of the cases run is missed or unknown; of a quick run, only
    /// when a page is bad or a move fails. Adds moves by ferry where 10 are needed
    #[arg(long)]
    pub(crate) check: bool,
    /// Fail when ferry has got worse than in this baseline, or a figure of it is no longer measured
    #[arg(long, value_name = "FILE")]
    pub(crate) compare: Option<PathBuf>,
}

impl Args {
    /// What is to be measured.
    pub(crate) fn plan(&self) -> Result<Plan, Box<dyn Error>> {
        let own = self.own.guest();
        let all = self.cases(own.is_some());
        let named = |name: &String| {
            let case = all.iter().find(|case| case.name == name).copied();
            case.ok_or_else(|| format!("there is no case {name:?}; --list tells which there are"))
        };
        let cases = match &self.what.cases[..] {
            [] => all.clone(),
            names => names.iter().map(named).collect::<Result<_, _>>()?,
        };
        let quick = self.what.quick;
        let quick_peers = quick.then(|| QUICK_PEERS.to_vec());
        let runs = if quick { QUICK_RUNS } else { RUNS };
        Ok(Plan {
            cases,
            quick,
            peers: self.what.peers.clone().or(quick_peers),
            runs: self.what.runs.map_or(runs, NonZeroUsize::get),
            least_ferry_moves: if self.told.check { hold::LONGEST_OF } else { 0 },
            there: self.there.find()?,
            own,
            verifies: if self.what.trust_qemu {
                Verifies::Ours
            } else {
                Verifies::All
            },
        })
    }

    fn cases(&self, is_own: bool) -> Vec<Case> {
        let wire = match self.there.host {
            Some(_) => Wire::Hosts,
            None => Wire::Loopback,
        };
        if is_own {
            return vec![Case::own(self.own.guest_mib, self.own.max_downtime, wire)];
        }
        let all = match wire {
            Wire::Hosts => Case::between_hosts(),
            _ => Case::all(),
        };
        if self.what.quick {
            Case::quick(&all)
        } else {
            all
        }
    }
}

impl Target {
    fn find(&self) -> Result<Option<There>, Box<dyn Error>> {
        let Some(host) = &self.host else {
            return Ok(None);
        };
        let here = concat!(env!("CARGO_MANIFEST_DIR"), "/run");
        let run = self.run.clone().unwrap_or_else(|| here.into());
        let address = self.address.as_deref();
        Ok(Some(There::new(host, &self.ssh, run, address)?))
    }
}

impl OwnGuest {
    fn guest(&self) -> Option<Own> {
        let is_own = self.image.is_some() || self.arguments.is_some();
        let words = self.arguments.as_deref().unwrap_or_default();
        is_own.then(|| Own {
            image: self.image.clone(),
            arguments: words.split_whitespace().map(str::to_owned).collect(),
            settle: Duration::from_secs(self.settle),
        })
    }
}
