//! The client against real QEMUs, the oldest and the newest that must work.

/// One test for each version and body.
macro_rules! with_every_qemu {
    ($($test:ident)+) => {
        mod qemu_10_0 {
            $(#[tokio::test] async fn $test() { super::$test("10.0").await; })+
        }
        mod qemu_7_2 {
            $(#[tokio::test] async fn $test() { super::$test("7.2").await; })+
        }
    };
}

mod client;
mod commands;
mod launch;
