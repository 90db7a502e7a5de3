//! A Linux guest that writes all the time, moved by the QEMU adapter's parts alone: what the engine
//! does in a move, by hand and without a link.

use std::io::{self, Cursor, Write};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ferry_engine::core::layout::{PageRange, RegionIndex};
use ferry_engine::qemu::{Options, Qemu as Attached, Side};
use ferry_engine::vmm::{PauseFor, Rearm, Vm};
use ferry_qmp::Address;
use ferry_testbed::{
    Device, Disk, DiskFormat, Field, Linux, Machine, Probe, Qemu, QemuVersion, StatusPage, Turn,
    wait_until,
};
use tokio::runtime::Runtime;

const BOOT_BOUND: Duration = Duration::from_secs(60);
const BOUND: Duration = Duration::from_secs(30);

#[derive(Clone, Default)]
struct Kept(Arc<Mutex<Vec<u8>>>);

impl Write for Kept {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn attach(runtime: &Runtime, qemu: &Qemu, side: Side) -> Vm {
    let address = Address::Unix(qemu.qmp_path());
    let attached = runtime.block_on(Attached::attach(&address, &Options::default()));
    let attached = attached.unwrap();
    assert_eq!(runtime.block_on(attached.problems(side)).unwrap(), []);
    attached.vm(side).unwrap()
}

fn copy(from: &Vm, to: &Vm, region: RegionIndex, range: PageRange) {
    let mut bytes = vec![0; usize::try_from(range.byte_len()).unwrap()];
    from.ram.read(region, range, &mut bytes).unwrap();
    to.ram.write(region, range, &bytes).unwrap();
}

fn copy_written(from: &mut Vm, to: &Vm, rearm: Rearm) -> u64 {
    let mut written = Vec::new();
    from.tracker
        .collect(rearm, &mut |found| written.extend(found.written()))
        .unwrap();
    for &(region, range) in &written {
        copy(from, to, region, range);
    }
    written.iter().map(|(_, range)| range.count).sum()
}

fn moves(source: &Qemu, target: &Qemu, page: &StatusPage) {
    let runtime = Runtime::new().unwrap();
    let mut from = attach(&runtime, source, Side::Source);
    let mut to = attach(&runtime, target, Side::Target);
    to.ram.blank().unwrap();
    to.state.prepare().unwrap();
    let kept = Kept::default();
    from.state.open(Box::new(kept.clone())).unwrap();
    let there = target.counterpart(page);
    let probe = Probe::start(page.clone(), Some(there.clone()));

    from.tracker.start(&mut |_| ()).unwrap();
    for (index, region) in from.ram.layout().iter() {
        let copy = &mut |range| copy(&from, &to, index, range);
        from.ram.populated(index, region.all(), copy).unwrap();
    }
    copy_written(&mut from, &to, Rearm::Yes);
    from.guest.flusher()().unwrap();
    let before = copy_written(&mut from, &to, Rearm::Yes);
    let stopped = from.guest.pause(PauseFor::Switchover).unwrap();
    let paused = copy_written(&mut from, &to, Rearm::Yes);
    from.state.save().unwrap();
    let saved = copy_written(&mut from, &to, Rearm::No);
    let state = kept.0.lock().unwrap().clone();
    to.state.load(&mut Cursor::new(&state)).unwrap();
    to.guest.resume().unwrap();
    let blackout = stopped.at.elapsed();
    from.tracker.stop().unwrap();
    from.guest.quit().unwrap();
    to.guest.restore().unwrap();

    let sweeps = there.value(Field::Sweeps).unwrap();
    let writes = there.value(Field::Writes).unwrap();
    wait_until("the guest verifies everything there", BOUND, || {
        let status = there.read().unwrap();
        let done = status.value(Field::Sweeps) >= sweeps + 2;
        (done && status.value(Field::Writes) > writes).then_some(())
    })
    .unwrap();
    assert_eq!(there.read().unwrap().faults(), 0);
    println!(
        "pages: {before} before the pause, {paused} in it, {saved} by the save; state {} KiB; \
         blackout {blackout:?}, seen by the guest {:?}",
        state.len() >> 10,
        probe.finish().unwrap().blackout
    );
}

#[test]
fn a_linux_guest_moves_by_the_adapters_parts() {
    let _turn = Turn::take().unwrap();
    for (from, to, format) in [
        (QemuVersion::V7_2, QemuVersion::V7_2, DiskFormat::Raw),
        (QemuVersion::V10_0, QemuVersion::V10_0, DiskFormat::Qcow2),
        (QemuVersion::V7_2, QemuVersion::V10_0, DiskFormat::Qcow2),
    ] {
        let disk = Disk::create(format, 64).unwrap();
        let machine = |version| {
            let linux = Linux::filling_mib(64).writing_pages_per_s(2000);
            let path = disk.path().to_owned();
            Machine::new(version, 256)
                .node(64)
                .linux(linux.verifying_disk())
                .device(Device::Disk { format, path })
                .device(Device::Net)
                .device(Device::Rng)
                .device(Device::Tablet)
                .device(Device::Vga)
        };
        let source = machine(from).start().unwrap();
        let page = source.wait_for_guest(BOOT_BOUND).unwrap();
        let target = machine(to).incoming().start().unwrap();
        moves(&source, &target, &page);
    }
}
