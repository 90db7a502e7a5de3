//! A guest and the place it moves to, with all that must hold of every move.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use ferry_testbed::proxy::{Deed, FrameName, Proxy};
use ferry_testbed::{
    Ended, Ferry, Field, Linux, Machine, PAGE_SIZE, Probe, Qemu, QemuVersion, StatusPage,
    wait_until,
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// How long anything may take.
pub(crate) const BOUND: Duration = Duration::from_secs(90);

/// How much of the target's RAM shows that the first round is under way.
const UNDER_WAY_BYTES: u64 = 4 << 20;

/// More rounds than any move here needs to converge.
const MOST_ROUNDS: usize = 40;

/// A bandwidth at which a small guest's first round takes seconds, as an argument.
pub(crate) const SLOW: &str = "--bandwidth=24";

/// Most tests are about moves from host to host. Here both are one, where nothing would travel.
const APART: &str = "--within-host=never";

/// The machine of most tests.
pub(crate) fn small(version: QemuVersion) -> Machine {
    Machine::new(version, 256).linux(Linux::filling_mib(64).writing_pages_per_s(2000))
}

/// A guest, and where it moves to.
pub(crate) struct Pair {
    pub(crate) source: Qemu,
    pub(crate) target: Qemu,
    /// Where the guest counts at the source; `None` when no guest was booted.
    page: Option<StatusPage>,
    before: Before,
}

/// How everything was before the move.
struct Before {
    source: Footprint,
    target: Footprint,
}

/// What a QEMU has that a migration might change.
#[derive(Debug, PartialEq)]
struct Footprint {
    descriptors: Vec<String>,
    capabilities: Value,
    parameters: Value,
    groups: BTreeSet<String>,
}

impl Footprint {
    fn of(qemu: &Qemu) -> Self {
        let ask = |command| qemu.execute(command, &json!({})).unwrap();
        Self {
            capabilities: ask("query-migrate-capabilities"),
            parameters: ask("query-migrate-parameters"),
            descriptors: descriptors(qemu),
            groups: groups(qemu),
        }
    }
}

/// What QEMU has open, sorted. Sockets and pipes are all alike; eventfds come and go with what the
/// guest does with its devices.
fn descriptors(qemu: &Qemu) -> Vec<String> {
    let entries = fs::read_dir(format!("/proc/{}/fd", qemu.pid())).unwrap();
    let links = entries.filter_map(|entry| fs::read_link(entry.unwrap().path()).ok());
    let mut all: Vec<String> = links
        .map(|link| {
            let link = link.display().to_string();
            match link.split_once(":[") {
                Some((kind, _)) if !kind.contains("anon_inode") => kind.to_owned(),
                _ => link,
            }
        })
        .filter(|link| link != "anon_inode:[eventfd]")
        .collect();
    all.sort_unstable();
    all
}

/// The control groups in which threads of QEMU are. Most threads come and go.
fn groups(qemu: &Qemu) -> BTreeSet<String> {
    let threads = fs::read_dir(format!("/proc/{}/task", qemu.pid())).unwrap();
    let paths = threads.flatten().map(|thread| thread.path().join("cgroup"));
    paths.flat_map(fs::read_to_string).collect()
}

/// Control groups that an engine made for threads of QEMU, in whatever hierarchy.
pub(crate) fn made_groups(qemu: &Qemu) -> Vec<PathBuf> {
    let prefix = format!("ferry-{}-", qemu.pid());
    let below = |folder: PathBuf| {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        entries
            .map(|entry| entry.path())
            .filter(|path| path.is_dir())
    };
    let mut made = Vec::new();
    let mut folders = vec![PathBuf::from("/sys/fs/cgroup")];
    while let Some(folder) = folders.pop() {
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with(&prefix) {
            made.push(folder.clone());
        }
        folders.extend(below(folder));
    }
    made
}

/// Journals and control sockets.
fn journals(qemu: &Qemu) -> Vec<PathBuf> {
    Ferry::left_in(&Ferry::state_folder(qemu))
}

impl Pair {
    /// Boots the guest of `machine`, and starts a target like it.
    pub(crate) fn boot(machine: &Machine) -> Self {
        Self::boot_towards(machine, machine)
    }

    /// Boots the guest of `source`, and starts `target` to wait for it.
    pub(crate) fn boot_towards(source: &Machine, target: &Machine) -> Self {
        let source = source.start().unwrap();
        let page = source.wait_for_guest(BOUND).unwrap();
        Self::new(source, Some(page), target)
    }

    /// A guest that runs already, or none at all, and a target that waits for it.
    pub(crate) fn new(source: Qemu, page: Option<StatusPage>, target: &Machine) -> Self {
        Self::of(source, page, target.clone().incoming().start().unwrap())
    }

    /// The same, with a target that has been started.
    pub(crate) fn of(source: Qemu, page: Option<StatusPage>, target: Qemu) -> Self {
        let before = Before {
            source: Footprint::of(&source),
            target: Footprint::of(&target),
        };
        Self {
            source,
            target,
            page,
            before,
        }
    }

    /// After a move: the target is the next source.
    pub(crate) fn onwards(self, target: &Machine) -> Self {
        let page = self.page.map(|page| self.target.counterpart(&page));
        Self::new(self.target, page, target)
    }

    /// After a move that was given up: a fresh target.
    pub(crate) fn again(self, target: &Machine) -> Self {
        Self::new(self.source, self.page, target)
    }

    /// Where the guest counts.
    pub(crate) fn page(&self) -> &StatusPage {
        self.page.as_ref().expect("the test has booted a guest")
    }

    /// Begins a move with these arguments, as from one host to another.
    pub(crate) fn begin(&self, args: &[&str]) -> Move<'_> {
        self.begin_near(&[&[APART], args].concat())
    }

    /// Begins a move with these arguments and no others, which is one within a host.
    pub(crate) fn begin_near(&self, args: &[&str]) -> Move<'_> {
        let (receive, uri) = Ferry::receive(&self.target, &["--json"]).unwrap();
        self.begin_at(args, &uri, receive)
    }

    /// The same, with `rule` deciding about every frame on the way.
    pub(crate) fn begin_through(
        &self,
        args: &[&str],
        rule: impl FnMut(FrameName, &mut Vec<u8>) -> Deed + Send + 'static,
    ) -> Move<'_> {
        let (receive, uri) = Ferry::receive(&self.target, &["--json"]).unwrap();
        let proxy = Proxy::start(&uri, rule).unwrap();
        let args = [&[APART], args].concat();
        let mut begun = self.begin_at(&args, &proxy.uri(), receive);
        begun.proxy = Some(proxy);
        begun
    }

    fn begin_at(&self, args: &[&str], uri: &str, receive: Ferry) -> Move<'_> {
        let probe = self.page.as_ref().map(|page| {
            let there = self.target.counterpart(page);
            Probe::start(page.clone(), Some(there))
        });
        let is_paused =
            args.contains(&"--suspend") || self.source.run_state().unwrap() != "running";
        let mut all = vec!["--verbose"];
        all.extend(args);
        Move {
            pair: self,
            migrate: Ferry::migrate(&self.source, uri, &all).unwrap(),
            receive,
            proxy: None,
            probe,
            state: if is_paused { "paused" } else { "running" },
            keeps_source: args.contains(&"--keep-source"),
        }
    }

    /// Moves live, and checks everything.
    pub(crate) fn move_live(&self) -> Moved {
        self.begin(&["--live"]).moved()
    }

    /// How many bytes of the target's RAM are allocated.
    pub(crate) fn arrived_bytes(&self) -> u64 {
        let rams = self.target.rams().iter();
        rams.map(|ram| ram.allocated_bytes().unwrap()).sum()
    }

    /// The guest runs at the target and is whole, the source's QEMU has ended, and nothing is left of
    /// any engine.
    pub(crate) fn assert_arrived(&self) {
        assert_eq!(self.target.run_state().unwrap(), "running");
        assert_whole(&self.target.counterpart(self.page()));
        assert_source(self, false, "running");
        // Settings are the memory of the engine that made them; descriptors are everybody's.
        wait_until("nothing is left in QEMU", BOUND, || {
            (descriptors(&self.target) == self.before.target.descriptors).then_some(())
        })
        .unwrap();
        assert_eq!(journals(&self.target), Vec::<PathBuf>::new());
    }

    fn assert_same_ram(&self) {
        for (ours, theirs) in self.source.rams().iter().zip(self.target.rams()) {
            let difference = ours.first_difference(theirs).unwrap();
            assert_eq!(difference, None, "{}", ours.path().display());
        }
    }

    /// Nothing is left of two commands that ended so.
    fn assert_nothing_left(&self, ended: [&Ended; 2]) {
        for qemu in [&self.source, &self.target] {
            let left = qemu.private_folders().unwrap();
            assert_eq!(left, Vec::<PathBuf>::new(), "{ended:?}");
            assert_eq!(made_groups(qemu), Vec::<PathBuf>::new(), "{ended:?}");
        }
        assert_eq!(journals(&self.target), Vec::<PathBuf>::new());
    }
}

