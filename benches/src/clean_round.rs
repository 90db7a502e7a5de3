//! What it costs the engine to look through a guest's RAM and find nothing.
//!
//! Measured with the engine's own tracker on a real QEMU whose guest rests: all of its RAM is scanned
//! and nothing is reported. A round has the exchange of its markers besides, which does not grow with
//! the guest.

use std::time::{Duration, Instant};

use ferry_engine::qemu::{Options, Qemu as Attached, Side};
use ferry_engine::vmm::{Rearm, Tracker, VmmError};
use ferry_testbed::{Qemu, TestbedError};

use crate::figures::{Spread, mib};
use crate::guest::failed;

/// Scans of which the median counts.
const SCANS: usize = 21;

/// The median of some scans of a resting guest, in ms for each GiB of its RAM.
pub fn measure(qemu: &Qemu) -> Result<f64, TestbedError> {
    let bytes: u64 = {
        let lengths = qemu.rams().iter().map(ferry_testbed::Ram::len);
        lengths.collect::<Result<Vec<_>, _>>()?.iter().sum()
    };
    let scan = with_tracker(qemu, scan)?;
    Ok(scan.as_secs_f64() * 1e3 / (mib(bytes) / 1024.0))
}

/// Attaches the engine to a QEMU, lends its tracker, and leaves QEMU as it was.
pub fn with_tracker<T>(
    qemu: &Qemu,
    work: impl FnOnce(&mut dyn Tracker) -> Result<T, VmmError>,
) -> Result<T, TestbedError> {
    attach(qemu, work).map_err(|error| failed("the engine's tracker", &error.to_string()))
}

fn attach<T>(
    qemu: &Qemu,
    work: impl FnOnce(&mut dyn Tracker) -> Result<T, VmmError>,
) -> Result<T, VmmError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .map_err(|error| VmmError::io("start a runtime", error))?;
    let address = ferry_qmp::Address::Unix(qemu.qmp_path());
    let options = Options::default();
    runtime.block_on(async {
        let attached = Attached::attach(&address, &options).await?;
        let mut vm = attached.vm(Side::Source)?;
        let result = work(vm.tracker.as_mut());
        // Whatever came of it.
        vm.tracker.stop()?;
        result
    })
}

/// The median of some scans that find nothing.
fn scan(tracker: &mut dyn Tracker) -> Result<Duration, VmmError> {
    tracker.start(&mut |_| ())?;
    // The first finds what was never protected.
    tracker.collect(Rearm::Yes, &mut |_| ())?;
    let mut times = Vec::new();
    for _ in 0..SCANS {
        let began = Instant::now();
        tracker.collect(Rearm::Yes, &mut |_| ())?;
        times.push(began.elapsed().as_secs_f64());
    }
    let spread = Spread::of(times).expect("there is more than one scan");
    Ok(Duration::from_secs_f64(spread.median))
}
