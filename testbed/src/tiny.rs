//! A bare-metal guest that dirties exactly the pages it is told to.
//!
//! An operating system dirties pages of its own all the time; to prove dirty tracking exact, both
//! ends must know every page. This guest is a whole BIOS of a few dozen instructions: from reset it
//! goes to 32-bit protected mode and obeys the control page, which the host writes through the RAM
//! file. It never writes anywhere but to the pages of its orders and to its status page, and it runs
//! where the accelerator can run next to nothing.
//!
//! ```text
//! page 1  control, written by the host alone     go, first page, pages, stride
//! page 2  status, written by the guest alone     as every guest's: see `Field`
//! ```
//!
//! An order dirties `pages` pages, `stride` apart, from page `first` on: the number of the order is
//! written to the first four bytes of each. `Field::Sweeps` is the last order carried out,
//! `Field::Writes` counts the pages.
#![allow(unsafe_code)]
#![allow(
    clippy::cast_possible_truncation,
    reason = "the guest's words have 32 bits, and a usize holds every u64"
)]

use std::arch::global_asm;
use std::fs::OpenOptions;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use memmap2::{MmapOptions, MmapRaw};

use crate::fields::{Field, MAGIC, VERSION};
use crate::{PAGE_SIZE, Ram, StatusPage, TestbedError, wait_until};

/// The page that only the host writes.
pub const CONTROL_PAGE: u64 = 1;

/// The page that the guest writes all the time.
pub const STATUS_PAGE: u64 = 2;

/// The first page that an order may name.
pub const FIRST_FREE_PAGE: u64 = 3;

/// The pages below are RAM without a gap; from here on lie the ROMs and the video memory.
pub const FIRST_LEGACY_PAGE: u64 = 0xa0;

/// From this page on all is RAM again, up to the size of the machine or 2 GiB.
pub const FIRST_HIGH_PAGE: u64 = 0x100;

/// Size of the image in bytes: QEMU wants a multiple of 64 KiB.
const IMAGE_BYTES: usize = 64 << 10;

/// What is mapped to write the control page: one page of the largest backing.
const WINDOW_BYTES: usize = 2 << 20;

/// Words of the control page.
const GO: usize = 0;
const FIRST: usize = 1;
const PAGES: usize = 2;
const STRIDE: usize = 3;

// The last page below 4 GiB, where a CPU begins. Its code segment is based 64 KiB below 4 GiB.
global_asm!(
    r#"
    .pushsection .rodata.ferry_tiny, "a"
    .balign 16
    .set base, 0xfffff000
    .set control, 0x1000
    .set status, 0x2000
ferry_tiny_begin:
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff        # code: flat, accessed already, for it is in ROM
    .quad 0x00cf93000000ffff        # data: likewise
gdtr:
    .word 23
    .long base + (gdt - ferry_tiny_begin)

    .code32
protected:
    movw $0x10, %ax
    movw %ax, %ds
    movw %ax, %es
    xorl %ebx, %ebx                 # the last order carried out
    movl ${version}, status + {at_version}
    movl $1, status + {at_booted}
    movl $1, status + {at_filled}
    movl ${magic1}, status + 4
    movl ${magic2}, status + 8
    movl ${magic3}, status + 12
    movl ${magic0}, status
wait_for_order:
    pause
    addl $1, status + {at_progress}
    adcl $0, status + {at_progress} + 4
    movl control, %eax
    cmpl %ebx, %eax
    je wait_for_order

    movl control + 4, %edi
    shll $12, %edi
    movl control + 8, %ecx
    movl control + 12, %edx
    shll $12, %edx
    testl %ecx, %ecx
    jz done
next_page:
    movl %eax, (%edi)
    addl %edx, %edi
    addl $1, status + {at_progress}
    adcl $0, status + {at_progress} + 4
    addl $1, status + {at_writes}
    adcl $0, status + {at_writes} + 4
    decl %ecx
    jnz next_page
done:
    movl %eax, %ebx
    movl %eax, status + {at_sweeps}
    jmp wait_for_order

    .code16
real:
    cli
    inb $0x92, %al                  # address line 20 on
    orb $2, %al
    outb %al, $0x92
    lgdtl %cs:0xf000 + (gdtr - ferry_tiny_begin)
    movl %cr0, %eax
    orb $1, %al
    movl %eax, %cr0
    ljmpl $8, $base + (protected - ferry_tiny_begin)

    .org ferry_tiny_begin + 0xff0
    jmp real                        # the reset vector
    .org ferry_tiny_begin + 0x1000
    .code64
    .popsection
    "#,
    version = const VERSION as u32,
    magic0 = const MAGIC[0] as u32,
    magic1 = const (MAGIC[0] >> 32) as u32,
    magic2 = const MAGIC[1] as u32,
    magic3 = const (MAGIC[1] >> 32) as u32,
    at_version = const Field::Version as usize,
    at_booted = const Field::BootedAtNs as usize,
    at_filled = const Field::Filled as usize,
    at_progress = const Field::Progress as usize,
    at_writes = const Field::Writes as usize,
    at_sweeps = const Field::Sweeps as usize,
    options(att_syntax)
);

