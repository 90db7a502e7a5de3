//! The bare-metal guest dirties what it is told to, and nothing else.

use std::collections::BTreeMap;
use std::time::Duration;

use ferry_testbed::tiny::{CONTROL_PAGE, Control, FIRST_HIGH_PAGE, Order, STATUS_PAGE};
use ferry_testbed::{Accel, Backing, Field, Machine, PAGE_SIZE, QemuVersion, Turn};

const BOUND: Duration = Duration::from_secs(20);
const MIB: u64 = 64;

/// Every page of RAM that is not zero, with its first word.
fn touched(ram: &ferry_testbed::Ram) -> BTreeMap<u64, u32> {
    let mut pages = BTreeMap::new();
    ram.each_chunk(|offset, chunk| {
        for (at, page) in chunk.chunks_exact(PAGE_SIZE).enumerate() {
            if page.iter().any(|&byte| byte != 0) {
                let word = u32::from_le_bytes(page[..4].try_into().unwrap());
                pages.insert(offset / PAGE_SIZE as u64 + at as u64, word);
            }
        }
    })
    .unwrap();
    pages
}

fn dirties_exactly_its_orders(machine: &Machine) {
    let qemu = machine.start().unwrap();
    let mut control = Control::attach(qemu.ram(), BOUND).unwrap();
    let first = u32::try_from(FIRST_HIGH_PAGE).unwrap();
    let orders = [
        Order {
            first,
            pages: 1000,
            stride: 1,
        },
        Order {
            first: first + 500,
            pages: 300,
            stride: 7,
        },
        Order {
            first: 16,
            pages: 0,
            stride: 1,
        },
        Order {
            first: 16,
            pages: 3,
            stride: 2,
        },
    ];
    let mut expected = BTreeMap::new();
    for order in orders {
        let number = control.carry_out(order, BOUND).unwrap();
        expected.extend(order.pages().map(|page| (page, number)));
    }
    let mut found = touched(qemu.ram());
    assert!(found.remove(&CONTROL_PAGE).is_some());
    assert!(found.remove(&STATUS_PAGE).is_some());
    assert_eq!(found, expected);
    assert_eq!(control.status().value(Field::Writes).unwrap(), 1303);
    let page = qemu.find_status().unwrap().unwrap();
    assert_eq!(page.offset(), control.status().offset());
}

#[test]
fn under_tcg_of_both_qemus() {
    let _turn = Turn::take().unwrap();
    for version in QemuVersion::ALL {
        dirties_exactly_its_orders(&Machine::new(version, MIB).tiny());
    }
}

#[test]
fn under_kvm() {
    let _turn = Turn::take().unwrap();
    let Some(kvm) = Accel::kvm() else { return };
    for version in QemuVersion::ALL {
        dirties_exactly_its_orders(&Machine::new(version, MIB).tiny().accel(kvm));
    }
}

#[test]
fn on_huge_pages_of_tmpfs() {
    let _turn = Turn::take().unwrap();
    let machine = Machine::new(QemuVersion::V10_0, MIB).tiny();
    dirties_exactly_its_orders(&machine.backing(Backing::HugeTmpfs));
}
