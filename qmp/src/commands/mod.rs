//! Typed commands, with the replies that a migration engine needs from them.
//!
//! Of a reply only the fields that are used are read; whatever else QEMU sends is passed over, so a
//! newer QEMU is no error. Commands that are not here: [`Client::execute_raw`].
//!
//! [`Client::execute_raw`]: crate::Client::execute_raw

mod block;
mod machine;
mod memory;
mod migration;
mod run;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

pub use self::block::*;
pub use self::machine::*;
pub use self::memory::*;
pub use self::migration::*;
pub use self::run::*;

/// A command of QMP: serialises to its arguments, an object (a unit struct for none).
pub trait Command: Serialize {
    /// QEMU's name for it.
    const NAME: &'static str;
    /// What it is answered with.
    type Reply: DeserializeOwned;
}

impl<C: Command> Command for &C {
    const NAME: &'static str = C::NAME;
    type Reply = C::Reply;
}

/// The reply of a command that has nothing to say but that it was carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct Done {}

/// Defines commands without arguments.
macro_rules! plain_commands {
    ($($(#[$meta:meta])* $name:ident = $text:literal -> $reply:ty;)+) => {
        $(
            $(#[$meta])*
            #[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
            pub struct $name;

            impl $crate::Command for $name {
                const NAME: &'static str = $text;
                type Reply = $reply;
            }
        )+
    };
}
use plain_commands;
