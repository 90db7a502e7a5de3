//! Every typed command and its reply.

use std::path::Path;

use ferry_qmp::commands::{
    AnnounceSelf, BlockdevReopen, Cont, DeviceAdd, DeviceDel, MemoryDeviceKind, Migrate,
    MigrateCancel, MigrateContinue, MigrateIncoming, MigrateSetCapabilities, MigrateSetParameters,
    MigrationCapability, MigrationParameters, QomGet, QomList, QomListTypes, QueryBlock,
    QueryCommands, QueryCpusFast, QueryIothreads, QueryKvm, QueryMemdev, QueryMemoryDevices,
    QueryMigrate, QueryMigrateCapabilities, QueryMigrateParameters, QueryName,
    QueryNamedBlockNodes, QueryStatus, QueryTarget, QueryUuid, RunState,
};
use ferry_qmp::{Error, ErrorClass, EventKind, Events, MigrationStatus};
use serde_json::json;

use crate::launch::{Qemu, bounded, wait_for};

with_every_qemu! {
    describes_the_machine
    lists_objects_and_commands
    describes_memory
    describes_disks_and_reopens_them
    keeps_capabilities_and_parameters
    migrates_by_itself
    waits_for_a_migration
}

async fn describes_the_machine(version: &str) {
    let args = "-machine q35 -m 64 -smp 2 -name ship -uuid 01234567-89ab-cdef-0123-456789abcdef \
        -object iothread,id=io0";
    let Some(qemu) = Qemu::start(version, args) else {
        return;
    };
    let (client, _events) = qemu.connect().await;
    assert_eq!(client.execute(QueryTarget).await.unwrap().arch, "x86_64");
    assert!(!client.execute(QueryKvm).await.unwrap().enabled);
    let name = client.execute(QueryName).await.unwrap().name;
    assert_eq!(name.as_deref(), Some("ship"));
    let uuid = client.execute(QueryUuid).await.unwrap().uuid;
    assert_eq!(uuid, "01234567-89ab-cdef-0123-456789abcdef");
    let cpus = client.execute(QueryCpusFast).await.unwrap();
    assert_eq!(
        cpus.iter().map(|cpu| cpu.cpu_index).collect::<Vec<_>>(),
        [0, 1]
    );
    let task = format!("/proc/{}/task/{}", qemu.pid().unwrap(), cpus[1].thread_id);
    assert!(Path::new(&task).exists());
    let iothreads = client.execute(QueryIothreads).await.unwrap();
    assert_eq!(iothreads[0].id, "io0");
    let machine = client.execute(QomGet::machine_type()).await.unwrap();
    assert_eq!(machine, format!("pc-q35-{version}-machine"));
}

async fn lists_objects_and_commands(version: &str) {
    let args = "-machine q35 -m 64 -device virtio-rng-pci,id=rng0 -device virtio-rng-pci";
    let Some(qemu) = Qemu::start(version, args) else {
        return;
    };
    let (client, _events) = qemu.connect().await;
    let peripheral = QomList::new("/machine/peripheral");
    let named = client.execute(peripheral).await.unwrap();
    let rng = named.iter().find(|property| property.name == "rng0");
    assert_eq!(rng.unwrap().child_type(), Some("virtio-rng-pci"));
    let anonymous = QomList::new("/machine/peripheral-anon");
    let anonymous = client.execute(anonymous).await.unwrap();
    assert!(
        anonymous
            .iter()
            .any(|one| one.child_type() == Some("virtio-rng-pci"))
    );
    let rngs = QomListTypes {
        implements: Some("rng-backend".into()),
        include_abstract: Some(false),
    };
    let rngs = client.execute(rngs).await.unwrap();
    assert!(rngs.iter().any(|one| one.name == "rng-random"));
    let commands = client.execute(QueryCommands).await.unwrap();
    assert!(
        commands
            .iter()
            .any(|command| command.name == "blockdev-reopen")
    );
}

async fn describes_memory(version: &str) {
    let args = "-machine q35,memory-backend=ram0 -m 64M,slots=2,maxmem=1G \
        -object memory-backend-memfd,id=ram0,size=64M,share=on \
        -object memory-backend-ram,id=ram1,size=128M";
    let Some(qemu) = Qemu::start(version, args) else {
        return;
    };
    let (client, _events) = qemu.connect().await;
    let memdevs = client.execute(QueryMemdev).await.unwrap();
    let ram0 = memdevs.iter().find(|one| one.id.as_deref() == Some("ram0"));
    let ram0 = ram0.unwrap();
    assert_eq!((ram0.size, ram0.share), (64 << 20, true));
    assert!(client.execute(QueryMemoryDevices).await.unwrap().is_empty());

    let dimm = DeviceAdd {
        driver: "pc-dimm".into(),
        id: Some("dimm1".into()),
        properties: serde_json::from_value(json!({"memdev": "ram1"})).unwrap(),
    };
    client.execute(dimm).await.unwrap();
    let devices = client.execute(QueryMemoryDevices).await.unwrap();
    let [dimm] = &devices[..] else {
        panic!("{devices:?}");
    };
    assert_eq!(dimm.kind, MemoryDeviceKind::Dimm);
    assert_eq!(dimm.data.id.as_deref(), Some("dimm1"));
    assert_eq!(dimm.data.memdev.as_deref(), Some("/objects/ram1"));
    assert_eq!(dimm.data.size, Some(128 << 20));
    let absent = client.execute(DeviceDel { id: "dimm2".into() }).await;
    assert!(
        matches!(&absent, Err(Error::Class { class, .. }) if *class == ErrorClass::DeviceNotFound),
        "{absent:?}"
    );
}

