//! Runs a comparison and prints it.

use std::path::PathBuf;

use clap::Parser;
use ferry_benches::course::{Conditions, Course, Equipment};
use ferry_benches::peer::Peer;
use ferry_benches::report::{Comparison, Series};
use ferry_testbed::{TestbedError, Turn};

/// Moves one guest from QEMU to QEMU by each way in turn, and compares what the guest saw.
#[derive(Debug, Parser)]
struct Args {
    /// Moves by each way
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Guest RAM, in MiB
    #[arg(long, default_value_t = 2048)]
    guest_mib: u64,
    /// Of that, filled with random bytes, in MiB
    #[arg(long, default_value_t = 1024)]
    data_mib: u64,
    /// Pages that the guest rewrites a second
    #[arg(long, default_value_t = 0)]
    writes: u64,
    /// Downtime limit of every way, in ms
    #[arg(long, default_value_t = 100)]
    max_downtime: u64,
    /// Leave the target's RAM to be allocated as it is touched
    #[arg(long)]
    on_demand: bool,
    /// The guest's CPUs
    #[arg(long, default_value_t = 1)]
    cpus: u32,
    /// Give the machine a network card, a disk in use, a tablet, a screen
    #[arg(long)]
    devices: bool,
    /// The ways to compare: ferry, precopy, multifd:CHANNELS
    #[arg(long, value_delimiter = ',', default_value = "ferry,precopy")]
    peers: Vec<Peer>,
    /// Fail when ferry loses a page, its median total is above that of the others' best, or its median
    /// blackout is above so many ms
    #[arg(long, value_name = "MS")]
    check: Option<f64>,
    /// Write every run to this file, as JSON
    #[arg(long)]
    json: Option<PathBuf>,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    let comparison = compare(&args)?;
    print!("{}", comparison.table());
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_vec_pretty(&comparison)?)?;
    }
    match args
        .check
        .and_then(|limit_ms| comparison.falls_short(limit_ms))
    {
        Some(why) => Err(why.into()),
        None => Ok(()),
    }
}

fn compare(args: &Args) -> Result<Comparison, TestbedError> {
    let _turn = Turn::take()?;
    let conditions = Conditions {
        guest_mib: args.guest_mib,
        data_mib: args.data_mib,
        writes_per_s: args.writes,
        downtime_limit_ms: args.max_downtime,
        preallocated: !args.on_demand,
        cpus: args.cpus,
        equipment: if args.devices {
            Equipment::Full
        } else {
            Equipment::Bare
        },
    };
    let named = |peer: &Peer| Series {
        peer: peer.to_string(),
        runs: Vec::new(),
    };
    let mut series: Vec<Series> = args.peers.iter().map(named).collect();
    let mut course = Course::begin(conditions)?;
    for run in 1..=args.runs {
        for (peer, series) in args.peers.iter().zip(&mut series) {
            let measured = course.carry(*peer)?;
            eprintln!(
                "run {run} of {}, {peer}: total {:.0} ms, blackout {:.1} ms",
                args.runs, measured.total_ms, measured.blackout_ms
            );
            series.runs.push(measured);
        }
    }
    Ok(Comparison { conditions, series })
}
