//! Pages of which a few words change are told by those.

use ferry_testbed::{Content, Linux, Machine, Pattern, QemuVersion, Turn};

use crate::pair::{Pair, SLOW};

#[test]
fn a_few_words_for_each_page_are_little_on_a_slow_link() {
    let _turn = Turn::take().unwrap();
    let linux = Linux::filling_mib(64)
        .writing_pages_per_s(2000)
        .pattern(Pattern::Hot)
        .content(Content::Counters);
    let machine = Machine::new(QemuVersion::V10_0, 256).linux(linux);
    let pair = Pair::boot(&machine);
    let moved = pair.begin(&["--live", SLOW]).moved();
    let told = &moved.json["compression"];
    println!("deltas: {told}, rounds: {}", moved.json["rounds"]);
    let count = |name: &str| told[name].as_u64().unwrap();
    assert!(count("pages_delta") > 100, "{told}");
    // Five words of a page of 512, and the header's.
    let whole = count("pages_delta") * 4096;
    assert!(count("bytes_saved_delta") * 10 > whole * 9, "{told}");
    let pair = pair.onwards(&machine);
    let none = pair.begin(&["--live", SLOW, "--compression=none"]).moved();
    assert_eq!(none.json["compression"]["pages_delta"], 0);
}
