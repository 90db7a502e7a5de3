//! The `ferry` command, as a user would run it.

use std::ffi::OsStr;
use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::{Qemu, TestbedError, wait_until};

/// How long `ferry receive` may take until it listens: it checks all of QEMU first.
const LISTEN_BOUND: Duration = Duration::from_secs(20);

/// Where the command was built: `FERRY_BIN`, or beside the program that runs.
pub fn ferry_binary() -> Result<PathBuf, TestbedError> {
    if let Some(path) = std::env::var_os("FERRY_BIN") {
        return Ok(path.into());
    }
    let here = std::env::current_exe().map_err(TestbedError::io("own path"))?;
    let built = here
        .ancestors()
        .skip(1)
        .take(2)
        .map(|folder| folder.join("ferry"));
    built
        .into_iter()
        .find(|path| path.is_file())
        .ok_or_else(|| TestbedError::Program {
            program: "ferry".into(),
            log: "it is not built: cargo build -p ferry-engine".into(),
        })
}

/// A running `ferry` command, killed when dropped.
#[derive(Debug)]
pub struct Ferry {
    child: Child,
    stdout: JoinHandle<String>,
    stderr: JoinHandle<()>,
    told: Arc<Mutex<String>>,
}

/// How a `ferry` command ended.
#[derive(Clone, Debug)]
pub struct Ended {
    /// Its status.
    pub status: ExitStatus,
    /// All that it printed.
    pub stdout: String,
    /// All that it told.
    pub stderr: String,
}

impl Ended {
    /// The exit code; 128 and the signal's number when a signal ended it, as a shell has it.
    pub fn code(&self) -> i32 {
        let signal = self.status.signal().map(|number| 128 + number);
        self.status.code().or(signal).unwrap_or(-1)
    }

    /// The JSON object that `--json` prints; null when there is none.
    pub fn json(&self) -> Value {
        let object = self.stdout.lines().rev().find(|line| line.starts_with('{'));
        object
            .and_then(|line| serde_json::from_str(line).ok())
            .unwrap_or_default()
    }
}

impl Ferry {
    /// Runs `ferry` with `args`, about what is in the folder `state`, to its end.
    pub fn run(state: &Path, args: &[&str], bound: Duration) -> Result<Ended, TestbedError> {
        Self::start(state, args)?.wait(bound)
    }

    /// The same, and does not wait.
    pub fn start(state: &Path, args: &[&str]) -> Result<Self, TestbedError> {
        Ok(Self::spawn(state, args, Stdio::piped())?.0)
    }

    /// Where the journals and control sockets of moves of `qemu` are, unless they are told otherwise.
    pub fn state_folder(qemu: &Qemu) -> PathBuf {
        qemu.folder().join("state")
    }

    /// What moves have left in `state`: journals and control sockets.
    pub fn left_in(state: &Path) -> Vec<PathBuf> {
        let below = |folder: &Path| {
            let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
            entries.map(|entry| entry.path()).collect::<Vec<_>>()
        };
        let (folders, mut left): (Vec<_>, Vec<_>) =
            below(state).into_iter().partition(|path| path.is_dir());
        left.extend(folders.iter().flat_map(|folder| below(folder)));
        left
    }

    /// Starts `ferry` with `args`; its journals go to `state`.
    fn spawn(
        state: &Path,
        args: impl IntoIterator<Item = impl AsRef<OsStr>>,
        stderr: Stdio,
    ) -> Result<(Self, mpsc::Receiver<String>), TestbedError> {
        let mut child = Command::new(ferry_binary()?)
            .args(args)
            .env("FERRY_STATE_DIR", state)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .spawn()
            .map_err(TestbedError::io("start ferry"))?;
        let (first, line) = mpsc::channel();
        let stdout = child.stdout.take().expect("stdout is a pipe");
        // Only where it is a pipe, and not shown.
        let stderr = child.stderr.take();
        let stdout = std::thread::spawn(move || read_telling_first(stdout, &first));
        let told = Arc::<Mutex<String>>::default();
        let listener = Arc::clone(&told);
        let stderr = std::thread::spawn(move || {
            for line in stderr
                .into_iter()
                .flat_map(|pipe| BufReader::new(pipe).lines())
                .map_while(Result::ok)
            {
                let mut told = listener.lock().unwrap_or_else(PoisonError::into_inner);
                told.push_str(&line);
                told.push('\n');
            }
        });
        Ok((
            Self {
                child,
                stdout,
                stderr,
                told,
            },
            line,
        ))
    }

    /// Starts `ferry receive` for `qemu` and waits until it listens; tells where.
    pub fn receive(qemu: &Qemu, more: &[&str]) -> Result<(Self, String), TestbedError> {
        let (ferry, line) = Self::start_receive(qemu, more)?;
        let told = line.recv_timeout(LISTEN_BOUND).unwrap_or_default();
        if let Some(uri) = listening(told.trim_end()) {
            return Ok((ferry, uri));
        }
        Err(failed(ferry.wait(LISTEN_BOUND)?.stderr))
    }

