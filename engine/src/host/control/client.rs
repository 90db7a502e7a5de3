//! Somebody else's side of a control socket.

use std::io;
use std::time::Duration;

use nix::unistd::Uid;
use tokio::io::{AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::folder::{Folder, JobName, trusts};
use super::protocol::{Answer, Came, Command, LineError, decode, encode, read_line};

/// Why a migration does not answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// There is none of that name: its engine has ended, or was killed.
    #[error("no migration of that name runs here")]
    Gone,
    /// It ended meanwhile.
    #[error("the migration has ended")]
    Ended,
    /// Its engine does not react.
    #[error("its engine does not answer: is it stopped?")]
    Silent,
    /// Somebody else listens there.
    #[error("the control socket is listened on by user {uid}, who is not to be trusted")]
    Foreign {
        /// Who.
        uid: u32,
    },
    /// It does not tell.
    #[error("{reason}")]
    Refused {
        /// Why.
        reason: String,
    },
    /// Its answer makes no sense.
    #[error("its answer cannot be understood: it is of another version of ferry, use that one")]
    Garbled,
    /// The connection failed.
    #[error("its control socket cannot be used")]
    Io(#[from] io::Error),
}

/// A connection to a migration.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
    line: Vec<u8>,
    patience: Duration,
}

impl Client {
    /// Connects to the migration `name` in `folder`, and waits at most `patience` for this and for
    /// every answer.
    pub async fn connect(
        folder: &Folder,
        name: &JobName,
        patience: Duration,
    ) -> Result<Self, ClientError> {
        let connected = timeout(patience, folder.connect(name)).await;
        let stream = match connected.map_err(|_| ClientError::Silent)? {
            Ok(stream) => stream,
            Err(error) => return Err(not_connected(error)),
        };
        let uid = stream.peer_cred()?.uid();
        if !trusts(Uid::from_raw(uid)) {
            return Err(ClientError::Foreign { uid });
        }
        Ok(Self {
            stream: BufReader::new(stream),
            line: Vec::new(),
            patience,
        })
    }

    /// Asks, and waits for the answer.
    pub async fn ask(&mut self, command: &Command) -> Result<Answer, ClientError> {
        let asked = timeout(self.patience, self.ask_patiently(command)).await;
        asked.unwrap_or(Err(ClientError::Silent))
    }

    async fn ask_patiently(&mut self, command: &Command) -> Result<Answer, ClientError> {
        // One that is shown out may have been told why before it could ask.
        let sent = self.stream.write_all(&encode(command)).await;
        match read_line(&mut self.stream, &mut self.line).await {
            Ok(Came::Line) => decode(&self.line).map_err(garbled),
            Ok(Came::TooLong) => Err(ClientError::Garbled),
            Ok(Came::End) => Err(ClientError::Ended),
            Err(error) if is_end(&error) => Err(ClientError::Ended),
            Err(error) => Err(sent.err().unwrap_or(error).into()),
        }
    }
}

fn garbled(_: LineError) -> ClientError {
    ClientError::Garbled
}

fn is_end(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
    )
}

fn not_connected(error: io::Error) -> ClientError {
    match error.kind() {
        // A socket on which nobody listens is what a dead engine leaves.
        io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound => ClientError::Gone,
        // Its queue is full, and nobody takes from it.
        io::ErrorKind::WouldBlock => ClientError::Silent,
        _ => error.into(),
    }
}
