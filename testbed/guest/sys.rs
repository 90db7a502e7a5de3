//! All unsafe code of the guest: the C library's functions that std does not offer.

use std::ffi::{CStr, c_char, c_int, c_long, c_ulong, c_void};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::AtomicU64;

use crate::PAGE_SIZE;

const PROT_READ_WRITE: c_int = 0x3;
const MAP_PRIVATE_ANONYMOUS_POPULATE: c_int = 0x02 | 0x20 | 0x8000;
const MCL_CURRENT_AND_FUTURE: c_int = 0x1 | 0x2;
const SYS_FINIT_MODULE: c_long = 313;
/// Opens a file for I/O that bypasses the guest's page cache.
pub(crate) const O_DIRECT: c_int = 0x4000;

/// What `reboot(2)` is asked for.
#[derive(Clone, Copy)]
#[repr(i32)]
pub(crate) enum Power {
    Off = 0x4321_fedc,
    Reset = 0x0123_4567,
}

unsafe extern "C" {
    fn mount(
        source: *const c_char,
        target: *const c_char,
        kind: *const c_char,
        flags: c_ulong,
        data: *const c_void,
    ) -> c_int;
    fn mmap(
        addr: *mut c_void,
        len: usize,
        prot: c_int,
        flags: c_int,
        fd: c_int,
        offset: i64,
    ) -> *mut c_void;
    fn mlockall(flags: c_int) -> c_int;
    fn reboot(command: c_int) -> c_int;
    fn syscall(number: c_long, ...) -> c_long;
}

/// Mounts a file system that needs no device.
pub(crate) fn mount_fs(kind: &CStr, target: &CStr) -> io::Result<()> {
    // SAFETY: three valid C strings that outlive the call; no data.
    let done = unsafe {
        mount(
            kind.as_ptr(),
            target.as_ptr(),
            kind.as_ptr(),
            0,
            std::ptr::null(),
        )
    };
    check(done)
}

/// Loads a kernel module.
pub(crate) fn load_module(file: &File) -> io::Result<()> {
    let none: &CStr = c"";
    // SAFETY: finit_module takes a descriptor, a C string and flags; all outlive the call.
    let done = unsafe {
        syscall(
            SYS_FINIT_MODULE,
            file.as_raw_fd(),
            none.as_ptr(),
            0 as c_int,
        )
    };
    check(if done == 0 { 0 } else { -1 })
}

/// Keeps every page of this process where it is, now and later.
pub(crate) fn lock_memory() -> io::Result<()> {
    // SAFETY: takes no pointer.
    check(unsafe { mlockall(MCL_CURRENT_AND_FUTURE) })
}

/// Turns the machine off or resets it; returns only when that fails.
pub(crate) fn power(what: Power) -> io::Error {
    // SAFETY: takes no pointer.
    unsafe { reboot(what as c_int) };
    io::Error::last_os_error()
}

/// `pages` pages of zeroed, populated memory as words, never freed.
pub(crate) fn allocate(pages: usize) -> io::Result<&'static mut [u64]> {
    let bytes = pages * PAGE_SIZE;
    // SAFETY: a fresh anonymous mapping at an address of the kernel's choice.
    let at = unsafe {
        mmap(
            std::ptr::null_mut(),
            bytes,
            PROT_READ_WRITE,
            MAP_PRIVATE_ANONYMOUS_POPULATE,
            -1,
            0,
        )
    };
    if at as isize == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the mapping is page-aligned, `bytes` long, zeroed, ours alone and never unmapped.
    Ok(unsafe { std::slice::from_raw_parts_mut(at.cast(), bytes / size_of::<u64>()) })
}

/// The words of a page as atomics: the host looks at them at any time.
pub(crate) fn as_atomics(words: &'static mut [u64]) -> &'static [AtomicU64] {
    // SAFETY: AtomicU64 has the size and alignment of u64, and the exclusive borrow is given up.
    unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), words.len()) }
}

/// The words of a page as bytes, for disk I/O.
pub(crate) fn as_bytes(words: &mut [u64]) -> &mut [u8] {
    // SAFETY: every byte of a u64 is a valid u8 and any bytes are valid words.
    unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), size_of_val(words)) }
}

fn check(result: c_int) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