fn assert_as_before(qemu: &Qemu, before: &Footprint) {
    let settled = wait_until("QEMU is as it was before", BOUND / 9, || {
        (Footprint::of(qemu) == *before).then_some(())
    });
    if settled.is_err() {
        let now = Footprint::of(qemu);
        assert_eq!(now.descriptors, before.descriptors);
        assert_eq!(now.capabilities, before.capabilities);
        assert_eq!(now.parameters, before.parameters);
        assert_eq!(now.groups, before.groups);
    }
}

/// Waits until the guest of `page` has verified all of its memory once more than once, and has
/// nothing to complain of.
pub(crate) fn assert_whole(page: &StatusPage) {
    let value = |field| page.value(field).unwrap();
    let sweeps = value(Field::Sweeps);
    let progress = value(Field::Progress);
    wait_until("the guest has verified all of its memory", BOUND, || {
        (value(Field::Sweeps) >= sweeps + 2).then_some(())
    })
    .unwrap();
    assert!(value(Field::Progress) > progress);
    assert_eq!(page.read().unwrap().faults(), 0);
}

/// A move that is under way.
pub(crate) struct Move<'a> {
    pair: &'a Pair,
    pub(crate) migrate: Ferry,
    pub(crate) receive: Ferry,
    /// Stands between the two as long as the move lasts.
    proxy: Option<Proxy>,
    probe: Option<Probe>,
    state: &'static str,
    keeps_source: bool,
}

