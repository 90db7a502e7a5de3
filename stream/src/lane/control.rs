//! The control lane: messages over anything that tokio reads and writes.

use bytes::BytesMut;
use tokio::io::{
    AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadHalf, WriteHalf,
};

use crate::error::Error;
use crate::frame::{Decoder, Generation, HEADER_BYTES, Header, Position};
use crate::message::{LaneIndex, Message};

/// Both directions of a connection that speaks messages.
///
/// Every connection begins as one, for its greeting; a page lane's then goes on as what
/// [`ControlLane::into_inner`] gives back.
#[derive(Debug)]
pub struct ControlLane<T> {
    /// What the peer says.
    pub reader: ControlReader<ReadHalf<T>>,
    /// What we say.
    pub writer: ControlWriter<WriteHalf<T>>,
}

impl<T: AsyncRead + AsyncWrite + Unpin> ControlLane<T> {
    /// A control lane over a fresh connection.
    pub fn new(stream: T) -> Self {
        let (reader, writer) = tokio::io::split(stream);
        Self {
            reader: ControlReader::new(reader),
            writer: ControlWriter::new(writer),
        }
    }

    /// The connection, when the greeting is over. [`Error::Broken`] if the peer has said more than
    /// was read: nothing may come before the greeting's last answer is sent.
    pub fn into_inner(self) -> Result<T, Error> {
        if self.reader.broken || self.writer.broken || !self.reader.decoder.is_empty() {
            return Err(BROKEN);
        }
        Ok(self.reader.stream.unsplit(self.writer.stream))
    }
}

const BROKEN: Error = Error::Broken {
    lane: LaneIndex::CONTROL,
};

/// Reads messages.
#[derive(Debug)]
pub struct ControlReader<R> {
    stream: R,
    decoder: Decoder,
    broken: bool,
}

impl<R: AsyncRead + Unpin> ControlReader<R> {
    /// A reader of a fresh connection.
    pub fn new(stream: R) -> Self {
        Self {
            stream,
            decoder: Decoder::new(LaneIndex::CONTROL, Generation::default()),
            broken: false,
        }
    }

    /// The next message; `None` at the end of the stream, if that is between two frames.
    ///
    /// May be dropped at any await: no byte is lost.
    pub async fn next(&mut self) -> Result<Option<Message>, Error> {
        if self.broken {
            return Err(BROKEN);
        }
        let message = self.read().await;
        self.broken = message.is_err();
        message
    }

    async fn read(&mut self) -> Result<Option<Message>, Error> {
        loop {
            if let Some(frame) = self.decoder.next_frame()? {
                return Message::decode(frame.header.kind, frame.payload).map(Some);
            }
            let count = self.stream.read_buf(self.decoder.room()?).await?;
            if count == 0 {
                self.decoder.finish()?;
                return Ok(None);
            }
        }
    }
}

/// Writes messages.
#[derive(Debug)]
pub struct ControlWriter<W> {
    stream: W,
    next: Position,
    buffer: BytesMut,
    broken: bool,
}

impl<W: AsyncWrite + Unpin> ControlWriter<W> {
    /// A writer of a fresh connection.
    pub fn new(stream: W) -> Self {
        Self {
            stream,
            next: Position::first(LaneIndex::CONTROL, Generation::default()),
            buffer: BytesMut::new(),
            broken: false,
        }
    }

    /// Sends a message and flushes it.
    ///
    /// A message that breaks a limit is refused, and the lane lives on. Dropped before it is done,
    /// it leaves half a frame behind: every later send is [`Error::Broken`].
    pub async fn send(&mut self, message: &Message) -> Result<(), Error> {
        if self.broken {
            return Err(BROKEN);
        }
        encode_frame(message, self.next, &mut self.buffer)?;
        self.broken = true;
        self.stream.write_all(&self.buffer).await?;
        self.stream.flush().await?;
        self.next.advance();
        self.broken = false;
        Ok(())
    }

    /// Ends this direction: the peer reads the end of the stream after what was sent.
    pub async fn shutdown(&mut self) -> Result<(), Error> {
        self.broken = true;
        Ok(self.stream.shutdown().await?)
    }
}

/// Replaces `out` by the frame of `message` at `position`.
pub(crate) fn encode_frame(
    message: &Message,
    position: Position,
    out: &mut BytesMut,
) -> Result<(), Error> {
    out.clear();
    out.resize(HEADER_BYTES, 0);
    message.encode(out)?;
    let header = Header::new(message.kind(), position, out.len() - HEADER_BYTES)?;
    let mut hasher = header.seed();
    hasher.update(&out[HEADER_BYTES..]);
    out[..HEADER_BYTES].copy_from_slice(&header.to_bytes(hasher.finalize()));
    Ok(())
}
