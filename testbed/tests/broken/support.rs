//! A guest that attempt after attempt fails to move, and what must hold after each.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use ferry_testbed::proxy::{Deed, FrameName, Proxy};
use ferry_testbed::tiny::{Control, FIRST_HIGH_PAGE, Order};
use ferry_testbed::{Ended, Ferry, Field, Machine, Qemu, QemuVersion, StatusPage, wait_until};
use serde_json::{Value, json};

pub(crate) const BOUND: Duration = Duration::from_secs(60);

/// Pages that the guest has filled, so that a round has many frames.
const FILLED_PAGES: u32 = 8000;

pub(crate) fn machine() -> Machine {
    Machine::new(QemuVersion::V10_0, 64).tiny()
}

/// A source with a guest that counts.
pub(crate) struct Bed {
    pub(crate) machine: Machine,
    pub(crate) source: Qemu,
    pub(crate) page: StatusPage,
    settings: [Value; 2],
}

impl Bed {
    pub(crate) fn new(machine: Machine) -> Self {
        let source = machine.start().unwrap();
        let mut control = Control::attach(source.ram(), BOUND).unwrap();
        let order = Order {
            first: FIRST_HIGH_PAGE.try_into().unwrap(),
            pages: FILLED_PAGES,
            stride: 1,
        };
        control.carry_out(order, BOUND).unwrap();
        Self {
            page: control.status().clone(),
            settings: settings(&source),
            machine,
            source,
        }
    }

    /// Begins to move the guest to a fresh target, `rule` deciding about every frame.
    pub(crate) fn attempt(
        &self,
        args: &[&str],
        rule: impl FnMut(FrameName, &mut Vec<u8>) -> Deed + Send + 'static,
    ) -> Attempt {
        let target = self.machine.clone().incoming().start().unwrap();
        self.attempt_to(target, args, rule)
    }

    /// The same, the target taking pages from the source's RAM: `rule` sees none of them.
    pub(crate) fn attempt_near(
        &self,
        args: &[&str],
        rule: impl FnMut(FrameName, &mut Vec<u8>) -> Deed + Send + 'static,
    ) -> Attempt {
        let target = self.machine.clone().incoming().start().unwrap();
        self.begin(target, args, rule)
    }

    pub(crate) fn attempt_to(
        &self,
        target: Qemu,
        args: &[&str],
        rule: impl FnMut(FrameName, &mut Vec<u8>) -> Deed + Send + 'static,
    ) -> Attempt {
        // Page lanes within a host would pass the proxy by.
        self.begin(target, &[&["--within-host=never"], args].concat(), rule)
    }

    fn begin(
        &self,
        target: Qemu,
        args: &[&str],
        rule: impl FnMut(FrameName, &mut Vec<u8>) -> Deed + Send + 'static,
    ) -> Attempt {
        let arrived = target.counterpart(&self.page);
        let (receive, uri) = Ferry::receive(&target, &["--json"]).unwrap();
        let proxy = Proxy::start(&uri, rule).unwrap();
        let watch = Watch::start(self.page.clone(), arrived.clone());
        let migrate = Ferry::migrate(&self.source, &proxy.uri(), args).unwrap();
        Attempt {
            migrate,
            receive,
            proxy,
            target,
            arrived,
            watch,
        }
    }

    /// The guest runs on at the source, and nothing shows that anybody tried to move it.
    pub(crate) fn assert_kept(&self) {
        self.assert_runs();
        assert_eq!(settings(&self.source), self.settings);
        assert_eq!(journals(&self.source), Vec::<PathBuf>::new());
    }

    /// The guest runs on at the source, and nothing watches its memory.
    pub(crate) fn assert_runs(&self) {
        assert_eq!(self.source.run_state().unwrap(), "running");
        assert_goes_on(&self.page);
        assert!(!is_watched(&self.source), "a userfaultfd is left in QEMU");
    }
}

/// A move under way.
pub(crate) struct Attempt {
    pub(crate) migrate: Ferry,
    pub(crate) receive: Ferry,
    pub(crate) proxy: Proxy,
    pub(crate) target: Qemu,
    pub(crate) arrived: StatusPage,
    watch: Watch,
}

