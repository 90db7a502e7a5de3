//! Guest RAM in every form: several regions, huge pages, allocated ahead or not, full of old bytes.

use std::fs::OpenOptions;
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;

use ferry_testbed::{Backing, Linux, Machine, Populate, Qemu, QemuVersion, Ram, Turn};
use serde_json::json;

use crate::pair::{BOUND, Pair, small};

const SUSPENDED: [&str; 2] = ["--suspend", "--keep-source"];

fn of_mib(mib: u64) -> Machine {
    let linux = Linux::filling_mib(64).writing_pages_per_s(1000);
    Machine::new(QemuVersion::V10_0, mib).linux(linux)
}

fn plug_dimm(qemu: &Qemu, name: &str, mib: u64) {
    let path = qemu.ram().path().with_file_name(name);
    let backend = json!({
        "qom-type": "memory-backend-file", "id": name, "mem-path": path, "size": mib << 20,
        "share": true,
    });
    qemu.execute("object-add", &backend).unwrap();
    let dimm = json!({ "driver": "pc-dimm", "id": format!("slot-{name}"), "memdev": name });
    qemu.execute("device_add", &dimm).unwrap();
}

/// Old bytes of somebody else's.
fn fill_with_random(ram: &Ram) {
    let mut random = std::fs::File::open("/dev/urandom").unwrap();
    let file = OpenOptions::new().write(true).open(ram.path()).unwrap();
    let mut chunk = vec![0; 1 << 20];
    random.read_exact(&mut chunk).unwrap();
    for at in (0..ram.len().unwrap()).step_by(chunk.len()) {
        chunk.rotate_left(1);
        file.write_all_at(&chunk, at).unwrap();
    }
}

#[test]
fn several_regions_move_also_when_plugged_late() {
    let _turn = Turn::take().unwrap();
    for version in QemuVersion::ALL {
        let linux = Linux::filling_mib(256).writing_pages_per_s(1000);
        let machine = Machine::new(version, 192)
            .node(256)
            .dimm(128)
            .linux(linux)
            .arg("-m")
            .arg("448M,slots=2,maxmem=2G");
        let source = machine.start().unwrap();
        let page = source.wait_for_guest(BOUND).unwrap();
        // Linux fills both nodes, or it could not run.
        let second = source.rams()[1].allocated_bytes().unwrap();
        assert!(second > 32 << 20, "{second}");
        plug_dimm(&source, "late", 128);
        let target = machine.incoming().start().unwrap();
        plug_dimm(&target, "late", 128);
        let pair = Pair::of(source, Some(page), target);
        let mut args = SUSPENDED.to_vec();
        args.push("--live");
        pair.begin(&args).moved();
    }
}

#[test]
fn huge_pages_of_hugetlbfs_move() {
    let _turn = Turn::take().unwrap();
    let small_pages = of_mib(224);
    let huge_pages = small_pages.clone().backing(Backing::Hugetlb);
    for (source, target) in [
        (&huge_pages, &huge_pages),
        (&huge_pages, &small_pages),
        (&small_pages, &huge_pages),
    ] {
        Pair::boot_towards(source, target).begin(&SUSPENDED).moved();
    }
    Pair::boot(&huge_pages).move_live();
}

#[test]
fn huge_pages_of_tmpfs_move() {
    let _turn = Turn::take().unwrap();
    let machine = small(QemuVersion::V10_0).backing(Backing::HugeTmpfs);
    let mut pair = Pair::boot(&machine);
    pair.move_live();
    pair = pair.onwards(&machine);
    pair.begin(&SUSPENDED).moved();
}

/// What is zero costs nothing, allocated or not, and stays as it is.
#[test]
fn zeros_are_not_sent_and_allocate_nothing() {
    let _turn = Turn::take().unwrap();
    let on_demand = of_mib(256).node(1024);
    let allocated = on_demand.clone().populate(Populate::AtStart);
    for (source, target) in [(&on_demand, &allocated), (&allocated, &on_demand)] {
        let pair = Pair::boot_towards(source, target);
        let (before, arrived) = (allocated_bytes(&pair.source), pair.arrived_bytes());
        let args = [&SUSPENDED[..], &["--compression=none"]].concat();
        let moved = pair.begin(&args).moved();
        assert_eq!(allocated_bytes(&pair.source), before);
        let wire = moved.json["bytes_wire"].as_u64().unwrap();
        assert!(wire < 256 << 20, "{}", moved.json);
        // What is written at the target is what was sent, or it had all of it before.
        let grown = pair.arrived_bytes() - arrived;
        assert!(grown < wire + (1 << 20), "{grown} for {wire}");
    }
}

fn allocated_bytes(qemu: &Qemu) -> u64 {
    let rams = qemu.rams().iter();
    rams.map(|ram| ram.allocated_bytes().unwrap()).sum()
}

/// A page that is zero at the source is zero at the target, whatever was there.
#[test]
fn old_bytes_of_the_target_are_gone() {
    let _turn = Turn::take().unwrap();
    for version in QemuVersion::ALL {
        let pair = Pair::boot(&small(version));
        fill_with_random(pair.target.ram());
        pair.begin(&SUSPENDED).moved();
    }
}
