//! What a QEMU is started with.

use std::ffi::OsString;
use std::path::Path;
use std::sync::Arc;

use crate::qemu::RamFolder;
use crate::{DiskFormat, Linux, Qemu, QemuVersion, TestbedError, tiny};

/// The accelerator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accel {
    /// QEMU's own translator: runs everywhere.
    Tcg,
    /// `/dev/kvm`. Where that is emulated itself, only [`tiny`] runs under it.
    Kvm,
}

impl Accel {
    /// KVM, for a test to run under. Where this machine has none the test is told aloud to be left
    /// out.
    ///
    /// # Panics
    ///
    /// Without KVM under CI, where no test is left out.
    pub fn kvm() -> Option<Self> {
        if Path::new("/dev/kvm").exists() {
            return Some(Self::Kvm);
        }
        assert!(std::env::var_os("CI").is_none(), "CI needs /dev/kvm");
        eprintln!("NOT TESTED: this machine has no /dev/kvm");
        None
    }
}

/// Where guest RAM lies. All but the first need the right to mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Files in `/dev/shm`.
    Shm,
    /// Files in a tmpfs of their own, mounted with `huge=always`.
    HugeTmpfs,
    /// Files in a hugetlbfs of their own with pages of 2 MiB, which must be reserved.
    Hugetlb,
    /// Files in a tmpfs of their own that holds no more than this.
    Limited {
        /// Its size in MiB.
        mib: u64,
    },
    /// No named files: what a migration from outside must refuse.
    Memfd,
    /// Private memory without a file, as most QEMUs have it. One back end at most.
    Private,
}

/// Whether guest RAM is allocated before the guest starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Populate {
    /// As the guest touches it.
    OnDemand,
    /// All of it, by `prealloc=on`.
    AtStart,
}

/// A device besides what the machine type has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Device {
    /// virtio-net on QEMU's user-mode network.
    Net,
    /// virtio-blk on an image, cached and written back.
    Disk {
        /// Its format.
        format: DiskFormat,
        /// The image.
        path: std::path::PathBuf,
    },
    /// virtio-rng.
    Rng,
    /// A USB controller with a tablet.
    Tablet,
    /// Standard VGA: 16 MiB of memory that is not shared.
    Vga,
    /// What tells QEMU that the guest's kernel has panicked.
    Pvpanic,
}

#[derive(Clone, Debug)]
enum Payload {
    Nothing,
    Linux(Linux),
    Tiny,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Start {
    Now,
    Paused,
    Incoming,
}

/// A machine to be started, any number of times: twice for a pair.
#[derive(Clone, Debug)]
pub struct Machine {
    version: QemuVersion,
    kind: String,
    accel: Accel,
    cpus: u32,
    nodes_mib: Vec<u64>,
    dimms_mib: Vec<u64>,
    backing: Backing,
    shared: Option<Arc<RamFolder>>,
    populate: Populate,
    devices: Vec<Device>,
    payload: Payload,
    start: Start,
    more: Vec<OsString>,
}

impl Machine {
    /// An empty `pc-q35-7.2` machine, which both QEMUs have, with one CPU under TCG and `mib` MiB of
    /// RAM in a back end named `ram0`.
    pub fn new(version: QemuVersion, mib: u64) -> Self {
        Self {
            version,
            kind: "pc-q35-7.2".into(),
            accel: Accel::Tcg,
            cpus: 1,
            nodes_mib: vec![mib],
            dimms_mib: Vec::new(),
            backing: Backing::Shm,
            shared: None,
            populate: Populate::OnDemand,
            devices: Vec::new(),
            payload: Payload::Nothing,
            start: Start::Now,
            more: Vec::new(),
        }
    }

    /// A machine type, versioned, so that both sides agree.
    #[must_use]
    pub fn kind(mut self, kind: &str) -> Self {
        self.kind = kind.into();
        self
    }

    /// The accelerator.
    #[must_use]
    pub fn accel(mut self, accel: Accel) -> Self {
        self.accel = accel;
        self
    }

