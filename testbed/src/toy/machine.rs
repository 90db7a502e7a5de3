//! The running toy: vCPU threads that rewrite pages, and what the engine does to them.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use ferry_engine::core::layout::PAGE_SIZE;
use ferry_engine::core::throttle::MOST_PERCENT;
use ferry_engine::vmm::{
    EventSink, Guest, GuestEvent, Inventory, PauseFor, RunState, Stopped, VmmError,
};

use super::fault::{Call, Faults};
use super::memory::Memory;
use super::world::World;

/// How often a vCPU wakes to write its share of pages.
const BEAT: Duration = Duration::from_millis(1);

/// Everything that the threads and the engine's adapters share.
#[derive(Debug)]
pub(super) struct Machine {
    pub(super) world: Arc<World>,
    pub(super) memory: Arc<Memory>,
    pub(super) faults: Arc<Faults>,
    pub(super) inventory: Mutex<Inventory>,
    /// Page writes a second, of all vCPUs together.
    pub(super) rate_pages_per_s: AtomicU64,
    /// By how much of its time the guest is slowed, in percent.
    pub(super) throttled_percent: AtomicU8,
    /// Set once it was paused while it was slow.
    pub(super) paused_slow: AtomicBool,
    /// Set while the engine has the VMM's settings changed.
    pub(super) changed: AtomicBool,
    vcpus: usize,
    gate: Mutex<Gate>,
    moved: Condvar,
    sink: Mutex<Sink>,
}

#[derive(Debug, Default)]
struct Gate {
    running: bool,
    quit: bool,
    parked: usize,
    stopped: Option<Instant>,
}

#[derive(Default)]
struct Sink(Option<EventSink>);

impl std::fmt::Debug for Sink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Sink").field(&self.0.is_some()).finish()
    }
}

impl Machine {
    pub(super) fn new(
        world: Arc<World>,
        memory: Arc<Memory>,
        faults: Arc<Faults>,
        inventory: Inventory,
        vcpus: usize,
    ) -> Self {
        Self {
            world,
            memory,
            faults,
            inventory: Mutex::new(inventory),
            rate_pages_per_s: AtomicU64::new(0),
            throttled_percent: AtomicU8::new(0),
            paused_slow: AtomicBool::new(false),
            changed: AtomicBool::new(false),
            vcpus,
            gate: Mutex::default(),
            moved: Condvar::new(),
            sink: Mutex::default(),
        }
    }

    /// Starts the vCPU threads, parked.
    pub(super) fn start(self: &Arc<Self>) -> Vec<thread::JoinHandle<()>> {
        let start = |index| {
            let machine = Arc::clone(self);
            thread::spawn(move || Vcpu::new(machine, index).run())
        };
        (0..self.vcpus).map(start).collect()
    }

    pub(super) fn state(&self) -> RunState {
        if self.gate().running {
            RunState::Running
        } else {
            RunState::Paused
        }
    }

    pub(super) fn has_quit(&self) -> bool {
        self.gate().quit
    }

