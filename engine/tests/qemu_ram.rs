//! Finding guest RAM in real QEMUs, whatever it is made of.
#![cfg(feature = "qemu")]

mod qemu_support;

use std::fs::{self, File};

use ferry_engine::core::layout::{PAGE_SIZE, PageRange, RegionIndex};
use ferry_engine::qemu::Side;
use ferry_engine::vmm::{Rearm, Vm};
use nix::fcntl::{Flock, FlockArg};
use qemu_support::{Machine, RamPath, VERSIONS, fill_guest, runtime};
use serde_json::json;

/// The page of a region that a test writes, and what into it.
const PAGE: u64 = 5;
const MARK: u8 = 0xa7;

/// Proves that every region is where the adapter says: what is written to the guest at `starts` (one
/// guest address for each region, in the layout's order) is read in that page of that region, and
/// reported as written there.
fn regions_are_at(machine: &Machine, vm: &mut Vm, starts: &[(&str, u64)]) {
    let qtest = machine.folder.path().join("qtest");
    let names: Vec<String> = vm
        .ram
        .layout()
        .iter()
        .map(|(_, region)| region.name.clone())
        .collect();
    assert_eq!(
        names,
        starts.iter().map(|(name, _)| *name).collect::<Vec<_>>()
    );
    vm.tracker.start(&mut |_| ()).unwrap();
    for (number, (_, start)) in starts.iter().enumerate() {
        let index = RegionIndex(u16::try_from(number).unwrap());
        let page_bytes = PAGE_SIZE as u64;
        fill_guest(&qtest, start + PAGE * page_bytes, page_bytes, MARK);
        let mut bytes = vec![0; PAGE_SIZE];
        vm.ram
            .read(index, PageRange::new(PAGE, 1), &mut bytes)
            .unwrap();
        assert!(
            bytes.iter().all(|byte| *byte == MARK),
            "{starts:?} {number}"
        );
        let mut written = Vec::new();
        vm.tracker
            .collect(Rearm::Yes, &mut |found| written.extend(found.written()))
            .unwrap();
        let region = vm.ram.layout().region(index).unwrap();
        let unit = u64::from(region.backing_page_bytes) / page_bytes;
        assert_eq!(
            written,
            [(index, PageRange::new(PAGE / unit * unit, unit))],
            "{starts:?}"
        );
    }
    vm.tracker.stop().unwrap();
}

/// Starts a machine whose vCPUs never run, so that the test alone writes its memory.
fn start(version: &str, arguments: &[&str]) -> Machine {
    // The monitors' folder is not known before: QEMU is started within it.
    let still = [
        "-S",
        "-qtest",
        "unix:qtest,server=on,wait=off",
        "-qtest-log",
        "none",
    ];
    Machine::start_bare(version, &[&still, arguments].concat())
}

#[test]
fn one_back_end() {
    let runtime = runtime();
    for version in VERSIONS {
        let ram = RamPath::new();
        for machine in ["pc-q35-7.2", "pc-i440fx-3.1"] {
            let machine = format!("{machine},memory-backend=main");
            let backend = ram.backend("main", 64);
            let machine = start(
                version,
                &["-m", "64M", "-object", &backend, "-machine", &machine],
            );
            let mut vm = machine.vm(&runtime, Side::Source);
            regions_are_at(&machine, &mut vm, &[("main", 0)]);
        }
    }
}

/// Two nodes in one folder: QEMU unlinks such files, and both have the same name up to a suffix.
#[test]
fn numa_nodes_in_a_folder() {
    let runtime = runtime();
    for version in VERSIONS {
        let backend =
            |id| format!("memory-backend-file,id={id},size=64M,mem-path=/dev/shm,share=on");
        let (high, low) = (backend("a-high"), backend("b-low"));
        let machine = start(
            version,
            &[
                "-m",
                "128M",
                "-object",
                &high,
                "-object",
                &low,
                "-numa",
                "node,memdev=b-low",
                "-numa",
                "node,memdev=a-high",
            ],
        );
        let mut vm = machine.vm(&runtime, Side::Source);
        regions_are_at(&machine, &mut vm, &[("a-high", 64 << 20), ("b-low", 0)]);
    }
}

/// A file that was given by a link, and whose name has been taken by another one since.
#[test]
fn names_are_not_trusted() {
    let runtime = runtime();
    for version in VERSIONS {
        let ram = RamPath::new();
        let link = RamPath::new();
        fs::write(&ram.0, "").unwrap();
        std::os::unix::fs::symlink(&ram.0, &link.0).unwrap();
        let backend = link.backend("main", 64);
        let machine = "pc-q35-7.2,memory-backend=main";
        let machine = start(
            version,
            &["-m", "64M", "-object", &backend, "-machine", machine],
        );
        // QEMU listens before it has made its RAM, and answers only afterwards.
        machine.operator(&runtime).status();
        fs::remove_file(&ram.0).unwrap();
        fs::write(&ram.0, "another file").unwrap();
        let mut vm = machine.vm(&runtime, Side::Source);
        regions_are_at(&machine, &mut vm, &[("main", 0)]);
    }
}

