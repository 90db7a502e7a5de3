//! Whatever breaks during a move, the guest is in one place, goes on there, and the user is told.

mod deaths;
mod links;
mod peers;
mod support;
