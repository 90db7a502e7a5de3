//! Real QEMUs for the adapter's tests: started bare, ended with the test.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use ferry_engine::qemu::{Options, Qemu, Side};
use ferry_engine::vmm::{GuestEvent, Vm, VmmError};
use ferry_qmp::Client;
use serde_json::Value;
use tempfile::TempDir;
use tokio::runtime::Runtime;

/// The two that have to work, by the testbed's names.
pub(crate) const OLD: &str = "qemu-7.2";
pub(crate) const NEW: &str = "qemu-10.0";
pub(crate) const VERSIONS: [&str; 2] = [OLD, NEW];

/// A machine type that both versions know.
pub(crate) const MACHINE: &str = "pc-q35-7.2";

/// How long a QEMU may take for anything here.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// How often a state is looked at that tells nobody when it changes.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// Size of guest RAM where a test does not care.
pub(crate) const RAM_MIB: u64 = 64;

static NEXT: AtomicU32 = AtomicU32::new(0);

/// The wrapper that starts a QEMU.
pub(crate) fn binary(version: &str) -> PathBuf {
    let testbed = std::env::var_os("FERRY_TESTBED_DIR").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/testbed"),
        PathBuf::from,
    );
    let binary = testbed.join(version).join("run");
    assert!(
        binary.exists(),
        "{} is missing: run ./testbed/setup first",
        binary.display()
    );
    binary
}

pub(crate) fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap()
}

/// A file under `/dev/shm`, removed when dropped.
pub(crate) struct RamPath(pub(crate) PathBuf);

impl RamPath {
    pub(crate) fn new() -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        Self(format!("/dev/shm/ferry-qemu-{}-{number}", std::process::id()).into())
    }

    /// The options of one back end in this file that is all the machine's RAM.
    pub(crate) fn backend(&self, id: &str, mib: u64) -> String {
        format!(
            "memory-backend-file,id={id},size={mib}M,mem-path={},share=on",
            self.0.display()
        )
    }
}

impl Drop for RamPath {
    fn drop(&mut self) {
        // A test may never have made it.
        let _ = fs::remove_file(&self.0);
    }
}

/// A QEMU, killed when dropped.
pub(crate) struct Machine {
    pub(crate) process: Child,
    pub(crate) folder: TempDir,
    pub(crate) ram: Vec<RamPath>,
}

impl Machine {
    /// Starts one with RAM that can be migrated and `arguments` besides.
    pub(crate) fn start(version: &str, arguments: &[&str]) -> Self {
        Self::start_as(version, MACHINE, arguments)
    }

    pub(crate) fn start_as(version: &str, machine: &str, arguments: &[&str]) -> Self {
        let ram = RamPath::new();
        let backend = ram.backend("ram0", RAM_MIB);
        let size = format!("{RAM_MIB}M");
        let machine = format!("{machine},memory-backend=ram0");
        let mut all = vec!["-m", &size, "-object", &backend, "-machine", &machine];
        all.extend(arguments);
        let mut started = Self::start_bare(version, &all);
        started.ram.push(ram);
        started
    }

    /// Starts one with nothing but monitors and `arguments`.
    pub(crate) fn start_bare(version: &str, arguments: &[&str]) -> Self {
        let folder = TempDir::new().unwrap();
        let server = |name: &str| {
            let path = folder.path().join(name);
            format!("unix:{},server=on,wait=off", path.display())
        };
        let process = Command::new(binary(version))
            .args([
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-accel",
                "tcg",
            ])
            .args(["-qmp", &server("qmp"), "-qmp", &server("other")])
            .args(arguments)
            .current_dir(folder.path())
            .spawn()
            .unwrap();
        let machine = Self {
            process,
            folder,
            ram: Vec::new(),
        };
        // The second monitor is made last.
        until("QEMU listens", || {
            UnixStream::connect(machine.folder.path().join("other")).ok()
        });
        machine
    }

    pub(crate) fn address(&self) -> ferry_qmp::Address {
        ferry_qmp::Address::Unix(self.folder.path().join("qmp"))
    }

    pub(crate) fn attach(&self, runtime: &Runtime) -> Qemu {
        self.try_attach(runtime).unwrap()
    }

    /// Sockets are made in the machine's own folder, where a test can see what is left.
    fn try_attach(&self, runtime: &Runtime) -> Result<Qemu, VmmError> {
        let options = Options {
            socket_dir: self.folder.path().to_owned(),
            ..Options::default()
        };
        runtime.block_on(Qemu::attach(&self.address(), &options))
    }

    pub(crate) fn vm(&self, runtime: &Runtime, side: Side) -> Vm {
        self.attach(runtime).vm(side).unwrap()
    }