/// A move that is over: the guest is at the target, running and whole.
pub(crate) struct Moved {
    pub(crate) json: Value,
    pub(crate) told: String,
    pub(crate) blackout: Option<Duration>,
    /// The longest that the probe itself had to wait for a core: by so much that may be too long.
    pub(crate) resolution: Duration,
}

impl Move<'_> {
    /// The run state in which the guest is expected at the target, after something has changed it.
    pub(crate) fn will_be(mut self, state: &'static str) -> Self {
        self.state = state;
        self
    }

    /// Waits until pages arrive at the target.
    pub(crate) fn wait_for_pages(&self) {
        wait_until("pages arrive at the target", BOUND, || {
            (self.pair.arrived_bytes() > UNDER_WAY_BYTES).then_some(())
        })
        .unwrap_or_else(|error| panic!("{error}: {}", self.migrate.told()));
    }

    /// Waits until progress tells of this percentage; beyond 98 it is a later round than the first.
    pub(crate) fn wait_for_percent(&self, percent: u32) {
        wait_until("progress", BOUND, || {
            (self.percent() >= Some(percent)).then_some(())
        })
        .unwrap_or_else(|error| panic!("{error}: {}", self.migrate.told()));
    }

    /// The highest percentage that progress has told of.
    pub(crate) fn percent(&self) -> Option<u32> {
        let told = self.migrate.told();
        let lines = told
            .lines()
            .filter_map(|line| line.strip_prefix("Migration: ["));
        lines
            .filter_map(|rest| rest.split('%').next()?.trim().parse::<u32>().ok())
            .max()
    }

    /// Interrupts the source's command.
    pub(crate) fn interrupt(&self, signal: Signal) {
        self.migrate.signal(signal).unwrap();
    }

    /// Waits for a move that succeeds, and checks all that must hold of one.
    pub(crate) fn moved(self) -> Moved {
        let Self {
            pair,
            migrate,
            receive,
            proxy,
            probe,
            state,
            keeps_source,
        } = self;
        let (there, here) = (migrate.wait(BOUND).unwrap(), receive.wait(BOUND).unwrap());
        drop(proxy);
        assert_eq!((there.code(), here.code()), (0, 0), "{there:?} {here:?}");
        assert_eq!(here.json()["outcome"], "moved");
        let json = there.json();
        assert_plausible(&json, pair.page.as_ref());
        assert_eq!(pair.target.run_state().unwrap(), state, "{there:?}");
        assert_source(pair, keeps_source, state);
        if state == "paused" {
            pair.target.execute("cont", &json!({})).unwrap();
        }
        let mut resolution = Duration::ZERO;
        let blackout = pair.page.as_ref().and_then(|page| {
            assert_whole(&pair.target.counterpart(page));
            let seen = probe?.finish().unwrap();
            assert!(seen.moved_at.is_some(), "{:?}", seen.blackout);
            resolution = seen.resolution;
            (state == "running").then_some(seen.blackout)
        });
        assert_as_before(&pair.target, &pair.before.target);
        pair.assert_nothing_left([&there, &here]);
        let moved = Moved {
            json,
            told: there.stderr,
            blackout,
            resolution,
        };
        moved.print();
        moved
    }

    /// Waits for a move that is given up because of `reason`, with the guest left as `state`, and
    /// checks all that must hold of one.
    pub(crate) fn kept(self, reason: &str, state: &str) -> Value {
        let pair = self.pair;
        let (json, _) = self.given_up(reason);
        assert_eq!(pair.source.run_state().unwrap(), state);
        let is_running = state == "running";
        assert_eq!(json["guest"], if is_running { state } else { "paused" });
        if is_running {
            assert_whole(pair.page());
        }
        assert_as_before(&pair.source, &pair.before.source);
        assert_eq!(journals(&pair.source), Vec::<PathBuf>::new());
        json
    }

    /// Waits for a move that is given up, with whatever became of the guest; tells how both ended.
    pub(crate) fn given_up(self, reason: &str) -> (Value, Ended) {
        let there = self.migrate.wait(BOUND).unwrap();
        let here = self.receive.wait(BOUND).unwrap();
        assert_eq!((there.code(), here.code()), (1, 1), "{there:?} {here:?}");
        let json = there.json();
        assert_eq!(json["outcome"], "kept");
        let told = json["reason"].as_str().unwrap();
        assert!(told.contains(reason), "{told:?} has no {reason:?}");
        assert_eq!(here.json()["outcome"], "kept");
        self.pair.target.wait_for_end(BOUND).unwrap();
        self.pair.assert_nothing_left([&there, &here]);
        (json, there)
    }
}

