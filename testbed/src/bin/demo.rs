//! The demonstration: a Linux guest that writes its memory all the time moves to another QEMU, and
//! then says itself whether anything was lost.

use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use ferry_testbed::{
    Ferry, Field, Linux, Machine, Probe, QemuVersion, Seen, StatusPage, TestbedError, wait_until,
};
use serde_json::Value;

const GUEST_MIB: u64 = 1024;
const DATA_MIB: u64 = 512;
const WRITES_PER_S: u64 = 5000;

/// How long each step may take on a slow machine.
const BOUND: Duration = Duration::from_secs(120);

/// How far the guest counts on at the target before the probe ends, so that the curve has an end.
const AFTERMATH_WRITES: u64 = 2000;

fn main() -> Result<(), TestbedError> {
    println!(
        "A Linux guest of {GUEST_MIB} MiB with {DATA_MIB} MiB of random data rewrites \
         {WRITES_PER_S} pages a second,\nand verifies every page before it does.\n"
    );
    let linux = Linux::filling_mib(DATA_MIB).writing_pages_per_s(WRITES_PER_S);
    let machine = Machine::new(QemuVersion::V10_0, GUEST_MIB).linux(linux);

    let step = Step::begin("booting the guest under the source QEMU");
    let source = machine.start()?;
    let page = source.wait_for_guest(BOUND)?;
    step.end();

    let step = Step::begin("starting the target QEMU, and ferry receive");
    let target = machine.clone().incoming().start()?;
    let arrived = target.counterpart(&page);
    let (receive, uri) = Ferry::receive(&target, &[])?;
    step.end();

    println!("  ferry migrate --live --verbose --qmp SOURCE {uri}");
    let probe = Probe::start(page.clone(), Some(arrived.clone()));
    // To show what a move between hosts is like: within this one nothing would travel.
    let args = ["--live", "--verbose", "--within-host=never"];
    let migrate = Ferry::migrate_shown(&source, &uri, &args)?.wait(BOUND)?;
    if migrate.code() != 0 {
        return Err(TestbedError::Program {
            program: "ferry migrate".into(),
            log: migrate.stdout,
        });
    }
    receive.wait(BOUND)?;

    let step = Step::begin("letting the guest verify all of its memory at the target");
    let verified = verify(&arrived)?;
    step.end();
    let seen = probe.finish()?;
    report(&migrate.json(), &seen, verified, arrived.read()?.faults());
    Ok(())
}

/// Waits until the guest has swept over all of its pages, begun and ended at the target; tells how
/// many it verified meanwhile.
fn verify(arrived: &StatusPage) -> Result<u64, TestbedError> {
    let before = arrived.read()?;
    let sweeps = before.value(Field::Sweeps) + 2;
    let writes = before.value(Field::Writes) + AFTERMATH_WRITES;
    wait_until("the guest verifies its memory", BOUND, || {
        let now = arrived.read().ok()?;
        let done = now.value(Field::Sweeps) >= sweeps && now.value(Field::Writes) >= writes;
        done.then(|| now.value(Field::Verified) - before.value(Field::Verified))
    })
}

fn report(moved: &Value, seen: &Seen, verified: u64, bad: u64) {
    let number = |name: &str| moved[name].as_f64().unwrap_or(f64::NAN);
    let rounds = moved["rounds"].as_array().map_or(0, Vec::len);
    let mib = |bytes: f64| bytes / f64::from(1 << 20);
    let seen_ms = seen.blackout.as_secs_f64() * 1e3;
    println!();
    println!(
        "  total                            {:>10.2} s",
        number("total_ms") / 1e3
    );
    println!("  blackout seen by the guest       {seen_ms:>10.1} ms");
    println!(
        "  blackout by the engine's clock   {:>10.1} ms at most",
        number("downtime_ms")
    );
    println!("  rounds                           {rounds:>10}");
    println!(
        "  on the wire                      {:>10.0} MiB",
        mib(number("bytes_wire"))
    );
    println!(
        "  throughput                       {:>10.0} MiB/s",
        mib(number("throughput_bytes_per_s"))
    );
    println!("  pages verified at the target     {verified:>10}");
    println!("  bad pages                        {bad:>10}");
}

/// A line that says what goes on, and then how long it took.
struct Step(Instant);

impl Step {
    fn begin(what: &str) -> Self {
        print!("  {what} … ");
        // The line is read while the step goes on.
        _ = std::io::stdout().flush();
        Self(Instant::now())
    }

    fn end(self) {
        let tick = if std::io::stdout().is_terminal() {
            "✓ "
        } else {
            ""
        };
        println!("{tick}{:.1} s", self.0.elapsed().as_secs_f64());
    }
}
