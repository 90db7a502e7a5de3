//! Runs a comparison and tells it.

mod args;

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use args::{Args, Told};
use clap::Parser as _;
use ferry_benches::baseline::{self, Baseline, Change, Now};
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
    // Before anything is measured, or written: --save-baseline may name the same file.
    let then: Option<Baseline> = args.told.compare.as_deref().map(read).transpose()?;
    let figures: Figures = if let Some(path) = &args.what.from {
        read(path)?
    } else {
        if let Some(then) = &then {
            then.compares_with(plan.quick)?;
        }
        let _turn = Turn::take()?;
        plan.measure(|figures| write(&args.told, figures))?
    };
    write(&args.told, &figures)?;
    if let Some(path) = &args.told.save_baseline {
        let saved = Baseline::of(&figures).save(path);
        saved.map_err(|error| format!("{}: {error}", path.display()))?;
    }
    print!("{}", table::of(&figures));
    let rows = hold::rows(&figures);
    if args.told.check || rows.iter().any(|row| row.measured.is_ok()) {
        print!("{}", hold::table(&rows));
    }
    let mut wrong = if args.told.check {
        hold::missed(&figures)
    } else if args.what.from.is_none() {
        hold::broken(&figures)
    } else {
        Vec::new()
    };
    if let Some(then) = &then {
        wrong.extend(worse(then, &figures)?);
    }
    if wrong.is_empty() {
        return Ok(());
    }
    Err(wrong.join("; ").into())
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
    Ok(())
}

/// What has got worse; shows the whole comparison.
fn worse(then: &Baseline, figures: &Figures) -> Result<Vec<String>, Box<dyn Error>> {
    let changes = then.compare(figures)?;
    print!("{}", baseline::table(&changes));
    let not_asked = then.not_asked(figures);
    if !not_asked.is_empty() {
        println!("not asked for, not compared: {}", not_asked.join(", "));
    }
    let worse = changes.iter().filter(|change| change.is_regression());
    let told = |change: &Change| match change.now {
        Now::NotMeasured => format!("in the baseline, no longer measured: {}", change.what),
        _ => format!("worse than the baseline: {}", change.what),
    };
    Ok(worse.map(told).collect())
}
