//! What must be the same at both sides, and what must not change during a migration.
//!
//! It is read once more inside the blackout. QEMU reads QMP byte by byte, so the commands are few and
//! short, and are sent together. Memory devices are not asked for: they are among the devices, and
//! their back ends are in the layout.

use ferry_qmp::commands::{Memdev, QomList, QomProperty, QueryMemdev};

use super::attach::Inner;
use super::monitor::Monitor;
use crate::core::layout::{Layout, PAGE_SHIFT, Region};
use crate::vmm::{Inventory, VmmError};

/// Where QOM keeps the devices that have an id, and those that have none.
const PERIPHERAL: [&str; 2] = ["/machine/peripheral", "/machine/peripheral-anon"];

/// What the page size of a region counts as that was not there when QEMU was attached to.
const PAGE_BYTES: u32 = 1 << PAGE_SHIFT;

/// A device of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Device {
    /// Its id, or the name that QEMU gave it.
    pub(super) name: String,
    /// Its type: `virtio-net-pci`.
    pub(super) kind: String,
}

pub(super) async fn read(qemu: &Inner) -> Result<Inventory, VmmError> {
    let monitor = qemu.monitor();
    let (devices, memdevs) = tokio::try_join!(devices(monitor), monitor.ask(QueryMemdev))?;
    let identity = qemu.identity();
    let mut lines: Vec<String> = devices
        .iter()
        .map(|device| format!("{} ({})", device.name, device.kind))
        .collect();
    lines.sort_unstable();
    Ok(Inventory {
        arch: identity.arch.clone(),
        machine: identity.machine.clone(),
        vmm: identity.vmm.clone(),
        layout: layout(memdevs, qemu)?,
        devices: lines,
    })
}

/// The devices that the guest was started with or that were plugged since.
pub(super) async fn devices(monitor: &Monitor) -> Result<Vec<Device>, VmmError> {
    let [named, anonymous] = PERIPHERAL.map(|path| monitor.ask(QomList::new(path)));
    let (named, anonymous) = tokio::try_join!(named, anonymous)?;
    Ok(named.iter().chain(&anonymous).filter_map(device).collect())
}

fn device(property: &QomProperty) -> Option<Device> {
    Some(Device {
        name: property.name.clone(),
        kind: property.child_type()?.to_owned(),
    })
}

/// The layout as it is now. A region that was there at the beginning keeps its page size, which
/// cannot change; a back end that nothing used then is none still, unless a device uses it now,
/// which the list of devices shows.
fn layout(memdevs: Vec<Memdev>, qemu: &Inner) -> Result<Layout, VmmError> {
    let known = |name: &str| {
        let mut regions = qemu.layout().into_iter().flat_map(Layout::iter);
        regions.find(|(_, region)| region.name == name)
    };
    let regions = memdevs
        .into_iter()
        .map(|memdev| (memdev.id.unwrap_or_default(), memdev.size))
        .filter(|(name, _)| !qemu.spares().contains(name))
        .map(|(name, bytes)| Region {
            backing_page_bytes: known(&name)
                .map_or(PAGE_BYTES, |(_, region)| region.backing_page_bytes),
            name,
            bytes,
        })
        .collect();
    Layout::new(regions).map_err(|error| VmmError::failed("QEMU's RAM cannot be told apart", error))
}
