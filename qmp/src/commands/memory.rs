//! Guest RAM: its back ends, and what was plugged.

use serde::Deserialize;

use super::plain_commands;

plain_commands! {
    /// The memory back ends. Those of the machine itself, `-object` and plugged ones alike.
    QueryMemdev = "query-memdev" -> Vec<Memdev>;
    /// The memory devices: DIMMs and their like.
    QueryMemoryDevices = "query-memory-devices" -> Vec<MemoryDevice>;
}

/// A memory back end.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct Memdev {
    /// Its id; QEMU may leave it out of one that it made itself.
    pub id: Option<String>,
    /// Size in bytes.
    pub size: u64,
    /// Whether its pages are allocated from the start.
    pub prealloc: bool,
    /// Whether it is mapped shared.
    #[serde(default)]
    pub share: bool,
    /// The host's NUMA nodes that it is bound to.
    #[serde(default)]
    pub host_nodes: Vec<u16>,
}

open_enum! {
    /// What kind of memory device.
    MemoryDeviceKind {
        /// A DIMM.
        Dimm = "dimm",
        /// A non-volatile DIMM.
        Nvdimm = "nvdimm",
        /// virtio-pmem.
        VirtioPmem = "virtio-pmem",
        /// virtio-mem.
        VirtioMem = "virtio-mem",
        /// Protected memory of SGX.
        SgxEpc = "sgx-epc",
        /// Hyper-V's balloon.
        HvBalloon = "hv-balloon",
    }
}

/// A memory device.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[non_exhaustive]
pub struct MemoryDevice {
    /// What kind.
    #[serde(rename = "type")]
    pub kind: MemoryDeviceKind,
    /// Which one.
    pub data: MemoryDeviceInfo,
}

/// What kinds of memory devices have in common; what one lacks is `None`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[non_exhaustive]
pub struct MemoryDeviceInfo {
    /// The device's id.
    pub id: Option<String>,
    /// The back end's path in QOM: `/objects/mem1`.
    pub memdev: Option<String>,
    /// Size in bytes.
    pub size: Option<u64>,
    /// Where the guest sees it.
    #[serde(alias = "memaddr")]
    pub addr: Option<u64>,
    /// The guest's NUMA node.
    pub node: Option<i64>,
    /// The slot of a DIMM.
    pub slot: Option<i64>,
    /// Whether it was plugged while the guest ran.
    pub hotplugged: Option<bool>,
}
