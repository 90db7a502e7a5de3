//! The tests' own eyes on QMP.
//!
//! Not `ferry-qmp`: a fault in the client under test must not hide itself from the tests.

use std::io::{BufRead, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::TestbedError;

/// How long QEMU may take for any answer.
const ANSWER_BOUND: Duration = Duration::from_secs(30);

/// A blocking QMP connection. Events that come between answers are kept.
#[derive(Debug)]
pub struct Monitor {
    stream: BufReader<UnixStream>,
    events: Vec<Value>,
}

impl Monitor {
    /// Connects and negotiates.
    pub fn connect(path: &Path) -> Result<Self, TestbedError> {
        let stream = UnixStream::connect(path)
            .map_err(TestbedError::io(format!("connect to {}", path.display())))?;
        stream
            .set_read_timeout(Some(ANSWER_BOUND))
            .map_err(TestbedError::io("set the time-out of QMP"))?;
        let mut monitor = Self {
            stream: BufReader::new(stream),
            events: Vec::new(),
        };
        monitor.read()?;
        monitor.execute("qmp_capabilities", &json!({}))?;
        Ok(monitor)
    }

    /// Executes a command and returns its answer.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value, TestbedError> {
        let mut line = json!({ "execute": command, "arguments": arguments }).to_string();
        line.push('\n');
        self.stream
            .get_mut()
            .write_all(line.as_bytes())
            .map_err(TestbedError::io(format!("send {command} over QMP")))?;
        loop {
            let mut message = self.read()?;
            if let Some(error) = message.get("error") {
                return Err(TestbedError::Qmp {
                    command: command.into(),
                    answer: error.to_string(),
                });
            }
            if message.get("return").is_some() {
                return Ok(message["return"].take());
            }
            self.events.push(message);
        }
    }

    /// QEMU's run state: `running`, `paused`, `inmigrate`, ….
    pub fn run_state(&mut self) -> Result<String, TestbedError> {
        let answer = self.execute("query-status", &json!({}))?;
        Ok(answer["status"].as_str().unwrap_or_default().to_owned())
    }

    /// The names of the events so far, oldest first. Forgets them.
    pub fn take_events(&mut self) -> Result<Vec<Value>, TestbedError> {
        // Answered after every event before it.
        self.run_state()?;
        Ok(std::mem::take(&mut self.events))
    }

    fn read(&mut self) -> Result<Value, TestbedError> {
        let mut line = String::new();
        let read = self
            .stream
            .read_line(&mut line)
            .map_err(TestbedError::io("read from QMP"))?;
        if read == 0 {
            let ended = std::io::ErrorKind::UnexpectedEof.into();
            return Err(TestbedError::io("QEMU closed its QMP connection")(ended));
        }
        serde_json::from_str(&line)
            .map_err(|error| TestbedError::io("parse a QMP message")(error.into()))
    }
}
