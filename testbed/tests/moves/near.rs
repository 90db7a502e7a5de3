//! Moves within one host, where the target takes the pages from the source's RAM.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use ferry_engine::linux::{Process, RemoteFd};
use ferry_testbed::{
    Backing, Ferry, Linux, Machine, PAGE_SIZE, Populate, QemuVersion, Turn, wait_until,
};
use nix::sys::socket::{getsockopt, sockopt};
use nix::unistd::Pid;
use serde_json::Value;

use crate::pair::{BOUND, Moved, Pair, SLOW, small};

const SUSPENDED: [&str; 2] = ["--suspend", "--keep-source"];

/// Lanes that die in one move.
const DEATHS: usize = 10;

/// A send buffer as small as no other connection has it.
const LANE_BUFFER: usize = 8 << 10;

/// The most that the lanes of such a move carry: 2,048 frames for a GiB.
const FRAMES_BYTES: u64 = 2 << 20;

/// Pages of the guest that the tests fill.
const FILLED_PAGES: u64 = (64 << 20) / PAGE_SIZE as u64;

fn writing(pages_per_s: u64) -> Machine {
    let linux = Linux::filling_mib(64).writing_pages_per_s(pages_per_s);
    Machine::new(QemuVersion::V10_0, 256).linux(linux)
}

fn count(json: &Value, name: &str) -> u64 {
    json[name]
        .as_u64()
        .unwrap_or_else(|| panic!("{name}: {json}"))
}

/// Bytes on the page lanes.
fn lane_bytes(json: &Value) -> u64 {
    let rounds = json["rounds"].as_array().unwrap();
    rounds.iter().map(|round| count(round, "bytes")).sum()
}

fn assert_shared(moved: &Moved) {
    let json = &moved.json;
    let told = count(&json["rounds"][0], "pages");
    assert!(told >= FILLED_PAGES, "{json}");
    assert!(count(json, "pages_shared") >= told, "{json}");
    assert!(lane_bytes(json) < FRAMES_BYTES, "{json}");
    assert!(moved.told.contains("within the host"), "{}", moved.told);
}

#[test]
fn guests_idle_and_writing_move_without_a_page_on_the_wire() {
    let _turn = Turn::take().unwrap();
    for pages_per_s in [0, 5000] {
        let machine = writing(pages_per_s);
        let pair = Pair::boot(&machine);
        assert_shared(&pair.begin_near(&["--live"]).moved());
        // And on, as between two hosts.
        let moved = pair.onwards(&machine).begin(&["--live"]).moved();
        assert_eq!(moved.json["pages_shared"], 0, "{}", moved.json);
        assert!(lane_bytes(&moved.json) > FRAMES_BYTES, "{}", moved.json);
    }
}

#[test]
fn every_byte_arrives_whatever_ram_is_made_of() {
    let _turn = Turn::take().unwrap();
    // Two of them fit into the pool of huge pages.
    let linux = Linux::filling_mib(64).writing_pages_per_s(1000);
    let plain = Machine::new(QemuVersion::V10_0, 224).linux(linux);
    let regions = Machine::new(QemuVersion::V10_0, 192)
        .node(256)
        .dimm(128)
        .linux(Linux::filling_mib(256).writing_pages_per_s(1000))
        .arg("-m")
        .arg("448M,slots=2,maxmem=2G");
    let huge = plain.clone().backing(Backing::Hugetlb);
    let ahead = plain.clone().populate(Populate::AtStart);
    for (source, target) in [
        (&regions, &regions),
        (&huge, &huge),
        (&huge, &plain),
        (&plain, &huge),
        (&plain, &ahead),
        (&ahead, &plain),
    ] {
        let pair = Pair::boot_towards(source, target);
        let args = [&SUSPENDED[..], &["--live"]].concat();
        assert_shared(&pair.begin_near(&args).moved());
    }
}

/// What is zero is looked at and costs no memory, though the source has it allocated.
#[test]
fn zeros_allocate_nothing() {
    let _turn = Turn::take().unwrap();
    let on_demand = writing(0).node(512);
    let allocated = on_demand.clone().populate(Populate::AtStart);
    let pair = Pair::boot_towards(&allocated, &on_demand);
    let moved = pair.begin_near(&SUSPENDED).moved();
    assert_shared(&moved);
    let arrived = pair.arrived_bytes();
    assert!(arrived < 256 << 20, "{arrived} bytes of 768 MiB");
}

#[test]
fn a_bandwidth_is_kept() {
    let _turn = Turn::take().unwrap();
    let pair = Pair::boot(&writing(0));
    let moved = pair.begin_near(&["--live", "--bandwidth", "64"]).moved();
    assert_shared(&moved);
    let first = &moved.json["rounds"][0];
    let mib = first["pages"].as_f64().unwrap() / 256.0;
    let rate = mib / first["ms"].as_f64().unwrap() * 1e3;
    assert!((32.0..68.0).contains(&rate), "{rate} MiB/s");
}

/// The source's ends of the page lanes, with what tells each from every other.
fn lanes(migrate: &Ferry) -> Vec<(String, OwnedFd)> {
    let process = Process::open(Pid::from_raw(migrate.pid().cast_signed())).unwrap();
    let lane = |fd: RemoteFd| {
        let name = process.fd_link(fd).ok()?.to_string_lossy().into_owned();
        if !name.starts_with("socket:") {
            return None;
        }
        let socket = process.take_fd(fd).ok()?;
        let room = getsockopt(&socket, sockopt::SndBuf).ok()?;
        (room < LANE_BUFFER).then_some((name, socket))
    };
    let mut lanes: Vec<_> = process
        .fds()
        .unwrap()
        .into_iter()
        .filter_map(lane)
        .collect();
    // A lane's closer is a second descriptor of the same socket.
    lanes.sort_by(|a, b| a.0.cmp(&b.0));
    lanes.dedup_by(|a, b| a.0 == b.0);
    lanes
}

#[test]
fn ten_lanes_die_in_one_move() {
    let _turn = Turn::take().unwrap();
    let pair = Pair::boot(&small(QemuVersion::V10_0));
    let begun = pair.begin_near(&["--live", SLOW, "--parallel-connections=3"]);
    begun.wait_for_pages();
    // One that is cut before it was welcomed is opened in another way, and was never lost.
    let died = || begun.migrate.told().matches("was lost").count();
    let mut cuts = 0;
    while died() < DEATHS {
        assert!(cuts < 3 * DEATHS, "{}", begun.migrate.told());
        let nth = cuts;
        cuts += 1;
        let (name, socket) = wait_until("two lanes stand", BOUND, || {
            let mut lanes = lanes(&begun.migrate);
            (lanes.len() >= 2).then(|| lanes.swap_remove(nth % 2))
        })
        .unwrap_or_else(|error| panic!("{error}: {}", begun.migrate.told()));
        let socket = UnixStream::from(socket);
        socket.shutdown(std::net::Shutdown::Both).unwrap();
        drop(socket);
        wait_until("the lane is given up", BOUND, || {
            let lanes = lanes(&begun.migrate);
            lanes.iter().all(|(other, _)| *other != name).then_some(())
        })
        .unwrap();
    }
    let moved = begun.moved();
    let lost = moved.json["lanes_lost"].as_u64().unwrap();
    assert!(lost >= DEATHS as u64, "{lost}: {}", moved.told);
    assert_shared(&moved);
}