    /// Parks every vCPU.
    pub(super) fn park(&self) -> Instant {
        let mut gate = self.gate();
        if gate.running {
            gate.running = false;
            self.moved.notify_all();
            while gate.parked < self.vcpus && !gate.quit {
                gate = self
                    .moved
                    .wait(gate)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            self.world.leave();
            gate.stopped = Some(Instant::now());
        }
        gate.stopped.unwrap_or_else(Instant::now)
    }

    pub(super) fn unpark(&self) {
        let mut gate = self.gate();
        if !gate.running && !gate.quit {
            self.world.enter();
            gate.running = true;
            gate.stopped = None;
            self.moved.notify_all();
        }
    }

    pub(super) fn end(&self) {
        self.park();
        self.gate().quit = true;
        self.moved.notify_all();
    }

    /// Tells whoever watches.
    pub(super) fn tell(&self, event: GuestEvent) {
        let sink = self.sink.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(sink) = &sink.0 {
            sink(event);
        }
    }

    /// Rewrites a page as the guest does, and says whether it was found as it was left.
    pub(super) fn rewrite(&self, region: u16, page: u64) {
        let (mut found, mut expected) = ([0; PAGE_SIZE], [0; PAGE_SIZE]);
        let generation = self.world.generation(region, page);
        self.memory.load(region, page, &mut found);
        self.world.fill(region, page, generation, &mut expected);
        if found != expected {
            self.world.found_bad();
        }
        self.world.fill(region, page, generation + 1, &mut expected);
        self.memory.store(region, page, &expected);
        self.world.wrote(region, page, generation + 1);
    }

    fn gate(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The part of its time that the guest has, in percent.
    fn time_percent(&self) -> u32 {
        let lacks = self.throttled_percent.load(Ordering::SeqCst);
        u32::from(100 - lacks.min(MOST_PERCENT))
    }

    /// Waits for the next beat of a running guest; false when the VMM ends. A slow guest waits longer.
    fn beat(&self) -> bool {
        let mut gate = self.gate();
        if gate.running && !gate.quit {
            let waited = self
                .moved
                .wait_timeout(gate, BEAT * 100 / self.time_percent());
            gate = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        if !gate.running {
            gate.parked += 1;
            self.moved.notify_all();
            while !gate.running && !gate.quit {
                gate = self
                    .moved
                    .wait(gate)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            gate.parked -= 1;
        }
        !gate.quit
    }
}

/// One vCPU: it owns every so-manieth busy page.
struct Vcpu {
    machine: Arc<Machine>,
    pages: Vec<(u16, u64)>,
    next: usize,
    began: Instant,
    written: u64,
}

impl Vcpu {
    fn new(machine: Arc<Machine>, index: usize) -> Self {
        let shapes = (0_u16..).zip(machine.world.shapes());
        let busy =
            shapes.flat_map(|(region, shape)| (0..shape.busy).map(move |page| (region, page)));
        let pages = busy.skip(index).step_by(machine.vcpus).collect();
        Self {
            machine,
            pages,
            next: 0,
            began: Instant::now(),
            written: 0,
        }
    }

    fn run(mut self) {
        while self.machine.beat() {
            for _ in 0..self.due() {
                let (region, page) = self.pages[self.next];
                self.machine.rewrite(region, page);
                self.next = (self.next + 1) % self.pages.len();
            }
        }
    }

    /// How many pages to write to keep the rate; what a pause held up is not made up for.
    fn due(&mut self) -> u64 {
        let all = self.machine.rate_pages_per_s.load(Ordering::SeqCst);
        let share = all / self.machine.vcpus as u64;
        if self.pages.is_empty() || share == 0 {
            return 0;
        }
        let time_percent = self.machine.time_percent();
        let longest = 2 * BEAT * 100 / time_percent;
        let span = self.began.elapsed().min(longest) * time_percent / 100;
        let micros = u64::try_from(span.as_micros()).unwrap_or(0);
        let due = (share * micros / 1_000_000).max(1);
        self.began = Instant::now();
        self.written += due;
        due
    }
}

/// The engine's hold on the guest.
pub(super) struct ToyGuest(pub(super) Arc<Machine>);

impl ToyGuest {
    fn hit(&self, call: Call) -> Result<(), VmmError> {
        self.0.faults.hit(call)?;
        if self.0.has_quit() && call != Call::Quit {
            let what = "the toy has quit".to_owned();
            return Err(VmmError::Gone { what });
        }
        Ok(())
    }
}

impl Guest for ToyGuest {
    fn watch(&mut self, sink: EventSink) -> Result<(), VmmError> {
        self.hit(Call::Watch)?;
        self.0.sink.lock().unwrap_or_else(PoisonError::into_inner).0 = Some(sink);
        Ok(())
    }

    fn inventory(&mut self) -> Result<Inventory, VmmError> {
        self.hit(Call::Inventory)?;
        let inventory = self.0.inventory.lock();
        Ok(inventory.unwrap_or_else(PoisonError::into_inner).clone())
    }

    fn run_state(&mut self) -> Result<RunState, VmmError> {
        self.hit(Call::RunState)?;
        Ok(self.0.state())
    }

    fn flusher(&mut self) -> Box<dyn FnMut() -> Result<(), VmmError> + Send> {
        let faults = Arc::clone(&self.0.faults);
        Box::new(move || faults.hit(Call::Flush))
    }

    fn throttle(&mut self, percent: u8) -> Result<(), VmmError> {
        self.hit(Call::Throttle)?;
        self.0.throttled_percent.store(percent, Ordering::SeqCst);
        Ok(())
    }

    fn pause(&mut self, _why: PauseFor) -> Result<Stopped, VmmError> {
        self.hit(Call::Pause)?;
        let is_slow = self.0.throttled_percent.load(Ordering::SeqCst) > 0;
        self.0.paused_slow.fetch_or(is_slow, Ordering::SeqCst);
        let at = self.0.park();
        Ok(Stopped {
            at,
            drained_at: at.max(Instant::now()),
        })
    }

    fn resume(&mut self) -> Result<(), VmmError> {
        self.hit(Call::Resume)?;
        self.0.unpark();
        Ok(())
    }

    fn restore(&mut self) -> Result<(), VmmError> {
        self.hit(Call::Restore)?;
        self.0.changed.store(false, Ordering::SeqCst);
        self.0.throttled_percent.store(0, Ordering::SeqCst);
        Ok(())
    }

    fn quit(&mut self) -> Result<(), VmmError> {
        self.hit(Call::Quit)?;
        self.0.end();
        Ok(())
    }
}
