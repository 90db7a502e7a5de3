//! A toy VMM that embeds the engine through its public traits alone.
//!
//! Its guest is a few threads that rewrite pages of memfds and check each before they do. What every
//! page should hold is kept in a [`World`] outside both VMMs, so that a page which a migration lost
//! is found even when it is consistent in itself, and so is a guest that runs twice.
//!
//! | what | where |
//! |---|---|
//! | one VMM with its guest | [`Toy`] |
//! | the truth about the guest | [`World`] |
//! | a call of the engine's that fails, hangs or panics | [`Faults`] |
//! | a link that is cut, corrupted, stalled or slow at a chosen byte | [`Proxy`] |
//! | source, target, journals, and what must hold after a move | [`Pair`] |

mod fault;
mod machine;
mod memory;
mod pair;
mod proxy;
mod state;
mod world;

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;

use ferry_engine::core::layout::PAGE_SIZE;
use ferry_engine::vmm::{GuestEvent, Inventory, RunState, Vm};

pub use self::fault::{Call, Fault, Faults};
use self::machine::{Machine, ToyGuest};
use self::memory::{LogTracker, Memory};
pub use self::pair::{Ended, Pair, Until};
pub use self::proxy::{At, Proxy, Recorded, Rule, Scope, Way, What};
use self::state::ToyState;
pub use self::world::{Change, Shape, World};

/// What a toy is like.
#[derive(Clone, Debug)]
pub struct Model {
    /// Its RAM.
    pub shapes: Vec<Shape>,
    /// Its vCPU threads.
    pub vcpus: usize,
    /// What its guest changes of a page.
    pub change: Change,
    /// Page writes a second, of all vCPUs together.
    pub rate_pages_per_s: u64,
    /// Device state that is written before the pause, in bytes.
    pub early_bytes: usize,
    /// Device state that is written after the registers, in bytes.
    pub late_bytes: usize,
}

impl Default for Model {
    /// Two regions of 2 MiB together, two vCPUs, a megabyte a second, little device state.
    fn default() -> Self {
        Self {
            shapes: vec![
                Shape {
                    name: "dimm0",
                    pages: 384,
                    filled: 256,
                    busy: 64,
                },
                Shape {
                    name: "dimm1",
                    pages: 128,
                    filled: 0,
                    busy: 16,
                },
            ],
            vcpus: 2,
            change: Change::Page,
            rate_pages_per_s: 250,
            early_bytes: 1000,
            late_bytes: 200,
        }
    }
}

/// One VMM. Its guest ends with it.
#[derive(Debug)]
pub struct Toy {
    machine: Arc<Machine>,
    model: Model,
    vcpus: Vec<JoinHandle<()>>,
}

impl Toy {
    /// A VMM whose guest has booted, and runs.
    pub fn booted(model: &Model, world: &Arc<World>) -> io::Result<Self> {
        let toy = Self::new(model, world)?;
        for (region, shape) in (0..).zip(world.shapes()) {
            for page in 0..shape.filled {
                let mut bytes = [0; PAGE_SIZE];
                world.fill(region, page, world.generation(region, page), &mut bytes);
                toy.machine.memory.store(region, page, &bytes);
            }
        }
        toy.resume();
        Ok(toy)
    }

    /// A VMM that waits for a guest, its RAM full of what somebody left there.
    pub fn waiting(model: &Model, world: &Arc<World>) -> io::Result<Self> {
        let toy = Self::new(model, world)?;
        for (region, shape) in (0..).zip(world.shapes()) {
            for page in 0..shape.pages {
                toy.machine.memory.store(region, page, &[0xa5; PAGE_SIZE]);
            }
        }
        Ok(toy)
    }

    fn new(model: &Model, world: &Arc<World>) -> io::Result<Self> {
        let faults = Arc::new(Faults::default());
        let memory = Arc::new(Memory::new(world.layout(), Arc::clone(&faults))?);
        let inventory = Inventory {
            arch: "toy64".to_owned(),
            machine: "toy-1.0".to_owned(),
            vmm: "toy 1.0".to_owned(),
            layout: world.layout(),
            devices: vec!["ring".to_owned()],
        };
        let machine = Machine::new(Arc::clone(world), memory, faults, inventory, model.vcpus);
        let machine = Arc::new(machine);
        machine
            .rate_pages_per_s
            .store(model.rate_pages_per_s, Ordering::SeqCst);
        let vcpus = machine.start();
        Ok(Self {
            machine,
            model: model.clone(),
            vcpus,
        })
    }