    /// The number of CPUs.
    #[must_use]
    pub fn cpus(mut self, count: u32) -> Self {
        self.cpus = count;
        self
    }

    /// One more NUMA node with a back end of its own: `ram1`, `ram2`, ….
    #[must_use]
    pub fn node(mut self, mib: u64) -> Self {
        self.nodes_mib.push(mib);
        self
    }

    /// A DIMM with a back end of its own: `dimm0`, `dimm1`, ….
    #[must_use]
    pub fn dimm(mut self, mib: u64) -> Self {
        self.dimms_mib.push(mib);
        self
    }

    /// Where the RAM lies.
    #[must_use]
    pub fn backing(mut self, backing: Backing) -> Self {
        self.backing = backing;
        self
    }

    /// Uses the very RAM files of `other`, for a hand-over on the spot: two QEMUs, one memory.
    #[must_use]
    pub fn on_ram_of(mut self, other: &Qemu) -> Self {
        self.shared = Some(other.ram_folder());
        self
    }

    /// When the RAM is allocated.
    #[must_use]
    pub fn populate(mut self, populate: Populate) -> Self {
        self.populate = populate;
        self
    }

    /// One more device.
    #[must_use]
    pub fn device(mut self, device: Device) -> Self {
        self.devices.push(device);
        self
    }

    /// Boots the Linux guest.
    #[must_use]
    pub fn linux(mut self, linux: Linux) -> Self {
        self.payload = Payload::Linux(linux);
        self
    }

    /// Boots the bare-metal guest.
    #[must_use]
    pub fn tiny(mut self) -> Self {
        self.payload = Payload::Tiny;
        self
    }

    /// Starts with the guest paused (`-S`).
    #[must_use]
    pub fn paused(mut self) -> Self {
        self.start = Start::Paused;
        self
    }

    /// Starts as the target of a migration (`-incoming defer`, without `-S`).
    #[must_use]
    pub fn incoming(mut self) -> Self {
        self.start = Start::Incoming;
        self
    }

    /// One more argument of QEMU, as it is.
    #[must_use]
    pub fn arg(mut self, arg: impl Into<OsString>) -> Self {
        self.more.push(arg.into());
        self
    }

    /// Starts it and waits until QMP answers.
    pub fn start(&self) -> Result<Qemu, TestbedError> {
        Qemu::start(self)
    }

    pub(crate) fn version(&self) -> QemuVersion {
        self.version
    }

    pub(crate) fn backing_of_ram(&self) -> Backing {
        self.backing
    }

    /// Where its RAM files go.
    pub(crate) fn place_for_ram(&self) -> Result<Arc<RamFolder>, TestbedError> {
        match &self.shared {
            Some(folder) => Ok(Arc::clone(folder)),
            None => RamFolder::create(self.backing).map(Arc::new),
        }
    }

    /// The names of the memory back ends, with their sizes in MiB.
    pub(crate) fn backends(&self) -> impl Iterator<Item = (String, u64)> {
        let named = |prefix, sizes: &[u64]| {
            let named = sizes.iter().enumerate();
            let named = named.map(move |(at, &mib)| (format!("{prefix}{at}"), mib));
            named.collect::<Vec<_>>()
        };
        named("ram", &self.nodes_mib)
            .into_iter()
            .chain(named("dimm", &self.dimms_mib))
    }

    /// QEMU's arguments; the RAM's files go to `ram`, the guest's image is written to `scratch`.
    pub(crate) fn arguments(
        &self,
        ram: &Path,
        scratch: &Path,
    ) -> Result<Vec<OsString>, TestbedError> {
        let mut args = Arguments::default();
        args.word("-nodefaults").pair("-display", "none");
        args.pair(
            "-accel",
            match self.accel {
                Accel::Tcg => "tcg,tb-size=64",
                Accel::Kvm => "kvm",
            },
        );
        args.pair("-smp", self.cpus.to_string());
        self.memory(&mut args, ram);
        for (number, device) in self.devices.iter().enumerate() {
            add_device(&mut args, number, device);
        }
        match self.start {
            Start::Now => {}
            Start::Paused => drop(args.word("-S")),
            Start::Incoming => drop(args.pair("-incoming", "defer")),
        }
        self.payload(&mut args, scratch)?;
        args.0.extend(self.more.iter().cloned());
        Ok(args.0)
    }