    /// Starts `ferry receive` for a `qemu` that it must refuse, and waits for its end.
    pub fn refused_receive(qemu: &Qemu, more: &[&str]) -> Result<Ended, TestbedError> {
        let (ferry, _) = Self::start_receive(qemu, more)?;
        ferry.wait(LISTEN_BOUND)
    }

    fn start_receive(
        qemu: &Qemu,
        more: &[&str],
    ) -> Result<(Self, mpsc::Receiver<String>), TestbedError> {
        let socket = qemu.qmp_path();
        let mut args: Vec<&OsStr> = vec!["receive".as_ref(), "--qmp".as_ref(), socket.as_ref()];
        args.extend(more.iter().map(OsStr::new));
        Self::spawn(&Self::state_folder(qemu), args, Stdio::piped())
    }

    /// Starts `ferry migrate` of `qemu` to `uri`.
    pub fn migrate(qemu: &Qemu, uri: &str, more: &[&str]) -> Result<Self, TestbedError> {
        Self::migrate_telling(qemu, uri, more, Stdio::piped())
    }

    /// The same, with what it tells shown where this program tells.
    pub fn migrate_shown(qemu: &Qemu, uri: &str, more: &[&str]) -> Result<Self, TestbedError> {
        Self::migrate_telling(qemu, uri, more, Stdio::inherit())
    }

    /// The same, with what it tells going to a terminal that is gone.
    pub fn migrate_unheard(qemu: &Qemu, uri: &str, more: &[&str]) -> Result<Self, TestbedError> {
        let (reader, writer) = std::io::pipe().map_err(TestbedError::io("make a pipe"))?;
        drop(reader);
        Self::migrate_telling(qemu, uri, more, writer.into())
    }

    fn migrate_telling(
        qemu: &Qemu,
        uri: &str,
        more: &[&str],
        stderr: Stdio,
    ) -> Result<Self, TestbedError> {
        let socket = qemu.qmp_path();
        let mut args: Vec<&OsStr> = vec![
            "migrate".as_ref(),
            "--json".as_ref(),
            "--qmp".as_ref(),
            socket.as_ref(),
        ];
        args.extend(more.iter().map(OsStr::new));
        args.push(uri.as_ref());
        Ok(Self::spawn(&Self::state_folder(qemu), args, stderr)?.0)
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// All that it has told so far.
    pub fn told(&self) -> String {
        let told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        told.clone()
    }

    /// Waits until it has told `text`.
    pub fn wait_until_told(&self, text: &str, bound: Duration) -> Result<(), TestbedError> {
        wait_until(&format!("ferry tells {text:?}"), bound, || {
            self.told().contains(text).then_some(())
        })
        .map_err(|error| failed(format!("{error}: {}", self.told())))
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<(), TestbedError> {
        let pid = i32::try_from(self.child.id()).expect("a pid fits in an i32");
        kill(Pid::from_raw(pid), signal).map_err(|errno| TestbedError::io("signal")(errno.into()))
    }

    /// Waits for its end, at most `bound`.
    pub fn wait(mut self, bound: Duration) -> Result<Ended, TestbedError> {
        let ended = wait_until("ferry ends", bound, || self.child.try_wait().ok().flatten());
        let killed = ended.is_err();
        if killed {
            _ = self.child.kill();
        }
        let status = self
            .child
            .wait()
            .map_err(TestbedError::io("wait for ferry"))?;
        let ended = std::thread::spawn(String::new);
        let stdout = std::mem::replace(&mut self.stdout, ended);
        let stdout = stdout.join().unwrap_or_default();
        let ended = std::thread::spawn(|| ());
        _ = std::mem::replace(&mut self.stderr, ended).join();
        let stderr = self.told();
        if killed {
            return Err(failed(format!("it hung: {stdout}{stderr}")));
        }
        Ok(Ended {
            status,
            stdout,
            stderr,
        })
    }
}

impl Drop for Ferry {
    fn drop(&mut self) {
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

fn failed(log: String) -> TestbedError {
    TestbedError::Program {
        program: "ferry".into(),
        log,
    }
}

/// Where `ferry receive` says that it listens, in words or as JSON.
fn listening(line: &str) -> Option<String> {
    if let Some(uri) = line.strip_prefix("Listening on ") {
        return Some(uri.to_owned());
    }
    let told: Value = serde_json::from_str(line).ok()?;
    Some(told.get("listening")?.as_str()?.to_owned())
}

fn read_telling_first(stdout: ChildStdout, first: &mpsc::Sender<String>) -> String {
    let mut reader = BufReader::new(stdout);
    let mut text = String::new();
    _ = reader.read_line(&mut text);
    _ = first.send(text.clone());
    _ = reader.read_to_string(&mut text);
    text
}