async fn describes_disks_and_reopens_them(version: &str) {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.raw");
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    let file = format!("file,node-name=file0,filename={}", image.display());
    let args = format!(
        "-machine q35 -m 64 -blockdev {file} -blockdev raw,node-name=disk0,file=file0 \
        -device virtio-blk-pci,drive=disk0,id=vda"
    );
    let Some(qemu) = Qemu::start(version, &args) else {
        return;
    };
    let (client, _events) = qemu.connect().await;
    let disks = client.execute(QueryBlock).await.unwrap();
    assert!(disks[0].qdev.as_ref().unwrap().contains("vda"));
    let top = disks[0].inserted.as_ref().unwrap();
    assert_eq!(
        (top.node_name.as_deref(), &*top.drv),
        (Some("disk0"), "raw")
    );
    assert!(top.cache.writeback && !top.cache.direct && !top.ro);
    let nodes = QueryNamedBlockNodes { flat: Some(true) };
    let nodes = client.execute(nodes).await.unwrap();
    assert_eq!(nodes.len(), 2);
    let again = BlockdevReopen {
        options: vec![json!({"driver": "raw", "node-name": "disk0", "file": "file0"})],
    };
    client.execute(again).await.unwrap();
}

async fn wait_for_status(events: &mut Events, wanted: MigrationStatus) {
    wait_for(
        events,
        |kind| matches!(kind, EventKind::Migration { status } if *status == wanted),
    )
    .await;
}

fn capability(name: &str, state: bool) -> MigrationCapability {
    MigrationCapability {
        capability: name.into(),
        state,
    }
}

fn pausing_before_switchover() -> MigrateSetCapabilities {
    MigrateSetCapabilities {
        capabilities: vec![
            capability("events", true),
            capability("pause-before-switchover", true),
        ],
    }
}

async fn keeps_capabilities_and_parameters(version: &str) {
    let Some(qemu) = Qemu::start(version, "-machine q35 -m 64") else {
        return;
    };
    let (client, _events) = qemu.connect().await;
    let found = client.execute(QueryMigrateCapabilities).await.unwrap();
    assert!(found.contains(&capability("events", false)));
    client.execute(pausing_before_switchover()).await.unwrap();
    let found = client.execute(QueryMigrateCapabilities).await.unwrap();
    assert!(found.contains(&capability("events", true)));

    let parameters = MigrationParameters {
        max_bandwidth_bytes_per_s: Some(1 << 40),
        ..MigrationParameters::default()
    };
    let set = MigrateSetParameters { parameters };
    let before = client.execute(QueryMigrateParameters).await.unwrap();
    client.execute(set).await.unwrap();
    let after = client.execute(QueryMigrateParameters).await.unwrap();
    assert_eq!(after.max_bandwidth_bytes_per_s, Some(1 << 40));
    assert_eq!(after.downtime_limit_ms, before.downtime_limit_ms);
    assert!(before.downtime_limit_ms.is_some() && after.rest.contains_key("announce-max"));
}

async fn migrates_by_itself(version: &str) {
    let Some(qemu) = Qemu::start(version, "-machine q35 -m 64") else {
        return;
    };
    let (client, mut events) = qemu.connect().await;
    let info = client.execute(QueryMigrate).await.unwrap();
    assert_eq!((info.status, info.blocked_reasons), (None, vec![]));

    client.execute(pausing_before_switchover()).await.unwrap();
    let uri = format!("exec:cat > {}/state", qemu.folder().display());
    client.execute(Cont).await.unwrap();
    client.execute(Migrate { uri: uri.clone() }).await.unwrap();
    wait_for(&mut events, |kind| *kind == EventKind::Stop).await;
    wait_for_status(&mut events, MigrationStatus::PreSwitchover).await;
    client.execute(MigrateCancel).await.unwrap();
    wait_for(&mut events, |kind| *kind == EventKind::Resume).await;
    wait_for_status(&mut events, MigrationStatus::Cancelled).await;

    client.execute(Migrate { uri }).await.unwrap();
    wait_for_status(&mut events, MigrationStatus::PreSwitchover).await;
    let state = MigrationStatus::PreSwitchover;
    client.execute(MigrateContinue { state }).await.unwrap();
    wait_for_status(&mut events, MigrationStatus::Completed).await;
    let info = client.execute(QueryMigrate).await.unwrap();
    assert_eq!(info.status, Some(MigrationStatus::Completed));
    assert!(info.ram.unwrap().transferred > 0);
    assert!(info.total_time_ms >= info.downtime_ms && info.downtime_ms.is_some());
    // The run state follows the event, and no other event tells of it.
    bounded(async {
        while client.execute(QueryStatus).await.unwrap().status != RunState::Postmigrate {}
    })
    .await;
    client.execute(AnnounceSelf::default()).await.unwrap();
}

async fn waits_for_a_migration(version: &str) {
    let args = "-machine q35 -m 64 -incoming defer";
    let Some(qemu) = Qemu::start(version, args) else {
        return;
    };
    let (client, _events) = qemu.connect().await;
    let status = client.execute(QueryStatus).await.unwrap();
    assert_eq!(status.status, RunState::Inmigrate);
    let listen = |exit_on_error| MigrateIncoming {
        uri: format!("unix:{}/in", qemu.folder().display()),
        exit_on_error,
    };
    let with_flag = client.execute(listen(Some(false))).await;
    if client.greeting().version.at_least(9, 1) {
        with_flag.unwrap();
    } else {
        assert!(
            matches!(with_flag, Err(Error::Class { .. })),
            "{with_flag:?}"
        );
        client.execute(listen(None)).await.unwrap();
    }
    assert!(qemu.folder().join("in").exists());
}
