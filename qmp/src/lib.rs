//! An asynchronous QMP client.
#![forbid(unsafe_code)]
