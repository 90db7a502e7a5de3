//! The work on the disk: write a block, flush, read another one back and compare.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use crate::content::{Stream, Writer};
use crate::fields::Field;
use crate::status::Status;
use crate::{PAGE_SIZE, say, sys};

/// Blocks of a page's size that are written, from the start of the disk.
const BLOCKS: usize = 1024;

/// Between two rounds, so that the disk is busy and the guest is not.
const REST: Duration = Duration::from_millis(1);

/// Disk blocks have indices of their own: a page of memory on the disk is then seen as misplaced.
const FIRST_INDEX: u64 = 1 << 40;

/// How many bad blocks or failures are told on the console; all are counted.
const TOLD: u64 = 16;

/// Works for ever.
pub(crate) fn run(path: &Path, writer: &Writer, status: Status) -> io::Result<()> {
    // Past the guest's page cache: what is read back was on the disk.
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(sys::O_DIRECT)
        .open(path)?;
    let mut disk = Disk {
        file,
        writer,
        generations: [0; BLOCKS],
        buffer: sys::allocate(1)?,
    };
    let mut random = Stream::new(FIRST_INDEX, 0, 0);
    loop {
        let [write, read] = [(); 2].map(|()| (random.next() >> 16) as usize % BLOCKS);
        for round in [disk.write(write), disk.read(read)] {
            match round {
                Ok(true) => {}
                Ok(false) => {
                    if status.count(Field::DiskBad) < TOLD {
                        say!("BAD disk block {read}: {:?}", disk.fault(read));
                    }
                }
                Err(error) => {
                    if status.count(Field::DiskErrors) < TOLD {
                        say!("disk error: {error}");
                    }
                }
            }
        }
        status.add(Field::DiskOps, 1);
        std::thread::sleep(REST);
    }
}

struct Disk<'a> {
    file: File,
    writer: &'a Writer,
    /// What each block must hold; 0 when it was never written.
    generations: [u64; BLOCKS],
    buffer: &'static mut [u64],
}

impl Disk<'_> {
    fn write(&mut self, block: usize) -> io::Result<bool> {
        let generation = self.generations[block] + 1;
        self.writer.fill(self.buffer, index(block), generation);
        self.file
            .write_all_at(sys::as_bytes(self.buffer), offset(block))?;
        self.generations[block] = generation;
        self.file.sync_data()?;
        Ok(true)
    }

    /// Whether a block holds what was last written to it.
    fn read(&mut self, block: usize) -> io::Result<bool> {
        if self.generations[block] == 0 {
            return Ok(true);
        }
        self.file
            .read_exact_at(sys::as_bytes(self.buffer), offset(block))?;
        Ok(self
            .writer
            .holds(self.buffer, index(block), self.generations[block]))
    }

    fn fault(&self, block: usize) -> crate::content::Fault {
        self.writer.diagnose(self.buffer, index(block))
    }
}

fn index(block: usize) -> u64 {
    FIRST_INDEX + block as u64
}

fn offset(block: usize) -> u64 {
    (block * PAGE_SIZE) as u64
}
