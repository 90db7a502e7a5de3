//! What the child does.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, PipeReader, PipeWriter, Write};
use std::os::fd::AsRawFd as _;
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
        second: None,
        pin: None,
    };
    patience::count_signals();
    say("ready");
    for line in std::io::stdin().lock().lines() {
        let line = line.unwrap();
        let mut words = line.split(' ');
        let order = words.next().unwrap();
        let numbers: Vec<u64> = words.map(|word| word.parse().unwrap()).collect();
        if let Some(answer) = guest.obey(order, &numbers) {
            say(&answer);
        }
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
    second: Option<MmapRaw>,
    pin: Option<(PipeReader, PipeWriter)>,
}

impl Guest {
    /// The answer; none from an order that threads carry out, each of which answers.
    fn obey(&mut self, order: &str, numbers: &[u64]) -> Option<String> {
        let answer = match (order, numbers) {
            // Writes a value into each of the pages.
            ("write", [value, pages @ ..]) => {
                for page in pages {
                    self.memory.word(*page).store(*value, Ordering::Relaxed);
                }
                "written".into()
            }
            ("read", [page]) => self.memory.word(*page).load(Ordering::Relaxed).to_string(),
            // Reads a page on a thread of its own, which says at its end what it was.
            ("load", [page]) => {
                let (memory, page) = (Arc::clone(&self.memory), *page);
                answer_later(move || format!("{page} {:#x}", memory.digest(page)));
                return None;
            }
            // Writes a value into a page on a thread of its own, which says so at its end.
            ("store", [value, page]) => {
                let (memory, page, value) = (Arc::clone(&self.memory), *page, *value);
                answer_later(move || {
                    memory.word(page).store(value, Ordering::Relaxed);
                    format!("{page} stored")
                });
                return None;
            }
            // Lets threads read every page, each in an order of its own, and say what came of all.
            ("digest", [threads]) => {
                for seed in 0..*threads {
                    let memory = Arc::clone(&self.memory);
                    answer_later(move || format!("{:#x}", memory.digest_in_order_of(seed)));
                }
                return None;
            }
            // Lets threads add one to every page, each in an order of its own, and say when they have.
            ("add", [threads]) => {
                for seed in 0..*threads {
                    let memory = Arc::clone(&self.memory);
                    answer_later(move || memory.add_in_order_of(seed));
                }
                return None;
            }
            // Maps the RAM a second time.
            ("map", []) => {
                let file = self.file.as_ref().unwrap();
                self.second = Some(MmapOptions::new().map_raw(file).unwrap());
                "mapped".into()
            }
            // Pins a page by what waits in a pipe, until told otherwise.
            ("pin", [page]) => {
                self.pin = Some(self.memory.pin(*page));
                "pinned".into()
            }
            ("unpin", []) => {
                self.pin = None;
                "unpinned".into()
            }
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
        };
        Some(answer)
    }
}

/// Does `work` on a thread of its own, which says its number and what came of it.
fn answer_later(work: impl FnOnce() -> String + Send + 'static) {
    thread::spawn(move || {
        let answer = work();
        say(&format!("{} {answer}", nix::unistd::gettid()));
    });
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

impl Memory {
    /// What a page holds, every byte of it.
    fn digest(&self, page: u64) -> u64 {
        let first = std::ptr::from_ref(self.word(page));
        let words = (0..PAGE_SIZE / size_of::<u64>()).map(|index| {
            // SAFETY: within the page, which the check of its first word has found in the mapping.
            let word = unsafe { first.add(index) };
            // SAFETY: as there, and only ever used as atomics.
            unsafe { &*word }.load(Ordering::Relaxed)
        });
        page_digest(page, words)
    }

    fn digest_in_order_of(&self, seed: u64) -> u64 {
        let pages = shuffled(self.pages(), seed).into_iter();
        pages.fold(0, |sum, page| sum.wrapping_add(self.digest(page)))
    }

    fn add_in_order_of(&self, seed: u64) -> String {
        for page in shuffled(self.pages(), seed) {
            self.word(page).fetch_add(1, Ordering::Relaxed);
        }
        "added".into()
    }

    fn pin(&self, page: u64) -> (PipeReader, PipeWriter) {
        let (reader, writer) = std::io::pipe().unwrap();
        let bytes = libc::iovec {
            iov_base: std::ptr::from_ref(self.word(page)).cast_mut().cast(),
            iov_len: PAGE_SIZE,
        };
        // SAFETY: the page is mapped as long as `self`, and the kernel only reads it.
        let taken = unsafe { libc::vmsplice(writer.as_raw_fd(), &raw const bytes, 1, 0) };
        assert_eq!(taken, PAGE_SIZE.cast_signed());
        (reader, writer)
    }
}

/// A number for the words of a page, which depends on each of them and on its place.
pub(crate) fn page_digest(page: u64, words: impl Iterator<Item = u64>) -> u64 {
    words.fold(page, |digest, word| {
        (digest ^ word)
            .wrapping_mul(0x9E37_79B9_7F4A_7C15)
            .rotate_left(23)
    })
}

/// The numbers below `count` in an order that `seed` decides.
pub(crate) fn shuffled(count: u64, seed: u64) -> Vec<u64> {
    let mut random = (seed + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let mut numbers: Vec<_> = (0..count).collect();
    for last in (1..numbers.len()).rev() {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let other = random % (last as u64 + 1);
        numbers.swap(last, usize::try_from(other).unwrap());
    }
    numbers
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
