//! The Linux guest of the testbed: a kernel and this one program as its init.
//!
//! A migration that loses, delays or mixes up a single page must be noticed from inside, because
//! nobody outside can know what the guest wrote last. So the guest fills memory, rewrites pages at a
//! set rate, and before every rewrite, and all the time in between, compares every byte with what it
//! must be. What it finds it counts into a status page that the host reads from outside.
//!
//! `build.rs` compiles this statically into the library; the kernel's command line says what to do
//! (`config.rs`), and lines on the serial console ask for the rest: `plant`, `rate N`, `sweep 1` and
//! `sweep 0`, `poweroff`, `reboot`, `panic`.

#![allow(
    clippy::cast_possible_truncation,
    reason = "x86-64 alone: a usize holds every u64"
)]

mod config;
mod content;
mod disk;
#[allow(unreachable_pub, reason = "the library compiles the same file")]
mod fields;
mod memory;
mod status;
mod sys;

use std::error::Error;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::SystemTime;

use config::{Config, Sweep};
use content::Writer;
use fields::Field;
use memory::{Dials, Worker};
use status::Status;
use sys::Power;

/// Bytes in a page of the guest's memory.
const PAGE_SIZE: usize = 4096;

/// Words in a page.
const PAGE_WORDS: usize = PAGE_SIZE / size_of::<u64>();

/// Says a line on the serial console, where the tests read it.
macro_rules! say {
    ($($what:tt)*) => { println!("ferry-guest: {}", format_args!($($what)*)) };
}
use say;

fn main() {
    if std::process::id() != 1 {
        eprintln!("ferry-guest is the init of a test guest and does nothing elsewhere");
        std::process::exit(2);
    }
    if let Err(error) = boot() {
        say!("FAILED: {error}");
    }
    // An init that ends is a kernel panic: the console says it all, stay.
    loop {
        thread::park();
    }
}

fn boot() -> Result<(), Box<dyn Error>> {
    mount_all()?;
    load_modules()?;
    let config = Config::parse(&fs::read_to_string("/proc/cmdline")?)?;
    let pages = config.mib * (1 << 20) / PAGE_SIZE;
    // The host knows where the status page is: the kernel must not move it.
    fs::write("/proc/sys/vm/compact_unevictable_allowed", "0")?;
    sys::lock_memory()?;
    let boot_id = boot_id()?;
    let status = Status::publish(boot_id, now_ns()?, pages as u64)?;
    say!("filling {} MiB", config.mib);
    let writer = Writer::new(config.content, boot_id);
    let workers = workers(&config, pages, &writer, status)?;
    let dials = Arc::new(Dials {
        rate: AtomicU64::new(config.rate),
        sweep: AtomicBool::new(config.sweep == Sweep::On),
        plants: AtomicUsize::new(0),
    });
    if config.disk {
        thread::spawn(move || {
            if let Err(error) = disk::run(Path::new("/dev/vda"), &writer, status) {
                status.add(Field::DiskErrors, 1);
                say!("disk error: {error}");
            }
        });
    }
    for worker in workers {
        let dials = Arc::clone(&dials);
        thread::spawn(move || worker.run(&dials));
    }
    status.set(Field::Filled, 1);
    say!("running");
    serve_console(&dials)?;
    Ok(())
}

fn mount_all() -> io::Result<()> {
    for (kind, target) in [
        (c"devtmpfs", c"/dev"),
        (c"proc", c"/proc"),
        (c"sysfs", c"/sys"),
    ] {
        sys::mount_fs(kind, target)?;
    }
    Ok(())
}

/// Loads every module of the image. One that needs another is tried again after it.
fn load_modules() -> io::Result<()> {
    let names = fs::read_to_string("/modules/order")?;
    let mut left: Vec<_> = names.lines().collect();
    loop {
        let mut failed = Vec::new();
        for &name in &left {
            let file = File::open(format!("/modules/{name}.ko"))?;
            if let Err(error) = sys::load_module(&file) {
                failed.push((name, error));
            }
        }
        if failed.len() == left.len() {
            for (name, error) in failed {
                say!("module {name}: {error}");
            }
            return Ok(());
        }
        left = failed.into_iter().map(|(name, _)| name).collect();
    }
}

fn boot_id() -> Result<u64, Box<dyn Error>> {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let hex: String = text
        .chars()
        .filter(char::is_ascii_hexdigit)
        .take(16)
        .collect();
    Ok(u64::from_str_radix(&hex, 16)?)
}

fn now_ns() -> Result<u64, Box<dyn Error>> {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
    Ok(u64::try_from(since.as_nanos())?)
}

/// Shares the pages out and fills them, each worker in a thread of its own.
fn workers(
    config: &Config,
    pages: usize,
    writer: &Writer,
    status: Status,
) -> io::Result<Vec<Worker>> {
    let share = pages / config.workers;
    let pattern = config.pattern;
    let peers = config.workers as u64;
    let threads: Vec<_> = (0..config.workers)
        .map(|number| {
            let first = number * share;
            let count = if number + 1 == config.workers {
                pages - first
            } else {
                share
            };
            let writer = writer.clone();
            thread::spawn(move || {
                Worker::new((first as u64, count), writer, pattern, peers, status)
            })
        })
        .collect();
    threads
        .into_iter()
        .map(|thread| {
            thread
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("a worker panicked")))
        })
        .collect()
}

/// Obeys the lines that come over the serial console.
fn serve_console(dials: &Dials) -> io::Result<()> {
    for line in BufReader::new(File::open("/dev/ttyS0")?).lines() {
        let line = line?;
        let mut words = line.split_whitespace();
        match (words.next(), words.next().map(str::parse)) {
            (Some("plant"), None) => {
                dials.plants.fetch_add(1, Ordering::Relaxed);
            }
            (Some("rate"), Some(Ok(rate))) => {
                dials.rate.store(rate, Ordering::Relaxed);
                say!("rate {rate}");
            }
            (Some("sweep"), Some(Ok(on))) => {
                dials.sweep.store(on != 0, Ordering::Relaxed);
                say!("sweep {on}");
            }
            (Some("poweroff"), None) => return Err(sys::power(Power::Off)),
            (Some("reboot"), None) => return Err(sys::power(Power::Reset)),
            (Some("panic"), None) => fs::write("/proc/sysrq-trigger", "c")?,
            (None, _) => {}
            _ => say!("what is {line:?}?"),
        }
    }
    Ok(())
}
