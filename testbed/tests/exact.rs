//! Dirty tracking reports exactly the pages that the guest has written: none too few, which would
//! lose memory, and none too many, which would cost time.

use std::collections::BTreeSet;
use std::time::Duration;

use ferry_engine::qemu::{Options, Qemu as Attached, Side};
use ferry_engine::vmm::{Rearm, Tracker};
use ferry_testbed::tiny::{Control, FIRST_HIGH_PAGE, Order, STATUS_PAGE};
use ferry_testbed::{Accel, Backing, Machine, Populate, QemuVersion, Turn};
use tokio::runtime::Runtime;

const BOUND: Duration = Duration::from_secs(60);

const MIB: u64 = 128;

/// Small pages in one of hugetlbfs: one byte dirties them all.
const HUGE_PAGE: u64 = 512;

/// Orders of every shape: single pages, runs, combs, all there is.
fn orders() -> Vec<Order> {
    let first = u32::try_from(FIRST_HIGH_PAGE).unwrap();
    let all = u32::try_from(MIB << 8).unwrap() - first;
    let order = |at, pages, stride| Order {
        first: first + at,
        pages,
        stride,
    };
    vec![
        order(0, 1, 1),
        order(all - 1, 1, 1),
        order(511, 2, 1),
        order(0, all, 1),
        order(0, 0, 1),
        order(1, all / 2, 2),
        order(7, 40, 512),
        order(100, 5000, 3),
        order(0, all, 1),
    ]
}

fn collect(tracker: &mut dyn Tracker, rearm: Rearm) -> BTreeSet<u64> {
    let mut pages = BTreeSet::new();
    tracker
        .collect(rearm, &mut |found| {
            if let Some((region, range)) = found.written() {
                assert_eq!(region.0, 0);
                pages.extend(range.first.0..range.end().0);
            }
        })
        .unwrap();
    pages
}

/// What must be reported for these pages, when `unit` of them are always written together.
fn expected(pages: impl Iterator<Item = u64>, unit: u64) -> BTreeSet<u64> {
    // The guest counts on its status page all the time.
    pages
        .chain([STATUS_PAGE])
        .flat_map(|page| {
            let first = page - page % unit;
            first..first + unit
        })
        .collect()
}

fn is_exact(machine: &Machine, unit: u64) {
    let qemu = machine.clone().tiny().start().unwrap();
    let mut control = Control::attach(qemu.ram(), BOUND).unwrap();
    let runtime = Runtime::new().unwrap();
    let address = ferry_qmp::Address::Unix(qemu.qmp_path());
    let attached = runtime
        .block_on(Attached::attach(&address, &Options::default()))
        .unwrap();
    let mut tracker = attached.vm(Side::Source).unwrap().tracker;
    tracker.start(&mut |_| ()).unwrap();
    for order in orders() {
        control.carry_out(order, BOUND).unwrap();
        let expected = expected(order.pages(), unit);
        // A look changes nothing.
        for rearm in [Rearm::No, Rearm::Yes] {
            let found = collect(&mut *tracker, rearm);
            let missing: Vec<_> = expected.difference(&found).take(3).collect();
            let surplus: Vec<_> = found.difference(&expected).take(3).collect();
            assert!(
                missing.is_empty() && surplus.is_empty(),
                "{order:?} {rearm:?}: missing {missing:?}, too many {surplus:?}; {} for {}",
                found.len(),
                expected.len(),
            );
        }
    }
    tracker.stop().unwrap();
}

fn on_every_backing(accel: Accel) {
    let machine = |version| Machine::new(version, MIB).accel(accel);
    for version in QemuVersion::ALL {
        is_exact(&machine(version), 1);
        is_exact(&machine(version).backing(Backing::HugeTmpfs), 1);
        is_exact(&machine(version).backing(Backing::Hugetlb), HUGE_PAGE);
    }
    let allocated = machine(QemuVersion::V10_0).populate(Populate::AtStart);
    is_exact(&allocated, 1);
    is_exact(&allocated.backing(Backing::HugeTmpfs), 1);
}

#[test]
fn under_tcg() {
    let _turn = Turn::take().unwrap();
    on_every_backing(Accel::Tcg);
}

#[test]
fn under_kvm() {
    let _turn = Turn::take().unwrap();
    let Some(kvm) = Accel::kvm() else { return };
    on_every_backing(kvm);
}