impl Moved {
    /// How many milliseconds a figure of the report is.
    pub(crate) fn ms(&self, name: &str) -> f64 {
        self.json[name].as_f64().unwrap()
    }

    fn print(&self) {
        let name = std::thread::current().name().unwrap_or_default().to_owned();
        let blackout = self.blackout.map_or_else(String::new, |span| {
            format!("{:.1}", span.as_secs_f64() * 1e3)
        });
        println!(
            "MOVE {name}: total {:.0} ms, downtime {:.1} ms, blackout seen {blackout} ms (to {:.1} ms), \
             {} rounds, {} MiB",
            self.ms("total_ms"),
            self.ms("downtime_ms"),
            self.resolution.as_secs_f64() * 1e3,
            self.json["rounds"].as_array().unwrap().len(),
            self.json["bytes_wire"].as_u64().unwrap() >> 20,
        );
    }
}

fn assert_source(pair: &Pair, is_kept: bool, state: &str) {
    if is_kept {
        assert_eq!(pair.source.run_state().unwrap(), "postmigrate");
        assert_as_before(&pair.source, &pair.before.source);
        if state == "paused" {
            pair.assert_same_ram();
        }
        assert_eq!(
            journals(&pair.source).len(),
            1,
            "it says where the guest is"
        );
    } else {
        assert!(pair.source.wait_for_end(BOUND).unwrap().success());
        assert_eq!(journals(&pair.source), Vec::<PathBuf>::new());
    }
}

