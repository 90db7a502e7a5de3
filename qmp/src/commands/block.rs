//! Disks.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Command, Done, plain_commands};

plain_commands! {
    /// The disks as the guest's devices see them.
    QueryBlock = "query-block" -> Vec<BlockDevice>;
}

/// A disk as a guest's device sees it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[non_exhaustive]
pub struct BlockDevice {
    /// The name of the `-drive`; empty for a disk made with `-blockdev`.
    pub device: String,
    /// The device's path in QOM, or its id.
    pub qdev: Option<String>,
    /// Whether its medium can be taken out.
    #[serde(default)]
    pub removable: bool,
    /// The medium.
    pub inserted: Option<BlockNode>,
}

/// A block node.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct BlockNode {
    /// Its name; begins with `#block` when QEMU made it up.
    pub node_name: Option<String>,
    /// The file, or the JSON that describes it.
    pub file: String,
    /// The driver: `qcow2`.
    pub drv: String,
    /// Whether it is read-only.
    pub ro: bool,
    /// The file that it is based on.
    #[serde(rename = "backing_file")]
    pub backing_file: Option<String>,
    /// How it is cached.
    pub cache: BlockCache,
    /// Whether this QEMU may use it now (10.0 and later tell).
    pub active: Option<bool>,
}

/// How a block node is cached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct BlockCache {
    /// Writes are complete before they are on the medium.
    pub writeback: bool,
    /// The host's page cache is not used (`O_DIRECT`).
    pub direct: bool,
    /// Flushes are ignored.
    pub no_flush: bool,
}

/// The block nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct QueryNamedBlockNodes {
    /// Leave the backing files out of each node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flat: Option<bool>,
}

impl Command for QueryNamedBlockNodes {
    const NAME: &'static str = "query-named-block-nodes";
    type Reply = Vec<BlockNode>;
}

/// Opens block nodes again with the options given. Every option must be repeated: what is left out
/// goes back to its default, or is refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BlockdevReopen {
    /// For each node its options as for `blockdev-add`, `node-name` and `driver` among them.
    pub options: Vec<Value>,
}

impl Command for BlockdevReopen {
    const NAME: &'static str = "blockdev-reopen";
    type Reply = Done;
}
