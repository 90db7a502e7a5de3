//! A running QEMU: gone, with all its files, when dropped.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{Backing, Machine, Monitor, Ram, StatusPage, TestbedError, wait_until};

/// How long QEMU may take until it listens. Populating RAM comes before.
const START_BOUND: Duration = Duration::from_secs(60);

/// How long QEMU may take to end once it is killed: it may have much memory to give back.
const KILL_BOUND: Duration = Duration::from_secs(30);

/// How long QEMU may take to end after it has closed its QMP socket.
const END_BOUND: Duration = Duration::from_secs(5);

/// How long the guest may take to echo a line typed on its console.
const ECHO_BOUND: Duration = Duration::from_secs(20);

/// What the Linux guest says when it has filled its memory, and when it cannot.
const GUEST_RUNS: &str = "ferry-guest: running";
const GUEST_FAILED: &str = "ferry-guest: FAILED";

/// A running QEMU.
#[derive(Debug)]
pub struct Qemu {
    // In the order in which they must go: the process, its RAM, its sockets.
    child: Mutex<Child>,
    monitor: Mutex<Monitor>,
    rams: Vec<Ram>,
    ram_folder: Arc<RamFolder>,
    folder: TempDir,
}

impl Qemu {
    pub(crate) fn start(machine: &Machine) -> Result<Self, TestbedError> {
        let folder = TempDir::with_prefix("ferry-qemu-").map_err(TestbedError::io("temp dir"))?;
        let ram_folder = machine.place_for_ram()?;
        let log = File::create(folder.path().join("log")).map_err(TestbedError::io("log file"))?;
        let child = Command::new(machine.version().executable()?)
            .args(machine.arguments(ram_folder.path(), folder.path())?)
            .args(channels(folder.path()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .map_err(TestbedError::io("start QEMU"))?;
        // From here on an early return must end the process.
        let mut child = Reaped(Some(child));
        let mut monitor = match connect(child.get(), folder.path()) {
            Ok(monitor) => monitor,
            Err(error) => return Err(ended_early(child.get(), folder.path()).unwrap_or(error)),
        };
        let rams = match machine.backing_of_ram() {
            Backing::Memfd => Vec::new(),
            Backing::Private => private_ram(machine, &mut monitor, child.get().id())?,
            _ => machine
                .backends()
                .map(|(name, _)| Ram::open(&ram_folder.path().join(name)))
                .collect::<Result<_, _>>()?,
        };
        Ok(Self {
            child: Mutex::new(child.release()),
            monitor: Mutex::new(monitor),
            rams,
            ram_folder,
            folder,
        })
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        lock(&self.child).id()
    }

    /// The QMP socket for the engine; the testbed itself never uses it.
    pub fn qmp_path(&self) -> PathBuf {
        self.folder.path().join("qmp")
    }

    /// A folder of this machine's own, gone with it.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The RAM files in the order of the back ends: `ram0`, …, `dimm0`, ….
    pub fn rams(&self) -> &[Ram] {
        &self.rams
    }

    pub(crate) fn ram_folder(&self) -> Arc<RamFolder> {
        Arc::clone(&self.ram_folder)
    }

    /// The RAM of `ram0`.
    pub fn ram(&self) -> &Ram {
        &self.rams[0]
    }

    /// Executes a QMP command on the testbed's own connection.
    pub fn execute(&self, command: &str, arguments: &Value) -> Result<Value, TestbedError> {
        lock(&self.monitor).execute(command, arguments)
    }

    /// The run state as QEMU names it.
    pub fn run_state(&self) -> Result<String, TestbedError> {
        lock(&self.monitor).run_state()
    }

    /// Waits until the run state is `wanted`.
    pub fn wait_for_run_state(&self, wanted: &str, bound: Duration) -> Result<(), TestbedError> {
        let what = format!("the run state is {wanted}");
        wait_until(&what, bound, || {
            self.run_state()
                .map(|state| (state == wanted).then_some(()))
                .transpose()
        })?
    }

    /// All events since the last call, oldest first.
    pub fn take_events(&self) -> Result<Vec<Value>, TestbedError> {
        lock(&self.monitor).take_events()
    }

    /// What the guest has written to its serial console so far.
    pub fn serial(&self) -> String {
        let mut bytes = Vec::new();
        // Not there before the guest's first word.
        if let Ok(mut file) = File::open(self.folder.path().join("serial.log")) {
            let _ = file.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits until `text` stands on the serial console.
    pub fn wait_for_serial(&self, text: &str, bound: Duration) -> Result<(), TestbedError> {
        let found = wait_until(text, bound, || {
            let serial = self.serial();
            (serial.contains(text) || serial.contains(GUEST_FAILED)).then_some(serial)
        });
        match found {
            Ok(serial) if serial.contains(text) => Ok(()),
            _ => Err(TestbedError::TimedOut {
                what: format!("{text:?} on the serial console"),
                bound,
                context: format!("; console:\n{}", self.serial()),
            }),
        }
    }

    /// Types a line on the serial console and waits for its echo.
    ///
    /// QEMU forgets what the guest's UART, 8 bytes deep, has not taken when the peer hangs up.
    pub fn send_line(&self, line: &str) -> Result<(), TestbedError> {
        let error = || TestbedError::io("type on the serial console");
        let path = self.folder.path().join("serial");
        let mut stream = UnixStream::connect(path).map_err(error())?;
        stream.set_read_timeout(Some(ECHO_BOUND)).map_err(error())?;
        stream
            .write_all(format!("{line}\n").as_bytes())
            .map_err(error())?;
        let mut seen = Vec::new();
        let is_echoed = |seen: &[u8]| {
            let text = String::from_utf8_lossy(seen);
            text.find(line).is_some_and(|at| text[at..].contains('\n'))
        };
        while !is_echoed(&seen) {
            let mut some = [0; 256];
            let read = stream.read(&mut some).map_err(error())?;
            if read == 0 {
                // The guest has obeyed: it is off.
                return Ok(());
            }
            seen.extend_from_slice(&some[..read]);
        }
        Ok(())
    }

    /// Waits until the Linux guest has filled its memory and works, and finds its status page.
    pub fn wait_for_guest(&self, bound: Duration) -> Result<StatusPage, TestbedError> {
        self.wait_for_serial(GUEST_RUNS, bound)?;
        self.find_status()?.ok_or_else(|| TestbedError::TimedOut {
            what: "the guest's RAM has a status page".into(),
            bound,
            context: format!("; console:\n{}", self.serial()),
        })
    }

    /// Finds the status page of whatever guest runs, in whichever RAM file it is.
    pub fn find_status(&self) -> Result<Option<StatusPage>, TestbedError> {
        for ram in &self.rams {
            if let Some(page) = ram.find_status()? {
                return Ok(Some(page));
            }
        }
        Ok(None)
    }

    /// The place in this machine's RAM where the guest of `page` will count on after a move here.
    ///
    /// # Panics
    ///
    /// When this machine has no back end of that name: the pair was not made of one [`Machine`].
    pub fn counterpart(&self, page: &StatusPage) -> StatusPage {
        let name = page.ram().path().file_name();
        let same = |ram: &&Ram| ram.path().file_name() == name;
        let ram = self.rams.iter().find(same);
        page.in_ram(ram.expect("a pair has the same back ends"))
    }

    /// How it ended, if it has.
    pub fn ended(&self) -> Result<Option<ExitStatus>, TestbedError> {
        lock(&self.child)
            .try_wait()
            .map_err(TestbedError::io("wait for QEMU"))
    }

    /// Waits until it has ended by itself.
    pub fn wait_for_end(&self, bound: Duration) -> Result<ExitStatus, TestbedError> {
        wait_until("QEMU ends", bound, || self.ended().transpose())?
    }

    /// Kills it, as a crash would, and waits until it is gone.
    pub fn kill(&self) -> Result<(), TestbedError> {
        lock(&self.child)
            .kill()
            .map_err(TestbedError::io("kill QEMU"))?;
        self.wait_for_end(KILL_BOUND).map(drop)
    }

    /// The private folders through which its device state travels: named after its process. An
    /// engine that was killed leaves its own behind.
    pub fn private_folders(&self) -> Result<Vec<PathBuf>, TestbedError> {
        let prefix = format!("ferry-{}-", self.pid());
        let entries = fs::read_dir("/tmp").map_err(TestbedError::io("list /tmp"))?;
        let folders = entries
            .flatten()
            .filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
            .map(|entry| entry.path());
        Ok(folders.collect())
    }

    /// What it has written to standard error.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        end(&mut lock(&self.child));
        // A later QEMU may get the same process number, and be taken for their owner.
        for folder in self.private_folders().unwrap_or_default() {
            let _ = fs::remove_dir_all(folder);
        }
    }
}

/// Connects to QMP as soon as QEMU listens.
fn connect(child: &mut Child, folder: &Path) -> Result<Monitor, TestbedError> {
    let watch = folder.join("watch");
    wait_until("QEMU listens on QMP", START_BOUND, || {
        let has_ended = matches!(child.try_wait(), Ok(Some(_)));
        match Monitor::connect(&watch) {
            // The socket is bound a moment before it listens.
            Err(TestbedError::Io { source, .. }) if !has_ended && is_early(&source) => None,
            result => Some(result),
        }
    })?
}

/// RAM that is no file: in the process, where QEMU says that guest address 0 is.
fn private_ram(
    machine: &Machine,
    monitor: &mut Monitor,
    pid: u32,
) -> Result<Vec<Ram>, TestbedError> {
    let question = json!({"command-line": "gpa2hva 0"});
    let answer = monitor.execute("human-monitor-command", &question)?;
    let text = answer.as_str().unwrap_or_default().trim_end();
    let address = text
        .rsplit_once("0x")
        .and_then(|(_, digits)| u64::from_str_radix(digits, 16).ok())
        .ok_or_else(|| TestbedError::Qmp {
            command: "gpa2hva 0".into(),
            answer: text.to_owned(),
        })?;
    machine
        .backends()
        .take(1)
        .map(|(name, mib)| Ram::in_process(pid, &name, address..address + (mib << 20)))
        .collect()
}

fn is_early(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionRefused, NotFound};
    matches!(error.kind(), ConnectionRefused | NotFound)
}

/// The better error when QEMU has ended or is about to: it listens before it reads all its options.
fn ended_early(child: &mut Child, folder: &Path) -> Option<TestbedError> {
    let ended = wait_until("QEMU ends", END_BOUND, || child.try_wait().transpose());
    let status = ended.ok()?.ok()?.to_string();
    let log = fs::read_to_string(folder.join("log")).unwrap_or_default();
    Some(TestbedError::QemuEnded { status, log })
}

/// The sockets and the console: `qmp` for the engine, `watch` for the tests.
fn channels(folder: &Path) -> Vec<String> {
    let folder = folder.display();
    let socket = |name| format!("unix:{folder}/{name},server=on,wait=off");
    let serial = format!(
        "socket,id=serial,path={folder}/serial,server=on,wait=off,logfile={folder}/serial.log"
    );
    let args = [
        ("-qmp", socket("qmp")),
        ("-qmp", socket("watch")),
        ("-chardev", serial),
        ("-serial", "chardev:serial".into()),
    ];
    args.into_iter()
        .flat_map(|(option, value)| [option.into(), value])
        .collect()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A test that panicked in between still has to end its QEMU.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn end(child: &mut Child) {
    // Fails when it has ended already.
    let _ = child.kill();
    let _ = child.wait();
}

/// A child that ends with its owner, until released.
struct Reaped(Option<Child>);

impl Reaped {
    fn get(&mut self) -> &mut Child {
        self.0.as_mut().expect("only release takes it")
    }

    fn release(mut self) -> Child {
        self.0.take().expect("only release takes it")
    }
}

impl Drop for Reaped {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            end(child);
        }
    }
}

/// The folder with the RAM files, and the file system mounted there, if one is.
#[derive(Debug)]
pub(crate) struct RamFolder {
    folder: TempDir,
    is_mounted: bool,
}

impl RamFolder {
    pub(crate) fn create(backing: Backing) -> Result<Self, TestbedError> {
        let folder = TempDir::with_prefix_in("ferry-ram-", "/dev/shm")
            .map_err(TestbedError::io("create a folder in /dev/shm"))?;
        let file_system = match backing {
            Backing::Shm | Backing::Memfd | Backing::Private => None,
            Backing::HugeTmpfs => Some(("tmpfs", "huge=always".to_owned())),
            Backing::Hugetlb => Some(("hugetlbfs", "pagesize=2M".to_owned())),
            Backing::Limited { mib } => Some(("tmpfs", format!("size={mib}m"))),
        };
        let is_mounted = file_system.is_some();
        if let Some((kind, options)) = file_system {
            mount(
                Some("ferry"),
                folder.path(),
                Some(kind),
                MsFlags::empty(),
                Some(&*options),
            )
            .map_err(|errno| {
                let what = format!("mount {kind} with {options} (needs root)");
                TestbedError::io(what)(errno.into())
            })?;
        }
        Ok(Self { folder, is_mounted })
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }
}

impl Drop for RamFolder {
    fn drop(&mut self) {
        if self.is_mounted {
            // Tests may still hold files open in there.
            let _ = umount2(self.path(), MntFlags::MNT_DETACH);
        }
    }
}