/// How a move ended; the target may still be waiting to be asked.
pub(crate) struct Tried {
    pub(crate) migrate: Ended,
    pub(crate) receive: Ferry,
    pub(crate) proxy: Proxy,
    pub(crate) target: Qemu,
    pub(crate) arrived: StatusPage,
}

impl Attempt {
    /// Waits for the end of `ferry migrate`. The guest never ran twice until then.
    pub(crate) fn end(self) -> Tried {
        self.end_within(BOUND)
    }

    pub(crate) fn end_within(self, bound: Duration) -> Tried {
        let migrate = self.migrate.wait(bound).unwrap();
        self.watch.finish();
        Tried {
            migrate,
            receive: self.receive,
            proxy: self.proxy,
            target: self.target,
            arrived: self.arrived,
        }
    }
}

impl Tried {
    /// The guest was kept with exit code `code`, and the target's QEMU has ended without it.
    pub(crate) fn assert_kept(&self, bed: &Bed, code: i32) {
        assert_told(&self.migrate, code, "kept", "");
        bed.assert_kept();
        self.target.wait_for_end(BOUND).unwrap();
    }

    /// The guest is at the target and runs there; the source's QEMU has ended.
    pub(crate) fn assert_moved(&self, bed: &Bed) {
        assert_eq!(self.migrate.code(), 0, "{:?}", self.migrate);
        bed.source.wait_for_end(BOUND).unwrap();
        assert_eq!(journals(&bed.source), Vec::<PathBuf>::new());
        self.target.wait_for_run_state("running", BOUND).unwrap();
        assert_goes_on(&self.arrived);
    }
}

/// A command ended with `code`, and both its text and its JSON say `words`.
pub(crate) fn assert_told(ended: &Ended, code: i32, outcome: &str, words: &str) {
    assert_eq!(ended.code(), code, "{ended:?}");
    assert_eq!(ended.json()["outcome"], outcome, "{ended:?}");
    let reason = ended.json()["reason"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    assert!(reason.contains(words), "{words:?} is not in {reason:?}");
    assert!(ended.stderr.contains(words), "{ended:?}");
    assert!(!ended.stderr.contains("panicked"), "{ended:?}");
}

pub(crate) fn assert_goes_on(page: &StatusPage) {
    let before = page.value(Field::Progress).unwrap();
    wait_until("the guest makes progress", BOUND, || {
        (page.value(Field::Progress).unwrap() > before).then_some(())
    })
    .unwrap();
}

pub(crate) fn settings(qemu: &Qemu) -> [Value; 2] {
    ["query-migrate-capabilities", "query-migrate-parameters"]
        .map(|command| qemu.execute(command, &json!({})).unwrap())
}

/// What is in the folder of journals. The control socket of an engine that was killed says nothing.
pub(crate) fn journals(qemu: &Qemu) -> Vec<PathBuf> {
    let mut left = Ferry::left_in(&Ferry::state_folder(qemu));
    left.retain(|path| path.extension().is_none_or(|ending| ending != "sock"));
    left
}

pub(crate) fn is_watched(qemu: &Qemu) -> bool {
    let descriptors = std::fs::read_dir(format!("/proc/{}/fd", qemu.pid())).unwrap();
    descriptors.flatten().any(|entry| {
        let target = std::fs::read_link(entry.path()).unwrap_or_default();
        target.to_string_lossy().contains("userfaultfd")
    })
}

/// Sees to it that the guest never runs at both sides.
///
/// A counter that came with the pages is never ahead of the source's. So a target that is ahead runs,
/// and from then on the source must stand still.
struct Watch {
    stop: Arc<AtomicBool>,
    watching: JoinHandle<bool>,
}

impl Watch {
    fn start(source: StatusPage, target: StatusPage) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let watching = thread::spawn(move || {
            let mut last_at_source = None;
            while !stopped.load(Ordering::Relaxed) {
                // In this order: the source may count on between the two.
                let there = target.value(Field::Progress).unwrap_or_default();
                let here = source.value(Field::Progress).unwrap_or_default();
                match last_at_source {
                    Some(last) if here != last => return true,
                    None if there > here => last_at_source = Some(here),
                    _ => {}
                }
                thread::yield_now();
            }
            false
        });
        Self { stop, watching }
    }

    fn finish(self) {
        self.stop.store(true, Ordering::Relaxed);
        let ran_twice = self.watching.join().unwrap();
        assert!(!ran_twice, "the guest ran at both sides");
    }
}
