//! What the child does.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};

use ferry_engine::core::layout::PAGE_SIZE;
use memmap2::{MmapOptions, MmapRaw};
use nix::libc;

use super::{MARK, RAM_VARIABLE, patience};

/// The test harness runs every test on a thread of its own, but system calls are injected into the
/// main thread: so the child takes its orders there, before the harness begins.
#[used]
// SAFETY: the C library calls what this section lists, with arguments that need not be taken, on the
// main thread, when it has set itself up.
#[unsafe(link_section = ".init_array")]
static BEFORE_MAIN: extern "C" fn() = before_main;

extern "C" fn before_main() {
    if let Some(path) = std::env::var_os(RAM_VARIABLE) {
        obey_all(path);
        std::process::exit(0);
    }
}

fn obey_all(path: OsString) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let length = usize::try_from(file.metadata().unwrap().len()).unwrap();
    let memory = MmapOptions::new().len(length).map_raw(&file).unwrap();
    let mut guest = Guest {
        memory: Arc::new(Memory(memory)),
        file: Some(file),
        writers: None,
    };
    patience::count_signals();
    say("ready");
    for line in std::io::stdin().lock().lines() {
        let line = line.unwrap();
        let mut words = line.split(' ');
        let order = words.next().unwrap();
        let numbers: Vec<u64> = words.map(|word| word.parse().unwrap()).collect();
        say(&guest.obey(order, &numbers));
    }
}

pub(crate) fn say(words: &str) {
    let mut output = std::io::stdout().lock();
    writeln!(output, "{MARK}{words}").unwrap();
    output.flush().unwrap();
}

struct Guest {
    memory: Arc<Memory>,
    file: Option<File>,
    writers: Option<Writers>,
}

impl Guest {
    fn obey(&mut self, order: &str, numbers: &[u64]) -> String {
        match (order, numbers) {
            // Writes a value into each of the pages.
            ("write", [value, pages @ ..]) => {
                for page in pages {
                    self.memory.word(*page).store(*value, Ordering::Relaxed);
                }
                "written".into()
            }
            ("read", [page]) => self.memory.word(*page).load(Ordering::Relaxed).to_string(),
            // Closes the file behind the RAM, which stays mapped.
            ("close", []) => {
                self.file = None;
                "closed".into()
            }
            // Lets this many threads write all over the RAM until told to halt.
            ("run", [threads]) => {
                self.writers = Some(Writers::start(&self.memory, *threads));
                "running".into()
            }
            ("halt", []) => self.writers.take().map_or(0, Writers::halt).to_string(),
            // Waits for the next order in one kind of system call and tells what befell it.
            ("wait", [kind]) => patience::wait(*kind),
            // Sends itself this many queued signals, and an alarm every millisecond.
            ("storm", [signals]) => patience::storm(*signals).to_owned(),
            ("signals", []) => patience::signals(),
            ("nobody", []) => {
                become_nobody();
                "nobody".into()
            }
            other => panic!("no such order: {other:?}"),
        }
    }
}

/// Gives up root and every capability, for the calling thread alone.
pub(crate) fn become_nobody() {
    const NOBODY: libc::c_long = 65534;
    // SAFETY: takes three integers. Not the C library's function, which changes every thread.
    let result = unsafe { libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY) };
    assert_eq!(result, 0);
}

/// Mapped RAM, used one atomic word a page.
struct Memory(MmapRaw);

impl Memory {
    fn pages(&self) -> u64 {
        (self.0.len() / PAGE_SIZE) as u64
    }

    /// The first word of a page.
    fn word(&self, page: u64) -> &AtomicU64 {
        let offset = usize::try_from(page).unwrap() * PAGE_SIZE;
        assert!(offset < self.0.len());
        // SAFETY: within the mapping, by the check above.
        let place = unsafe { self.0.as_mut_ptr().add(offset) };
        // SAFETY: aligned to a page, mapped as long as `self`, and only ever used as this atomic.
        unsafe { AtomicU64::from_ptr(place.cast()) }
    }
}

/// Threads that write a higher number into a random page each time.
struct Writers {
    halt: Arc<AtomicBool>,
    threads: Vec<JoinHandle<u64>>,
}

impl Writers {
    fn start(memory: &Arc<Memory>, count: u64) -> Self {
        let halt = Arc::new(AtomicBool::new(false));
        let threads = (0..count)
            .map(|seed| {
                let (memory, halt) = (Arc::clone(memory), Arc::clone(&halt));
                thread::spawn(move || write_all_over(&memory, &halt, seed + 1))
            })
            .collect();
        Self { halt, threads }
    }

    /// Ends them and tells how many writes they made.
    fn halt(self) -> u64 {
        self.halt.store(true, Ordering::Relaxed);
        self.threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .sum()
    }
}

fn write_all_over(memory: &Memory, halt: &AtomicBool, seed: u64) -> u64 {
    let mut random = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let mut writes = 0;
    while !halt.load(Ordering::Relaxed) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        memory
            .word(random % memory.pages())
            .fetch_add(1, Ordering::Relaxed);
        writes += 1;
    }
    writes
}
