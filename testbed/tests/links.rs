//! A link carries what it is said to carry, and nothing when it is cut.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use ferry_testbed::{End, Link, Turn};

const BOUND: Duration = Duration::from_secs(20);
const MANY_BYTES: u32 = 64 << 20;

/// A connection over the link: the source's end and the target's.
fn connect(link: &Link) -> (TcpStream, TcpStream) {
    let address = (link.address(End::Target), 0);
    let listener = link.on(End::Target, || TcpListener::bind(address).unwrap());
    let listener = listener.unwrap();
    let at = listener.local_addr().unwrap();
    let source = link.on(End::Source, || {
        TcpStream::connect_timeout(&at, BOUND).unwrap()
    });
    let (target, _) = listener.accept().unwrap();
    (source.unwrap(), target)
}

#[test]
fn carries_its_rate() {
    let _turn = Turn::take().unwrap();
    let link = Link::lay(1000).unwrap();
    let (mut source, mut target) = connect(&link);
    let before = link.carried_bytes().unwrap();
    let began = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| source.write_all(&vec![7; MANY_BYTES as usize]).unwrap());
        let mut bytes = vec![0; MANY_BYTES as usize];
        target.set_read_timeout(Some(BOUND)).unwrap();
        target.read_exact(&mut bytes).unwrap();
    });
    let carried = link.carried_bytes().unwrap() - before;
    assert!(carried > MANY_BYTES.into(), "{carried} bytes");
    let mbit_per_s = 8.0 * f64::from(MANY_BYTES) / 1e6 / began.elapsed().as_secs_f64();
    // The rate counts headers too, and the first burst is free.
    assert!((500.0..1050.0).contains(&mbit_per_s), "{mbit_per_s} Mbit/s");
}

#[test]
fn a_cut_link_is_silent_until_mended() {
    let _turn = Turn::take().unwrap();
    let link = Link::lay(1000).unwrap();
    let (mut source, mut target) = connect(&link);
    link.cut().unwrap();
    source.write_all(b"hello").unwrap();
    target
        .set_read_timeout(Some(Duration::from_millis(300)))
        .unwrap();
    let error = target.read(&mut [0; 5]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    link.mend().unwrap();
    target.set_read_timeout(Some(BOUND)).unwrap();
    let mut bytes = [0; 5];
    target.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"hello");
}

#[test]
fn programs_run_on_a_host_and_nothing_is_left_of_it() {
    let _turn = Turn::take().unwrap();
    let link = Link::lay(100).unwrap();
    let output = link
        .command(End::Source, "ip")
        .args(["-brief", "address"])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.contains(&link.address(End::Source).to_string()),
        "{text}"
    );
    let name = format!("p{}-", std::process::id());
    let ours = || {
        let names = std::fs::read_dir("/run/netns").unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|entry| entry.starts_with(&name)).count()
    };
    let before = ours();
    drop(link);
    assert_eq!(ours(), before - 2);
}

#[test]
fn a_loop_carries_what_is_said_on_it_and_nothing_else() {
    let _turn = Turn::take().unwrap();
    let link = Link::loop_back().unwrap();
    assert_eq!(link.carried_bytes().unwrap(), 0);
    let (mut source, mut target) = connect(&link);
    source.write_all(b"hello").unwrap();
    target.set_read_timeout(Some(BOUND)).unwrap();
    let mut bytes = [0; 5];
    target.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"hello");
    let carried = link.carried_bytes().unwrap();
    assert!((5..5000).contains(&carried), "{carried} bytes");
}
