//! The migration wire.
#![forbid(unsafe_code)]
