//! What the child does.

use std::fs::File;
use std::io::{BufRead, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};

use ferry_engine::core::layout::PAGE_SIZE;
use memmap2::{MmapOptions, MmapRaw};

use super::{MARK, RAM_VARIABLE};

/// The child's main function. Does nothing when the harness runs it by itself.
pub(crate) fn main() {
    let Some(path) = std::env::var_os(RAM_VARIABLE) else {
        return;
    };
    let file = File::options().read(true).write(true).open(path).unwrap();
    let length = usize::try_from(file.metadata().unwrap().len()).unwrap();
    let memory = MmapOptions::new().len(length).map_raw(&file).unwrap();
    let mut guest = Guest {
        memory: Arc::new(Memory(memory)),
        writers: None,
    };
    say("ready");
    for line in std::io::stdin().lock().lines() {
        let line = line.unwrap();
        let mut words = line.split(' ');
        let order = words.next().unwrap();
        let numbers: Vec<u64> = words.map(|word| word.parse().unwrap()).collect();
        say(&guest.obey(order, &numbers));
    }
}

fn say(words: &str) {
    let mut output = std::io::stdout().lock();
    writeln!(output, "{MARK}{words}").unwrap();
    output.flush().unwrap();
}

struct Guest {
    memory: Arc<Memory>,
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
            // Lets this many threads write all over the RAM until told to halt.
            ("run", [threads]) => {
                self.writers = Some(Writers::start(&self.memory, *threads));
                "running".into()
            }
            ("halt", []) => self.writers.take().map_or(0, Writers::halt).to_string(),
            other => panic!("no such order: {other:?}"),
        }
    }
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
