//! Both sides of the back door, and strangers at it.

use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use ferry_stream::message::{Features, Hello, Mode, Offer, Purpose, RegionInfo, Versions};
use nix::sys::memfd::{MFdFlags, memfd_create};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::borrower::{Borrowed, borrow};
use super::lender::Lender;
use super::*;
use crate::linux::{Access, RamFile, RamPart, SharedRam};
use crate::vmm::Ram as _;

/// Regions of the guest, which lie in one file.
const REGIONS: u64 = 300;

const REGION_BYTES: usize = 4096;

/// Frames of shared pages that may be on their way at most: a handful, and not the thousands of a usual
/// socket.
const MOST_ON_THE_WAY: usize = 40;

/// A source with `REGIONS` regions, each full of its own number.
fn source() -> SharedRam {
    let place = |region: u64| region * REGION_BYTES as u64;
    let written = File::from(memfd_create("ram", MFdFlags::MFD_CLOEXEC).unwrap());
    for region in 0..REGIONS {
        let bytes = [region.to_le_bytes()[0]; REGION_BYTES];
        written.write_all_at(&bytes, place(region)).unwrap();
    }
    let opened = || File::open(format!("/proc/self/fd/{}", written.as_raw_fd())).unwrap();
    let parts = (0..REGIONS).map(|region| RamPart {
        name: format!("ram{region:03}"),
        file: RamFile::from_file(opened()).unwrap(),
        bytes: place(region)..place(region + 1),
    });
    SharedRam::new(parts.collect(), Access::Read).unwrap()
}

fn session(number: u8) -> SessionId {
    let mut bytes = [number; 16];
    bytes[..4].copy_from_slice(&std::process::id().to_le_bytes());
    SessionId(bytes)
}

fn hello(session: SessionId, ram: &SharedRam) -> Hello {
    let regions = ram.layout().iter().map(|(_, region)| RegionInfo {
        name: region.name.clone(),
        bytes: region.bytes,
        backing_page_bytes: region.backing_page_bytes,
    });
    Hello {
        versions: Versions::OURS,
        features: Features::LZ4.union(Features::NEAR),
        session,
        purpose: Purpose::Migrate,
        offer: Some(Offer {
            arch: "x86_64".into(),
            machine: "pc".into(),
            vmm: "test".into(),
            regions: regions.collect(),
            lanes: 1,
            mode: Mode::Live,
        }),
    }
}

fn open(session: SessionId, ram: &SharedRam) -> Lender {
    Lender::open(WithinHost::Auto, ram, session).expect("nothing else has that name")
}

fn take_lanes(borrowed: Borrowed) -> mpsc::Receiver<crate::control::BoxedConnection> {
    let (passed, lanes) = mpsc::channel(4);
    tokio::spawn(borrowed.lanes(passed));
    lanes
}

#[tokio::test]
async fn every_region_is_lent_once_and_to_one() {
    let (ram, session) = (source(), session(1));
    let lender = open(session, &ram);
    assert!(!lender.has_lent());
    let borrowed = borrow(&mut hello(session, &ram)).await.unwrap();
    assert!(lender.has_lent());
    for (region, window) in (0..REGIONS).zip(&*borrowed.windows) {
        let mut bytes = [0; REGION_BYTES];
        window
            .file
            .read_exact_at(&mut bytes, window.bytes.start)
            .unwrap();
        assert_eq!(bytes, [region.to_le_bytes()[0]; REGION_BYTES]);
        assert!(window.file.write_at(&[1], window.bytes.start).is_err());
    }
    let mut again = hello(session, &ram);
    assert!(borrow(&mut again).await.is_none());
    assert_eq!(again.features, Features::LZ4);
}

#[tokio::test]
async fn strangers_get_nothing_and_keep_nobody_out() {
    let (ram, session) = (source(), session(2));
    let lender = open(session, &ram);
    let mut silent = UnixStream::connect(door_of(session)).await.unwrap();
    let mut wrong = UnixStream::connect(door_of(session)).await.unwrap();
    let mut guess = session;
    guess.0[15] ^= 1;
    assert_eq!(door_of(guess), door_of(session), "half of it is no secret");
    wrong.write_all(&guess.0).await.unwrap();
    let refused = wrong.read(&mut [0]).await;
    assert!(matches!(refused, Ok(0) | Err(_)), "{refused:?}");
    assert!(!lender.has_lent());
    let borrowed = borrow(&mut hello(session, &ram)).await;
    assert!(borrowed.is_some());
    let refused = silent.read(&mut [0]).await;
    assert!(matches!(refused, Ok(0) | Err(_)), "{refused:?}");
}

#[tokio::test]
async fn what_does_not_fit_or_is_not_there_is_done_without() {
    let (ram, session) = (source(), session(3));
    let without = |hello: Hello| async move {
        let mut hello = hello;
        let borrowed = borrow(&mut hello).await;
        assert!(borrowed.is_none());
        assert_eq!(hello.features, Features::LZ4);
    };
    without(hello(session, &ram)).await;
    assert!(Lender::open(WithinHost::Never, &ram, session).is_none());
    let lender = open(session, &ram);
    assert!(
        Lender::open(WithinHost::Auto, &ram, session).is_none(),
        "the name is taken"
    );
    let mut larger = hello(session, &ram);
    larger.offer.as_mut().unwrap().regions[7].bytes += 4096;
    without(larger).await;
    drop(lender);
    // The name goes with the task that listened, which ends when it is its turn.
    let freed = async {
        while Lender::open(WithinHost::Auto, &ram, session).is_none() {
            tokio::task::yield_now().await;
        }
    };
    timeout(LIMIT * 10, freed).await.unwrap();
    let mut unasked = hello(session, &ram);
    unasked.features = Features::LZ4;
    assert!(borrow(&mut unasked).await.is_none());
}

#[tokio::test]
async fn lanes_are_passed_and_hold_a_handful_of_frames() {
    let (ram, session) = (source(), session(4));
    let lender = Arc::new(open(session, &ram));
    assert!(lender.lane().await.is_err(), "to nobody yet");
    let borrowed = borrow(&mut hello(session, &ram)).await.unwrap();
    let mut lanes = take_lanes(borrowed);
    let mut ours = lender.lane().await.unwrap();
    let mut theirs = lanes.recv().await.unwrap();
    ours.write_all(b"hello").await.unwrap();
    let mut heard = [0; 5];
    theirs.read_exact(&mut heard).await.unwrap();
    assert_eq!(&heard, b"hello");
    let mut on_the_way = 0;
    let frame = [0; 68];
    while timeout(LIMIT / 10, ours.write_all(&frame)).await.is_ok() {
        on_the_way += 1;
        assert!(on_the_way <= MOST_ON_THE_WAY);
    }
    assert!(on_the_way > 1);
    // Both go on where they are once the other has gone.
    drop((lender, ours));
    assert!(lanes.recv().await.is_none());
    let mut rest = Vec::new();
    theirs.read_to_end(&mut rest).await.unwrap();
    assert!(rest.len() >= on_the_way * frame.len());
}
