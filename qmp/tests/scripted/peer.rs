//! Peers that follow a script.

use std::path::PathBuf;
use std::time::Duration;

use ferry_qmp::{Address, Client, Error, Events, Options};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;

pub(crate) const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": "Debian"}, "capabilities": ["oob"]}}"#;
pub(crate) const STOP: &str =
    r#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}"#;

/// Nothing here takes longer, unless it hangs.
const PATIENCE: Duration = Duration::from_secs(20);

/// The server's end of a connection.
pub(crate) struct Script {
    pub(crate) stream: BufReader<UnixStream>,
}

impl Script {
    pub(crate) async fn say(&mut self, line: &str) {
        let line = format!("{line}\r\n");
        self.stream.write_all(line.as_bytes()).await.unwrap();
    }

    pub(crate) async fn hear(&mut self) -> String {
        let mut line = String::new();
        self.stream.read_line(&mut line).await.unwrap();
        line
    }

    pub(crate) async fn greet(&mut self) {
        self.say(GREETING).await;
        assert_eq!(
            self.hear().await,
            "{\"execute\":\"qmp_capabilities\",\"id\":0,\"arguments\":{\"enable\":[\"oob\"]}}\n"
        );
        self.say(r#"{"return": {}, "id": 0}"#).await;
    }
}

/// A server that plays `script` to its first client, and the folder that holds its socket.
pub(crate) struct Server {
    folder: TempDir,
    played: JoinHandle<()>,
}

impl Server {
    pub(crate) fn play<F: Future<Output = ()> + Send + 'static>(
        script: impl FnOnce(Script) -> F + Send + 'static,
    ) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("qmp")).unwrap();
        let played = tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let stream = BufReader::new(stream);
            script(Script { stream }).await;
        });
        Self { folder, played }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("qmp")
    }

    pub(crate) async fn connect(&self) -> Result<(Client, Events), Error> {
        self.connect_with(&Options::default()).await
    }

    pub(crate) async fn connect_with(&self, options: &Options) -> Result<(Client, Events), Error> {
        Client::connect(&Address::Unix(self.path()), options).await
    }

    /// Ends when the script has, and fails when it failed.
    pub(crate) async fn played(self) {
        bounded(self.played).await.unwrap();
    }
}

pub(crate) async fn bounded<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(PATIENCE, future)
        .await
        .expect("it hangs")
}