    fn memory(&self, args: &mut Arguments, ram: &Path) {
        let prealloc = match self.populate {
            Populate::OnDemand => "off",
            Populate::AtStart => "on",
        };
        for (name, mib) in self.backends() {
            let kind = match self.backing {
                Backing::Memfd => "memory-backend-memfd".into(),
                Backing::Private => "memory-backend-ram".into(),
                _ => format!("memory-backend-file,mem-path={}/{name}", ram.display()),
            };
            let share = match self.backing {
                Backing::Private => "off",
                _ => "on",
            };
            let object = format!("{kind},id={name},size={mib}M,share={share},prealloc={prealloc}");
            args.pair("-object", object);
        }
        let base: u64 = self.nodes_mib.iter().sum();
        if self.dimms_mib.is_empty() {
            args.pair("-m", format!("{base}M"));
        } else {
            let slots = self.dimms_mib.len();
            let most = base + self.dimms_mib.iter().sum::<u64>();
            args.pair("-m", format!("{base}M,slots={slots},maxmem={most}M"));
        }
        for at in 0..self.dimms_mib.len() {
            args.pair("-device", format!("pc-dimm,id=slot{at},memdev=dimm{at}"));
        }
        if self.nodes_mib.len() == 1 {
            args.pair("-machine", format!("{},memory-backend=ram0", self.kind));
        } else {
            args.pair("-machine", &*self.kind);
            for at in 0..self.nodes_mib.len() {
                args.pair("-numa", format!("node,memdev=ram{at}"));
            }
        }
    }

    fn payload(&self, args: &mut Arguments, scratch: &Path) -> Result<(), TestbedError> {
        let write = |name, bytes: &[u8]| {
            let path = scratch.join(name);
            std::fs::write(&path, bytes).map_err(TestbedError::io("write the guest's image"))?;
            Ok(path)
        };
        match &self.payload {
            Payload::Nothing => {}
            Payload::Tiny => drop(args.pair("-bios", write("tiny", &tiny::image())?)),
            Payload::Linux(linux) => {
                args.pair("-kernel", Linux::kernel()?)
                    .pair("-initrd", write("initramfs", &crate::initramfs::image()?)?)
                    .pair("-append", linux.command_line());
            }
        }
        Ok(())
    }
}

fn add_device(args: &mut Arguments, number: usize, device: &Device) {
    match device {
        Device::Net => {
            args.pair("-netdev", format!("user,id=net{number}"))
                .pair("-device", format!("virtio-net-pci,netdev=net{number}"));
        }
        Device::Disk { format, path } => {
            let (path, driver) = (path.display(), format.driver());
            let file = format!("driver=file,node-name=file{number},filename={path}");
            let node = format!("driver={driver},node-name=disk{number},file=file{number}");
            args.pair("-blockdev", file)
                .pair("-blockdev", node)
                .pair("-device", format!("virtio-blk-pci,drive=disk{number}"));
        }
        Device::Rng => {
            let source = format!("rng-random,id=rng{number},filename=/dev/urandom");
            args.pair("-object", source)
                .pair("-device", format!("virtio-rng-pci,rng=rng{number}"));
        }
        Device::Tablet => {
            args.pair("-device", format!("qemu-xhci,id=usb{number}"))
                .pair("-device", format!("usb-tablet,bus=usb{number}.0"));
        }
        Device::Vga => drop(args.pair("-device", "VGA")),
        Device::Pvpanic => drop(args.pair("-device", "pvpanic-pci")),
    }
}

#[derive(Default)]
struct Arguments(Vec<OsString>);

impl Arguments {
    fn word(&mut self, word: impl Into<OsString>) -> &mut Self {
        self.0.push(word.into());
        self
    }

    fn pair(&mut self, option: &str, value: impl Into<OsString>) -> &mut Self {
        self.word(option).word(value)
    }
}