    /// Another client, as an operator might use.
    pub(crate) fn operator(&self, runtime: &Runtime) -> Operator {
        let address = ferry_qmp::Address::Unix(self.folder.path().join("other"));
        let connected = runtime.block_on(Client::connect(&address, &ferry_qmp::Options::default()));
        let (client, _) = connected.unwrap();
        Operator {
            client,
            runtime: runtime.handle().clone(),
        }
    }

    /// Where every descriptor of QEMU leads, in order.
    pub(crate) fn descriptors(&self) -> Vec<String> {
        let folder = format!("/proc/{}/fd", self.process.id());
        let mut found: Vec<String> = fs::read_dir(folder)
            .unwrap()
            .flatten()
            .filter_map(|entry| fs::read_link(entry.path()).ok())
            .map(|target| target.display().to_string())
            // Each socket has a number of its own.
            .map(|target| target.split(":[").next().unwrap_or_default().to_owned())
            .collect();
        found.sort_unstable();
        found
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A second QMP connection to the same QEMU.
pub(crate) struct Operator {
    client: Client,
    runtime: tokio::runtime::Handle,
}

impl Operator {
    pub(crate) fn run(&self, command: &'static str, arguments: Value) -> Value {
        self.try_run(command, arguments).unwrap()
    }

    pub(crate) fn try_run(
        &self,
        command: &'static str,
        arguments: Value,
    ) -> Result<Value, ferry_qmp::Error> {
        self.runtime
            .block_on(self.client.execute_raw(command, arguments))
    }

    pub(crate) fn ask(&self, command: &'static str) -> Value {
        self.run(command, Value::Null)
    }

    pub(crate) fn human(&self, line: &str) -> String {
        let arguments = serde_json::json!({ "command-line": line });
        self.run("human-monitor-command", arguments)
            .as_str()
            .unwrap()
            .to_owned()
    }

    pub(crate) fn status(&self) -> String {
        self.ask("query-status")["status"]
            .as_str()
            .unwrap()
            .to_owned()
    }

    /// Capabilities and parameters.
    pub(crate) fn settings(&self) -> (Value, Value) {
        (
            self.ask("query-migrate-capabilities"),
            self.ask("query-migrate-parameters"),
        )
    }
}

/// The events that an adapter tells.
pub(crate) fn watch(vm: &mut Vm) -> mpsc::Receiver<GuestEvent> {
    let (sender, receiver) = mpsc::channel();
    let sender = Mutex::new(sender);
    vm.guest
        .watch(Arc::new(move |event| {
            let _ = sender.lock().unwrap().send(event);
        }))
        .unwrap();
    receiver
}

/// A sink that keeps what it is given, and knows when it was dropped.
#[derive(Clone, Default)]
pub(crate) struct Kept(Arc<Mutex<Vec<u8>>>, Arc<()>);

impl Kept {
    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.0.lock().unwrap().clone()
    }

    pub(crate) fn sink(&self) -> Box<dyn Write + Send> {
        Box::new(self.clone())
    }

    /// Nobody else holds it.
    pub(crate) fn is_dropped(&self) -> bool {
        Arc::strong_count(&self.1) == 1
    }
}

impl Write for Kept {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Copies all RAM of one VM into another.
pub(crate) fn copy_ram(from: &Vm, to: &Vm) {
    assert_eq!(from.ram.layout().differences(to.ram.layout()), []);
    to.ram.blank().unwrap();
    for (index, region) in from.ram.layout().iter() {
        from.ram
            .populated(index, region.all(), &mut |range| {
                let mut bytes = vec![0; usize::try_from(range.byte_len()).unwrap()];
                from.ram.read(index, range, &mut bytes).unwrap();
                to.ram.write(index, range, &bytes).unwrap();
            })
            .unwrap();
        assert!(region.pages() > 0);
    }
}

/// Looks until there is something, within [`PATIENCE`].
pub(crate) fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited too long until {what}");
        std::thread::sleep(LOOK_EVERY);
    }
}

/// An empty disk image of `mib` MiB.
pub(crate) fn raw_disk(folder: &Path, mib: u64) -> PathBuf {
    let path = folder.join("disk.raw");
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .open(&path);
    file.unwrap().set_len(mib << 20).unwrap();
    path
}

/// Fills guest memory with `value` from inside QEMU, through its qtest socket.
pub(crate) fn fill_guest(qtest: &Path, address: u64, byte_len: u64, value: u8) {
    let mut stream = UnixStream::connect(qtest).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    writeln!(stream, "memset {address:#x} {byte_len:#x} {value:#x}").unwrap();
    let mut answer = [0; 3];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"OK\n");
}