fn assert_plausible(json: &Value, page: Option<&StatusPage>) {
    assert_eq!(json["outcome"], "moved", "{json}");
    let number = |name: &str| {
        json[name]
            .as_f64()
            .unwrap_or_else(|| panic!("{name}: {json}"))
    };
    let rounds = json["rounds"].as_array().unwrap();
    let sum = |name: &str| -> u64 {
        rounds
            .iter()
            .map(|round| round[name].as_u64().unwrap())
            .sum()
    };
    let postcopy = json["postcopy"].as_object();
    assert!(
        rounds.len() >= 3 || postcopy.is_some(),
        "first, one while it stands, last: {json}"
    );
    assert!(rounds.len() <= MOST_ROUNDS, "{} rounds", rounds.len());
    assert!(
        number("setup_ms") > 0.0 && number("downtime_ms") > 0.0,
        "{json}"
    );
    assert!(
        number("setup_ms").max(number("downtime_ms")) <= number("total_ms"),
        "{json}"
    );
    let parts = json["blackout_ms"].as_object().unwrap();
    let together: f64 = parts.values().map(|part| part.as_f64().unwrap()).sum();
    // Each is rounded to a microsecond.
    assert!(
        (together - number("downtime_ms")).abs() < 0.01,
        "the parts of the blackout do not add up: {json}"
    );
    let wire = json["bytes_wire"].as_u64().unwrap();
    let followed = postcopy.map_or(0, |told| told["bytes_wire"].as_u64().unwrap());
    let state = wire
        .checked_sub(sum("bytes") + followed)
        .unwrap_or_else(|| panic!("{json}"));
    // At least registers; at most what is not guest RAM, video memory included.
    assert!((10_000..40 << 20).contains(&state), "{state}: {json}");
    assert_eq!(json["pages_zero"], sum("pages_zero"), "{json}");
    if let Some(page) = page {
        let filled = page.value(Field::Pages).unwrap();
        let first = rounds.first().map(|round| round["pages"].as_u64().unwrap());
        let missing = postcopy.map(|told| told["pages_missing"].as_u64().unwrap());
        let told = first.unwrap_or(0) + missing.unwrap_or(0);
        assert!(told >= filled, "{json}");
        // The ratio is told to three digits.
        let ratio = json["compression"]["ratio"].as_f64().unwrap() + 0.001;
        let shared_bytes = number("pages_shared") * f64::from(u32::try_from(PAGE_SIZE).unwrap());
        let filled_bytes = u32::try_from(filled * PAGE_SIZE as u64).unwrap();
        assert!(
            number("bytes_wire") * ratio + shared_bytes >= f64::from(filled_bytes),
            "{json}"
        );
        assert!(
            rounds.is_empty() || number("throughput_bytes_per_s") > 0.0,
            "{json}"
        );
    }
}
