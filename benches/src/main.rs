//! Runs a comparison and tells it.

mod args;

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use args::{Args, Told};
use clap::Parser as _;
use ferry_benches::baseline::{self, Baseline};
use ferry_benches::figures::Figures;
use ferry_benches::{agent, csv, hold, html, table};
use ferry_testbed::Turn;
use serde::de::DeserializeOwned;

fn main() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    if args.serve {
        return Ok(agent::serve()?);
    }
    let plan = args.plan()?;
    if args.list {
        for case in &plan.cases {
            println!("{:<12} {}", case.name, case.what);
        }
        return Ok(());
    }
    let figures = if let Some(path) = &args.what.from {
        read(path)?
    } else {
        let _turn = Turn::take()?;
        plan.measure(|figures| write(&args.told, figures))?
    };
    write(&args.told, &figures)?;
    print!("{}", table::of(&figures));
    let rows = hold::rows(&figures);
    if rows.iter().any(|row| row.measured.is_some()) {
        print!("{}", hold::table(&rows));
    }
    judge(&args.told, &figures)
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<T, Box<dyn Error>> {
    let text = fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let value = serde_json::from_slice(&text);
    Ok(value.map_err(|error| format!("{}: {error}", path.display()))?)
}

fn write(told: &Told, figures: &Figures) -> Result<(), Box<dyn Error>> {
    let save = |path: &Option<PathBuf>, text: &dyn Fn() -> serde_json::Result<String>| {
        let Some(path) = path else {
            return Ok(());
        };
        let failed = |error: &dyn Error| format!("{}: {error}", path.display());
        let text = text().map_err(|error| failed(&error))?;
        fs::write(path, text).map_err(|error| failed(&error))
    };
    save(&told.json, &|| serde_json::to_string_pretty(figures))?;
    save(&told.csv, &|| Ok(csv::of(figures)))?;
    save(&told.html, &|| Ok(html::page(figures)))?;
    save(&told.baseline, &|| {
        serde_json::to_string_pretty(&Baseline::of(figures))
    })?;
    Ok(())
}

/// What the exit code tells.
fn judge(told: &Told, figures: &Figures) -> Result<(), Box<dyn Error>> {
    let mut wrong = Vec::new();
    if told.check {
        wrong.extend(hold::missed(figures));
    }
    if let Some(path) = &told.compare {
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
