//! The machine: what it is and what it is made of.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Command, Done, plain_commands};
use crate::proto::Version;

plain_commands! {
    /// QEMU's version.
    QueryVersion = "query-version" -> Version;
    /// The guest's architecture.
    QueryTarget = "query-target" -> Target;
    /// The vCPUs and their threads.
    QueryCpusFast = "query-cpus-fast" -> Vec<Cpu>;
    /// Whether KVM runs the guest.
    QueryKvm = "query-kvm" -> Kvm;
    /// The guest's UUID.
    QueryUuid = "query-uuid" -> Uuid;
    /// The guest's name.
    QueryName = "query-name" -> Name;
    /// The I/O threads.
    QueryIothreads = "query-iothreads" -> Vec<Iothread>;
    /// The commands that this QEMU has.
    QueryCommands = "query-commands" -> Vec<CommandInfo>;
    /// What can be yanked from its peers. May be sent out of band.
    QueryYank = "query-yank" -> Vec<Value>;
}

/// The guest's architecture.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[non_exhaustive]
pub struct Target {
    /// `x86_64`.
    pub arch: String,
}

/// A vCPU.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct Cpu {
    /// Its number.
    pub cpu_index: i64,
    /// Its path in QOM.
    pub qom_path: String,
    /// Its thread in the host.
    pub thread_id: i32,
}

/// Whether KVM runs the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[non_exhaustive]
pub struct Kvm {
    /// It does.
    pub enabled: bool,
    /// It could.
    pub present: bool,
}

/// The guest's UUID.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[non_exhaustive]
pub struct Uuid {
    /// All zeros when none was given.
    #[serde(rename = "UUID")]
    pub uuid: String,
}

/// The guest's name.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[non_exhaustive]
pub struct Name {
    /// None when none was given.
    pub name: Option<String>,
}

/// An I/O thread.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct Iothread {
    /// Its id.
    pub id: String,
    /// Its thread in the host.
    pub thread_id: i32,
}

/// A command that a QEMU has.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[non_exhaustive]
pub struct CommandInfo {
    /// Its name.
    pub name: String,
}

/// Reads a property of an object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct QomGet {
    /// The object's path: `/machine`.
    pub path: String,
    /// The property's name: `type`.
    pub property: String,
}

impl QomGet {
    /// The property `property` of the object at `path`.
    pub fn new(path: impl Into<String>, property: impl Into<String>) -> Self {
        Self {
            path: path.into(),
            property: property.into(),
        }
    }

    /// The type of the machine. It ends in `-machine`: `pc-q35-10.0-machine`.
    pub fn machine_type() -> Self {
        Self::new("/machine", "type")
    }
}

impl Command for QomGet {
    const NAME: &'static str = "qom-get";
    type Reply = Value;
}

/// Lists the properties of an object, its children among them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct QomList {
    /// The object's path: `/machine/peripheral`.
    pub path: String,
}

impl QomList {
    /// The properties of the object at `path`.
    pub fn new(path: impl Into<String>) -> Self {
        Self { path: path.into() }
    }
}

impl Command for QomList {
    const NAME: &'static str = "qom-list";
    type Reply = Vec<QomProperty>;
}

/// A property of an object.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[non_exhaustive]
pub struct QomProperty {
    /// Its name.
    pub name: String,
    /// Its type; `child<e1000>` for an object of type `e1000` below this one.
    #[serde(rename = "type")]
    pub kind: String,
}

impl QomProperty {
    /// The type of the object that it is, if it is one.
    pub fn child_type(&self) -> Option<&str> {
        self.kind.strip_prefix("child<")?.strip_suffix('>')
    }
}

/// Lists the types of objects.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct QomListTypes {
    /// Only those that implement this type.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub implements: Option<String>,
    /// Abstract ones too.
    #[serde(rename = "abstract", skip_serializing_if = "Option::is_none")]
    pub include_abstract: Option<bool>,
}

impl Command for QomListTypes {
    const NAME: &'static str = "qom-list-types";
    type Reply = Vec<QomType>;
}

/// A type of objects.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[non_exhaustive]
pub struct QomType {
    /// Its name.
    pub name: String,
    /// The type that it extends.
    pub parent: Option<String>,
}

/// Plugs a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DeviceAdd {
    /// The device model.
    pub driver: String,
    /// The new device's id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Properties of the device.
    #[serde(flatten)]
    pub properties: serde_json::Map<String, Value>,
}

impl Command for DeviceAdd {
    const NAME: &'static str = "device_add";
    type Reply = Done;
}

/// Asks the guest to let go of a device; `DEVICE_DELETED` tells that it did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DeviceDel {
    /// The device's id or its path in QOM.
    pub id: String,
}

impl Command for DeviceDel {
    const NAME: &'static str = "device_del";
    type Reply = Done;
}
