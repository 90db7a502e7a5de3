//! The toy's device state: something large that may travel early, and registers that may not.
//!
//! Saving writes a page of guest RAM, as devices with rings do: only a collection after the save
//! finds it. Loading looks at that page: only RAM that is complete has it.

use std::io::{self, Read, Write};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use ferry_engine::core::layout::PAGE_SIZE;
use ferry_engine::vmm::{DeviceState, VmmError};

use super::fault::Call;
use super::machine::Machine;

/// What the late part begins with.
const REGISTERS: [u64; 4] = [0x7079, 0x6c6f, 0x6d65, 0x7279];

/// How the device state is cut into writes.
const PIECE: usize = 64 << 10;

/// The adapter.
pub(super) struct ToyState {
    machine: Arc<Machine>,
    early_bytes: usize,
    late_bytes: usize,
    sink: Option<Box<dyn Write + Send>>,
}

impl ToyState {
    pub(super) fn new(machine: Arc<Machine>, early_bytes: usize, late_bytes: usize) -> Self {
        Self {
            machine,
            early_bytes,
            late_bytes,
            sink: None,
        }
    }

    /// The page that a save writes.
    fn device_page(&self) -> u64 {
        self.machine.world.shapes()[0].pages - 1
    }

    fn load_from(&self, from: &mut dyn Read) -> io::Result<()> {
        check_blob(from, self.early_bytes)?;
        for register in REGISTERS {
            expect(register, read_u64(from)?)?;
        }
        let generation = read_u64(from)?;
        let (mut found, mut expected) = ([0; PAGE_SIZE], [0; PAGE_SIZE]);
        self.machine.memory.load(0, self.device_page(), &mut found);
        let world = &self.machine.world;
        world.fill(0, self.device_page(), generation, &mut expected);
        if found != expected {
            return Err(io::Error::other("RAM lacks what the save wrote"));
        }
        check_blob(from, self.late_bytes)?;
        match from.read(&mut [0])? {
            0 => Ok(()),
            _ => Err(io::Error::other("the device state goes on after its end")),
        }
    }
}

impl DeviceState for ToyState {
    fn open(&mut self, mut sink: Box<dyn Write + Send>) -> Result<(), VmmError> {
        self.machine.faults.hit(Call::Open)?;
        self.machine.changed.store(true, Ordering::SeqCst);
        write_blob(&mut sink, self.early_bytes)
            .map_err(|error| VmmError::io("writing early state", error))?;
        self.sink = Some(sink);
        Ok(())
    }

    fn save(&mut self) -> Result<(), VmmError> {
        self.machine.faults.hit(Call::Save)?;
        self.machine.rewrite(0, self.device_page());
        let generation = self.machine.world.generation(0, self.device_page());
        let mut sink = self.sink.take().ok_or_else(|| VmmError::Unfit {
            what: "a save without an open".to_owned(),
        })?;
        let mut late: Vec<u8> = REGISTERS
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect();
        late.extend(generation.to_le_bytes());
        sink.write_all(&late)
            .and_then(|()| write_blob(&mut sink, self.late_bytes))
            .and_then(|()| sink.flush())
            .map_err(|error| VmmError::io("writing late state", error))
    }

    fn abandon(&mut self) -> Result<(), VmmError> {
        self.machine.faults.hit(Call::Abandon)?;
        self.sink = None;
        Ok(())
    }

    fn prepare(&mut self) -> Result<(), VmmError> {
        self.machine.faults.hit(Call::Prepare)
    }

    fn load(&mut self, from: &mut dyn Read) -> Result<(), VmmError> {
        self.machine.faults.hit(Call::Load)?;
        self.load_from(from)
            .map_err(|error| VmmError::failed("loading the toy's state", error))
    }
}

/// The byte at `index` of a blob.
fn byte(index: usize) -> u8 {
    (index.wrapping_mul(31) >> 3).to_le_bytes()[0]
}

fn write_blob(to: &mut dyn Write, bytes: usize) -> io::Result<()> {
    for start in (0..bytes).step_by(PIECE) {
        let piece: Vec<u8> = (start..bytes.min(start + PIECE)).map(byte).collect();
        to.write_all(&piece)?;
    }
    Ok(())
}

fn check_blob(from: &mut dyn Read, bytes: usize) -> io::Result<()> {
    for start in (0..bytes).step_by(PIECE) {
        let mut piece = vec![0; PIECE.min(bytes - start)];
        from.read_exact(&mut piece)?;
        if (start..)
            .zip(&piece)
            .any(|(index, found)| *found != byte(index))
        {
            return Err(io::Error::other("a blob came changed"));
        }
    }
    Ok(())
}

fn read_u64(from: &mut dyn Read) -> io::Result<u64> {
    let mut bytes = [0; 8];
    from.read_exact(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

fn expect(wanted: u64, found: u64) -> io::Result<()> {
    if wanted == found {
        return Ok(());
    }
    Err(io::Error::other(format!("a register holds {found:#x}")))
}
