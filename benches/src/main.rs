//! Runs a comparison and tells it.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use clap::Parser;
use ferry_benches::baseline::{self, Baseline};
use ferry_benches::case::Case;
use ferry_benches::figures::Figures;
use ferry_benches::matrix::Plan;
use ferry_benches::peer::Peer;
use ferry_benches::{csv, hold, html, table};
use ferry_testbed::Turn;
use serde::de::DeserializeOwned;

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
    /// Write a page with charts to this file
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Measure nothing: take the figures that an earlier run wrote with --json
    #[arg(long, value_name = "FILE", conflicts_with_all = ["quick", "cases", "peers", "runs"])]
    from: Option<PathBuf>,
    /// Fail when ferry misses a figure that must hold; of a quick run, only when a page is bad or a
    /// move fails
    #[arg(long)]
    check: bool,
    /// Fail when ferry has got worse than in this baseline
    #[arg(long, value_name = "FILE")]
    compare: Option<PathBuf>,
    /// Write a baseline to this file
    #[arg(long, value_name = "FILE")]
    baseline: Option<PathBuf>,
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
    let figures = if let Some(path) = &args.from {
        read(path)?
    } else {
        let _turn = Turn::take()?;
        plan.measure()?
    };
    write(&args, &figures)?;
    print!("{}", table::of(&figures));
    let rows = hold::rows(&figures);
    print!("{}", hold::table(&rows));
    judge(&args, &figures)
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<T, Box<dyn Error>> {
    let text = fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let value = serde_json::from_slice(&text);
    Ok(value.map_err(|error| format!("{}: {error}", path.display()))?)
}

fn write(args: &Args, figures: &Figures) -> Result<(), Box<dyn Error>> {
    let save = |path: &Option<PathBuf>, text: &dyn Fn() -> serde_json::Result<String>| {
        let Some(path) = path else {
            return Ok(());
        };
        let told = |error: &dyn Error| format!("{}: {error}", path.display());
        let text = text().map_err(|error| told(&error))?;
        fs::write(path, text).map_err(|error| told(&error))
    };
    save(&args.json, &|| serde_json::to_string_pretty(figures))?;
    save(&args.csv, &|| Ok(csv::of(figures)))?;
    save(&args.html, &|| Ok(html::page(figures)))?;
    save(&args.baseline, &|| {
        serde_json::to_string_pretty(&Baseline::of(figures))
    })?;
    Ok(())
}

/// What the exit code tells.
fn judge(args: &Args, figures: &Figures) -> Result<(), Box<dyn Error>> {
    let mut wrong = Vec::new();
    if args.check {
        wrong.extend(hold::missed(figures));
    }
    if let Some(path) = &args.compare {
        let then: Baseline = read(path)?;
        let changes = then.compare(&Baseline::of(figures))?;
        print!("{}", baseline::table(&changes));
        let worse = changes.iter().filter(|change| change.is_regression());
        wrong.extend(worse.map(|change| format!("worse than the baseline: {}", change.what)));
    }
    if wrong.is_empty() {
        return Ok(());
    }
    Err(wrong.join("; ").into())
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