#[test]
fn dimms_cold_and_hot_and_a_spare() {
    let runtime = runtime();
    for version in VERSIONS {
        let files = [RamPath::new(), RamPath::new(), RamPath::new()];
        let [main, cold, spare] = [("main", 64), ("cold", 128), ("spare", 32)];
        let backends = [
            files[0].backend(main.0, main.1),
            files[1].backend(cold.0, cold.1),
            files[2].backend(spare.0, spare.1),
        ];
        let machine = start(
            version,
            &[
                "-machine",
                "pc-q35-7.2,memory-backend=main",
                "-m",
                "64M,slots=4,maxmem=1G",
                "-object",
                &backends[0],
                "-object",
                &backends[1],
                "-object",
                &backends[2],
                "-device",
                "pc-dimm,id=dimm0,memdev=cold",
            ],
        );
        let operator = machine.operator(&runtime);
        let hot = json!({
            "qom-type": "memory-backend-file", "id": "hot", "size": 128 << 20,
            "mem-path": "/dev/shm", "share": true,
        });
        operator.run("object-add", hot);
        operator.run(
            "device_add",
            json!({"driver": "pc-dimm", "id": "dimm1", "memdev": "hot"}),
        );
        let devices = operator.ask("query-memory-devices");
        let at = |id: &str| {
            let devices = devices.as_array().unwrap();
            let device = devices.iter().find(|device| device["data"]["id"] == id);
            device.unwrap()["data"]["addr"].as_u64().unwrap()
        };
        let mut vm = machine.vm(&runtime, Side::Source);
        let starts = [("cold", at("dimm0")), ("hot", at("dimm1")), ("main", 0)];
        regions_are_at(&machine, &mut vm, &starts);
        let inventory = vm.guest.inventory().unwrap();
        assert_eq!(inventory.layout, *vm.ram.layout());
        assert_eq!(inventory.machine, "pc-q35-7.2");
        assert_eq!(inventory.arch, "x86_64");
        assert!(
            inventory.devices.contains(&"dimm0 (pc-dimm)".to_owned()),
            "{inventory:?}"
        );

        let another = json!({"driver": "pc-dimm", "id": "dimm2", "memdev": "spare"});
        operator.run("device_add", another);
        assert_ne!(vm.guest.inventory().unwrap().devices, inventory.devices);
    }
}

/// A hugetlbfs and the pages for it, for as long as it lives.
struct HugePages {
    folder: tempfile::TempDir,
    count: i64,
}

impl HugePages {
    fn mount(count: i64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let gained = change_pool(count);
        let mounted = nix::mount::mount(
            Some("none"),
            folder.path(),
            Some("hugetlbfs"),
            nix::mount::MsFlags::empty(),
            Some("pagesize=2M"),
        );
        let mount = Self {
            folder,
            count: gained,
        };
        mounted.expect("mounting a hugetlbfs needs root");
        assert_eq!(gained, count, "the host has too little memory");
        mount
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = nix::mount::umount(self.folder.path());
        change_pool(-self.count);
    }
}

/// Adds to the host's pool of huge pages, and says how many it has gained. The pool's file is the
/// lock: tests in other processes change it too.
fn change_pool(by: i64) -> i64 {
    const POOL: &str = "/proc/sys/vm/nr_hugepages";
    let _lock = Flock::lock(File::open(POOL).unwrap(), FlockArg::LockExclusive).unwrap();
    let size = || -> i64 { fs::read_to_string(POOL).unwrap().trim().parse().unwrap() };
    let before = size();
    fs::write(POOL, (before + by).to_string()).unwrap();
    size() - before
}

#[test]
fn huge_pages() {
    let runtime = runtime();
    for version in VERSIONS {
        let pages = HugePages::mount(40);
        let backend = format!(
            "memory-backend-file,id=main,size=64M,mem-path={},share=on",
            pages.folder.path().display()
        );
        let machine = "pc-q35-7.2,memory-backend=main";
        let machine = start(
            version,
            &["-m", "64M", "-object", &backend, "-machine", machine],
        );
        let mut vm = machine.vm(&runtime, Side::Source);
        let page_bytes = vm
            .ram
            .layout()
            .iter()
            .map(|(_, region)| region.backing_page_bytes);
        assert_eq!(page_bytes.collect::<Vec<_>>(), [2 << 20]);
        regions_are_at(&machine, &mut vm, &[("main", 0)]);
    }
}