unsafe extern "C" {
    #[link_name = "ferry_tiny_begin"]
    static CODE: [u8; PAGE_SIZE];
}

/// The BIOS image (`-bios`).
pub fn image() -> Vec<u8> {
    // SAFETY: the assembly above defines exactly a page of constant bytes at this label.
    let code = unsafe { &CODE };
    let mut image = vec![0; IMAGE_BYTES - PAGE_SIZE];
    image.extend_from_slice(code);
    image
}

/// Pages to dirty: `pages` of them, `stride` apart, from `first` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Order {
    /// The first page.
    pub first: u32,
    /// How many.
    pub pages: u32,
    /// From one to the next.
    pub stride: u32,
}

impl Order {
    /// The numbers of the pages, in order.
    pub fn pages(self) -> impl Iterator<Item = u64> {
        (0..u64::from(self.pages))
            .map(move |at| u64::from(self.first) + at * u64::from(self.stride))
    }
}

/// The host's hand on the control page of a running guest.
#[derive(Debug)]
pub struct Control {
    window: MmapRaw,
    status: StatusPage,
    last: u32,
}

impl Control {
    /// Waits until the guest in `ram` obeys orders.
    pub fn attach(ram: &Ram, bound: Duration) -> Result<Self, TestbedError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(ram.path())
            .map_err(TestbedError::io("open guest RAM for writing"))?;
        // A mapping, because hugetlbfs knows no write(2).
        let window = MmapOptions::new()
            .len(WINDOW_BYTES)
            .map_raw(&file)
            .map_err(TestbedError::io("map guest RAM"))?;
        let status = ram.status_at(STATUS_PAGE * PAGE_SIZE as u64);
        wait_until("the bare-metal guest is ready", bound, || {
            match status.value(Field::Filled) {
                Ok(0) => None,
                Ok(_) => Some(Ok(())),
                Err(error) => Some(Err(error)),
            }
        })??;
        // A guest that has moved here has carried out orders already; they number 32 bits.
        let last = status.value(Field::Sweeps)? as u32;
        Ok(Self {
            window,
            status,
            last,
        })
    }

    /// The guest's counters.
    pub fn status(&self) -> &StatusPage {
        &self.status
    }

    /// Gives an order without waiting for it; its number.
    pub fn order(&mut self, order: Order) -> u32 {
        self.last += 1;
        self.word(FIRST).store(order.first, Ordering::Relaxed);
        self.word(PAGES).store(order.pages, Ordering::Relaxed);
        self.word(STRIDE).store(order.stride, Ordering::Relaxed);
        self.word(GO).store(self.last, Ordering::Release);
        self.last
    }

    /// Gives an order and waits until it is carried out; its number.
    pub fn carry_out(&mut self, order: Order, bound: Duration) -> Result<u32, TestbedError> {
        let number = self.order(order);
        wait_until(
            "the bare-metal guest has done its order",
            bound,
            || match self.status.value(Field::Sweeps) {
                Ok(done) => (done == u64::from(number)).then_some(Ok(number)),
                Err(error) => Some(Err(error)),
            },
        )?
    }

    fn word(&self, index: usize) -> &AtomicU32 {
        let page = self.window.as_mut_ptr();
        let at = PAGE_SIZE * CONTROL_PAGE as usize + index * size_of::<u32>();
        // SAFETY: within the window, which is far longer than the control page.
        let word = unsafe { page.add(at) };
        // SAFETY: aligned, mapped as long as `self` lives, and only accessed atomically; the guest
        // on the other side only reads it.
        unsafe { AtomicU32::from_ptr(word.cast()) }
    }
}