    /// Its parts, for a migration.
    pub fn vm(&self) -> Vm {
        let machine = &self.machine;
        let (early, late) = (self.model.early_bytes, self.model.late_bytes);
        let ram: Arc<Memory> = Arc::clone(&machine.memory);
        Vm {
            tracker: Box::new(LogTracker {
                memory: Arc::clone(&ram),
                faults: Arc::clone(&machine.faults),
            }),
            ram,
            guest: Box::new(ToyGuest(Arc::clone(machine))),
            state: Box::new(ToyState::new(Arc::clone(machine), early, late)),
            faults: None,
        }
    }

    /// Lets another engine on this host read its RAM, which it does not unless told so: most tests are
    /// about what travels.
    pub fn lend_ram(&self) {
        self.machine.memory.lend();
    }

    /// What goes wrong with it.
    pub fn faults(&self) -> &Faults {
        &self.machine.faults
    }

    /// Whether its guest runs.
    pub fn state(&self) -> RunState {
        self.machine.state()
    }

    /// True when the VMM has ended.
    pub fn has_quit(&self) -> bool {
        self.machine.has_quit()
    }

    /// True when nothing of a migration is left: no tracking, no changed setting, a guest with all of its
    /// time.
    pub fn is_clean(&self) -> bool {
        let is_changed = self.machine.changed.load(Ordering::SeqCst);
        !self.machine.memory.log().is_on() && !is_changed && self.throttled_percent() == 0
    }

    /// By how much of its time the guest is slowed, in percent.
    pub fn throttled_percent(&self) -> u8 {
        self.machine.throttled_percent.load(Ordering::SeqCst)
    }

    /// Whether it was ever paused while it was slow.
    pub fn was_paused_slow(&self) -> bool {
        self.machine.paused_slow.load(Ordering::SeqCst)
    }

    /// Pauses the guest, as somebody at the VMM's own console would; says so to nobody.
    pub fn pause(&self) {
        self.machine.park();
    }

    /// Resumes it in the same way.
    pub fn resume(&self) {
        self.machine.unpark();
    }

    /// Ends the VMM.
    pub fn quit(&self) {
        self.machine.end();
    }

    /// Changes how many pages a second the guest writes.
    pub fn set_rate(&self, pages_per_s: u64) {
        self.machine
            .rate_pages_per_s
            .store(pages_per_s, Ordering::SeqCst);
    }

    /// Tells whoever watches the guest that `event` happened.
    pub fn tell(&self, event: GuestEvent) {
        self.machine.tell(event);
    }

    /// Changes what the VMM is made of.
    pub fn change_inventory(&self, change: impl FnOnce(&mut Inventory)) {
        let mut inventory = self
            .machine
            .inventory
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        change(&mut inventory);
    }

    /// Changes a page behind the guest's back and the engine's, as nobody may.
    pub fn spoil(&self, region: u16, page: u64) {
        let spoilt = [0x5c; PAGE_SIZE];
        self.machine.memory.store(region, page, &spoilt);
    }

    /// Pages of a paused guest that do not hold what the guest left there.
    pub fn bad_pages(&self) -> Vec<(u16, u64)> {
        let world = &self.machine.world;
        let is_bad = |region: u16, page: u64| {
            let (mut found, mut expected) = ([0; PAGE_SIZE], [0; PAGE_SIZE]);
            self.machine.memory.load(region, page, &mut found);
            world.fill(region, page, world.generation(region, page), &mut expected);
            found != expected
        };
        let shapes = (0_u16..).zip(world.shapes());
        shapes
            .flat_map(|(region, shape)| (0..shape.pages).map(move |page| (region, page)))
            .filter(|(region, page)| is_bad(*region, *page))
            .collect()
    }
}

impl Drop for Toy {
    fn drop(&mut self) {
        self.machine.end();
        for vcpu in self.vcpus.drain(..) {
            // A vCPU that panicked has shown so already.
            drop(vcpu.join());
        }
    }
}
