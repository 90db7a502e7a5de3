//! The machine that the figures come from.

use std::fs;
use std::process::Command;

use ferry_testbed::{QemuVersion, TestbedError, ferry_binary, testbed_dir};
use serde::{Deserialize, Serialize};

/// What is needed to judge figures of another machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// The CPU by its own name.
    pub cpu: String,
    /// How many CPUs this run may use.
    pub cpus: usize,
    /// RAM in MiB.
    pub memory_mib: u64,
    /// The kernel's release.
    pub kernel: String,
    /// What QEMU says of itself.
    pub qemu: String,
    /// What Ferry says of itself.
    pub ferry: String,
    /// What `testbed/setup` has unpacked.
    pub testbed: Vec<String>,
    /// Transparent huge pages: of private memory, and of shared.
    pub huge_pages: [String; 2],
}

impl Host {
    /// This one.
    pub fn here() -> Result<Self, TestbedError> {
        let cpuinfo = read("/proc/cpuinfo");
        let cpu = field(&cpuinfo, "model name").unwrap_or_default();
        let stamp = testbed_dir()?.join("stamp");
        let stamp = fs::read_to_string(&stamp).map_err(TestbedError::io("read the stamp"))?;
        let huge = |of: &str| {
            let setting = read(&format!("/sys/kernel/mm/transparent_hugepage/{of}"));
            // The one in force stands in brackets.
            let inner = setting.split(['[', ']']).nth(1);
            inner.unwrap_or_default().to_owned()
        };
        Ok(Self {
            cpu: cpu.to_owned(),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            memory_mib: memory_mib("MemTotal"),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            qemu: first_line(Command::new(QemuVersion::V10_0.executable()?).arg("--version"))?,
            ferry: first_line(Command::new(ferry_binary()?).arg("--version"))?,
            testbed: stamp.lines().skip(1).map(str::to_owned).collect(),
            huge_pages: [huge("enabled"), huge("shmem_enabled")],
        })
    }
}

/// A field of `/proc/meminfo`, in MiB.
pub fn memory_mib(name: &str) -> u64 {
    let kib = field(&read("/proc/meminfo"), name)
        .and_then(|value| value.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or_default() / 1024
}

fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim())
    })
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn first_line(command: &mut Command) -> Result<String, TestbedError> {
    let output = command
        .output()
        .map_err(TestbedError::io(format!("start {command:?}")))?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().next().unwrap_or_default().to_owned())
}
