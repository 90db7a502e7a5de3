//! Pages travel packed, and none is lost by it.

use ferry_testbed::{Content, Linux, Machine, QemuVersion, Turn};
use serde_json::Value;

use crate::pair::Pair;

fn guest(content: Content) -> Machine {
    let linux = Linux::filling_mib(64)
        .writing_pages_per_s(2000)
        .content(content);
    Machine::new(QemuVersion::V10_0, 256).linux(linux)
}

/// Moves a guest of `content` with each of these arguments, from one QEMU to the next, and returns what
/// each move told of compression.
fn moves(content: Content, settings: &[&[&str]]) -> Vec<Value> {
    let _turn = Turn::take().unwrap();
    let machine = guest(content);
    let mut pair = Pair::boot(&machine);
    let mut told = Vec::new();
    for (at, setting) in settings.iter().enumerate() {
        let args = [&["--live"], *setting].concat();
        let moved = pair.begin(&args).moved();
        told.push(moved.json["compression"].clone());
        if at + 1 < settings.len() {
            pair = pair.onwards(&machine);
        }
    }
    told
}

fn count(told: &Value, name: &str) -> u64 {
    told[name]
        .as_u64()
        .unwrap_or_else(|| panic!("{name}: {told}"))
}

#[test]
fn text_travels_packed_as_ordered() {
    let told = moves(
        Content::Text,
        &[
            &["--compression=none"],
            &["--compression=lz4"],
            &["--compression=zstd"],
        ],
    );
    let [none, lz4, zstd] = &told[..] else {
        panic!("three moves")
    };
    assert_eq!(none["ratio"], 1.0);
    assert_eq!(count(none, "pages_lz4") + count(none, "pages_zstd"), 0);
    let ratio = |told: &Value| told["ratio"].as_f64().unwrap();
    assert!(count(lz4, "pages_lz4") > 16_384, "{lz4}");
    assert_eq!(count(lz4, "pages_zstd"), 0);
    assert!(ratio(lz4) > 2.0, "{lz4}");
    assert!(count(zstd, "pages_zstd") > 16_384, "{zstd}");
    assert!(ratio(zstd) > ratio(lz4), "{zstd}");
}

#[test]
fn auto_packs_on_a_slow_link_and_not_on_a_fast_one() {
    let told = moves(Content::Text, &[&["--bandwidth=50"], &[]]);
    let [slow, fast] = &told[..] else {
        panic!("two moves")
    };
    assert!(slow["ratio"].as_f64().unwrap() > 2.0, "{slow}");
    assert!(
        count(fast, "pages_raw") > count(fast, "pages_zstd"),
        "{fast}"
    );
}

#[test]
fn random_pages_travel_as_they_are() {
    let told = moves(
        Content::Random,
        &[&["--compression=lz4"], &["--compression=zstd"]],
    );
    for told in &told {
        // 64 MiB of the guest's RAM is random; what its kernel has in RAM is not.
        assert!(count(told, "pages_raw") > 16_000, "{told}");
    }
}
