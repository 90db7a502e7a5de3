//! Post-copy: the guest runs at the target before its pages are there.

use ferry_testbed::{Linux, Machine, QemuVersion, Turn};

use crate::pair::{Pair, small};

#[test]
fn at_once() {
    let _turn = Turn::take().unwrap();
    for version in QemuVersion::ALL {
        let machine = small(version);
        let pair = Pair::boot(&machine);
        let moved = pair.begin(&["--live", "--postcopy-now"]).moved();
        let postcopy = &moved.json["postcopy"];
        assert!(postcopy["pages_missing"].as_u64() > Some(10_000), "{postcopy}");
        assert!(postcopy["last_page_ms"].as_f64() > Some(0.0), "{postcopy}");
    }
}
