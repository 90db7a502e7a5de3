//! The client against peers that follow a script, over real sockets.

mod ends;
mod peer;
mod talk;
