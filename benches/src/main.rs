//! Runs a comparison and tells it.

use std::error::Error;
use std::fs;
use std::path::PathBuf;

use clap::Parser;
use ferry_benches::case::Case;
use ferry_benches::matrix::Plan;
use ferry_benches::peer::Peer;
use ferry_benches::{csv, table};
use ferry_testbed::Turn;

/// Moves guests from QEMU to QEMU, by Ferry and by QEMU's own migration in turn, and compares what the
/// guests saw.
#[derive(Debug, Parser)]
#[command(name = "benches/run")]
struct Args {
    /// A few small cases and ways, for a few minutes
    #[arg(long)]
    quick: bool,
    /// Only these cases
    #[arg(long = "case", value_name = "NAME", value_delimiter = ',')]
    cases: Vec<String>,
    /// Only these ways: ferry[:LANES], precopy, multifd:CHANNELS[:zstd], switchover
    #[arg(long, value_delimiter = ',')]
    peers: Option<Vec<Peer>>,
    /// Moves by each way; 5 without, 2 with --quick
    #[arg(long)]
    runs: Option<usize>,
    /// List the cases
    #[arg(long)]
    list: bool,
    /// Write every move to this file, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write every move to this file, as comma-separated values
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
}

/// Moves by each way.
const RUNS: usize = 5;
const QUICK_RUNS: usize = 2;

/// The ways of a short run.
const QUICK_PEERS: [Peer; 4] = [
    Peer::Ferry,
    Peer::Precopy,
    Peer::Multifd {
        channels: 2,
        compression: ferry_benches::peer::Compression::Zstd,
    },
    Peer::Switchover,
];

fn main() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    let plan = plan(&args)?;
    if args.list {
        for case in &plan.cases {
            println!("{:<12} {}", case.name, case.what);
        }
        return Ok(());
    }
    let _turn = Turn::take()?;
    let figures = plan.measure()?;
    print!("{}", table::of(&figures));
    if let Some(path) = &args.json {
        fs::write(path, serde_json::to_vec_pretty(&figures)?)?;
    }
    if let Some(path) = &args.csv {
        fs::write(path, csv::of(&figures))?;
    }
    Ok(())
}

fn plan(args: &Args) -> Result<Plan, String> {
    let all = if args.quick {
        Case::quick()
    } else {
        Case::all()
    };
    let named = |name: &String| {
        let case = all.iter().find(|case| case.name == name).copied();
        case.ok_or_else(|| format!("there is no case {name:?}; --list tells which there are"))
    };
    let cases = match &args.cases[..] {
        [] => all.clone(),
        names => names.iter().map(named).collect::<Result<_, _>>()?,
    };
    let quick_peers = args.quick.then(|| QUICK_PEERS.to_vec());
    let runs = if args.quick { QUICK_RUNS } else { RUNS };
    Ok(Plan {
        cases,
        quick: args.quick,
        peers: args.peers.clone().or(quick_peers),
        runs: args.runs.unwrap_or(runs),
    })
}
