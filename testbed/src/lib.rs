//! Guests, QEMU pairs and the simulated world for the tests of Ferry.
