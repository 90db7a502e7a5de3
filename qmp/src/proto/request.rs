//! What we say to a QMP server.

use std::borrow::Cow;
use std::sync::Arc;

use serde::Serialize;

use crate::error::Error;

/// Whether a command waits for its turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Band {
    /// In order, after the commands before it.
    In,
    /// At once, also while another command runs. Few commands may.
    Out,
}

/// A command, ready to be sent.
#[derive(Clone, Debug)]
pub struct Request {
    name: Cow<'static, str>,
    /// As JSON; empty for none.
    arguments: String,
    pub(super) band: Band,
}

impl Request {
    /// The command `name`, with what `arguments` serialises to: an object, or null for none.
    ///
    /// # Errors
    /// [`Error::Arguments`] when they cannot be serialised.
    pub fn new(
        name: impl Into<Cow<'static, str>>,
        arguments: &(impl Serialize + ?Sized),
        band: Band,
    ) -> Result<Self, Error> {
        let name = name.into();
        let mut arguments =
            serde_json::to_string(arguments).map_err(|source| Error::Arguments {
                command: name.clone(),
                source: Arc::new(source),
            })?;
        if arguments == "null" || arguments == "{}" {
            arguments.clear();
        }
        Ok(Self {
            name,
            arguments,
            band,
        })
    }

    /// The command's name.
    pub fn name(&self) -> &Cow<'static, str> {
        &self.name
    }

    /// Appends the shortest JSON that will do: QEMU reads it one byte at a time, several system
    /// calls a byte. The newline is for line-based proxies; QEMU has acted before it reads that.
    pub(super) fn encode(&self, id: u64, into: &mut Vec<u8>) {
        let execute = match self.band {
            Band::In => "execute",
            Band::Out => "exec-oob",
        };
        let name = serde_json::Value::from(&*self.name);
        let mut line = format!(r#"{{"{execute}":{name},"id":{id}"#);
        if !self.arguments.is_empty() {
            line.push_str(r#","arguments":"#);
            line.push_str(&self.arguments);
        }
        line.push_str("}\n");
        into.extend_from_slice(line.as_bytes());
    }
}
