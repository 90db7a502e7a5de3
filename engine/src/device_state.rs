//! The device state on its way: a sink at the source, an inbox at the target.
//!
//! It travels in pieces on the control lane. What the VMM writes before the pause may be loaded as it
//! comes; what follows is held back until RAM is complete, since loading it reads RAM.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use bytes::{Buf as _, Bytes};
use crc32fast::Hasher;
use ferry_stream::limits::{MAX_STATE_BYTES, MAX_STATE_CHUNK};
use ferry_stream::message::Message;
use tokio::sync::mpsc::UnboundedSender;

use crate::control::Outgoing;

/// Most pieces of device state that wait to be sent. On a slow link they are sent ahead of what comes
/// after the pause, with the guest standing: video memory waits in the VMM, and not here.
const MAX_WAITING: usize = 2;

/// Length and checksum of the device state so far.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tally {
    pub(crate) bytes: u64,
    hasher: Hasher,
}

impl Tally {
    fn add(&mut self, bytes: &[u8]) {
        self.bytes += bytes.len() as u64;
        self.hasher.update(bytes);
    }

    pub(crate) fn crc(&self) -> u32 {
        self.hasher.clone().finalize()
    }
}

/// Leave to have one piece waiting; given back when dropped.
#[derive(Debug)]
pub(crate) struct Permit(Arc<Places>);

#[derive(Debug, Default)]
struct Places {
    state: Mutex<Taken>,
    freed: Condvar,
}

#[derive(Debug, Default)]
struct Taken {
    count: usize,
    closed: bool,
}

impl Permit {
    /// Waits for a place; none is given any more once the sink is closed.
    fn acquire(places: &Arc<Places>) -> Option<Self> {
        let mut taken = lock(&places.state);
        while taken.count >= MAX_WAITING && !taken.closed {
            taken = places
                .freed
                .wait(taken)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if taken.closed {
            return None;
        }
        taken.count += 1;
        Some(Self(Arc::clone(places)))
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        lock(&self.0.state).count -= 1;
        self.0.freed.notify_one();
    }
}

/// Where the source's VMM writes its device state: every write is a piece, or several.
pub(crate) struct Sink {
    outgoing: UnboundedSender<Outgoing>,
    places: Arc<Places>,
    tally: Arc<Mutex<Tally>>,
}

/// The driver's hold on a [`Sink`] that the VMM has.
#[derive(Clone, Debug, Default)]
pub(crate) struct SinkWatch {
    places: Arc<Places>,
    tally: Arc<Mutex<Tally>>,
}

impl SinkWatch {
    /// Lets every write fail, also one that waits: a link that stands still would else hold the VM
    /// thread, and with it the way back, for ever.
    pub(crate) fn close(&self) {
        lock(&self.places.state).closed = true;
        self.places.freed.notify_all();
    }

    /// What has gone through.
    pub(crate) fn tally(&self) -> Tally {
        lock(&self.tally).clone()
    }
}

impl Sink {
    /// A sink onto the control lane, and the hold on it.
    pub(crate) fn new(outgoing: UnboundedSender<Outgoing>) -> (Self, SinkWatch) {
        let watch = SinkWatch::default();
        let sink = Self {
            outgoing,
            places: Arc::clone(&watch.places),
            tally: Arc::clone(&watch.tally),
        };
        (sink, watch)
    }
}

impl io::Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let piece = &bytes[..bytes.len().min(MAX_STATE_CHUNK)];
        if piece.is_empty() {
            return Ok(0);
        }
        let permit = Permit::acquire(&self.places).ok_or(io::ErrorKind::BrokenPipe)?;
        let mut tally = lock(&self.tally);
        if tally.bytes + piece.len() as u64 > MAX_STATE_BYTES {
            return Err(io::Error::new(
                io::ErrorKind::FileTooLarge,
                "the device state is too large",
            ));
        }
        let message = Message::State {
            offset: tally.bytes,
            bytes: Bytes::copy_from_slice(piece),
        };
        let sent = self.outgoing.send(Outgoing::State(message, permit));
        sent.map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
        tally.add(piece);
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Where the target keeps device state until the VMM may have it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Inbox(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<Held>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Held {
    tally: Tally,
    pieces: VecDeque<Bytes>,
    /// How much the VMM has read.
    read: u64,
    /// Where what must wait begins.
    late_from: Option<u64>,
    /// Everything came and may be read.
    released: bool,
    /// Why nothing more will come.
    closed: Option<String>,
}

impl Inbox {
    /// Takes a piece in. An error names what is wrong with it.
    pub(crate) fn push(&self, offset: u64, bytes: Bytes) -> Result<(), String> {
        let mut held = lock(&self.0.state);
        if offset != held.tally.bytes || held.released {
            return Err(format!(
                "device state at {offset}, {} was due",
                held.tally.bytes
            ));
        }
        if held.tally.bytes + bytes.len() as u64 > MAX_STATE_BYTES {
            return Err(format!("device state of more than {MAX_STATE_BYTES} bytes"));
        }
        held.tally.add(&bytes);
        if held.closed.is_none() {
            held.pieces.push_back(bytes);
        }
        self.0.changed.notify_all();
        Ok(())
    }

    /// What comes from now on waits for [`Inbox::release`].
    pub(crate) fn hold(&self) {
        let mut held = lock(&self.0.state);
        let at = held.tally.bytes;
        held.late_from.get_or_insert(at);
    }

    /// RAM is complete: the rest may be read, if it is what the source says that it sent.
    pub(crate) fn release(&self, bytes: u64, crc: u32) {
        let mut held = lock(&self.0.state);
        if (held.tally.bytes, held.tally.crc()) == (bytes, crc) {
            held.released = true;
        } else {
            held.closed = Some("the device state did not arrive as it was sent".into());
        }
        self.0.changed.notify_all();
    }

    /// Nothing more will come: a read fails with `why`.
    pub(crate) fn close(&self, why: &str) {
        let mut held = lock(&self.0.state);
        held.pieces.clear();
        held.closed.get_or_insert_with(|| why.to_owned());
        self.0.changed.notify_all();
    }

    /// The VMM's end.
    pub(crate) fn reader(&self) -> Reader {
        Reader(self.clone())
    }
}

/// Reads an [`Inbox`], waiting for what may not be read yet.
#[derive(Debug)]
pub(crate) struct Reader(Inbox);

impl io::Read for Reader {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let shared = &self.0.0;
        let mut held = lock(&shared.state);
        loop {
            if let Some(why) = &held.closed {
                return Err(io::Error::new(
                    io::ErrorKind::ConnectionAborted,
                    why.clone(),
                ));
            }
            if let Some(count) = held.take(into) {
                return Ok(count);
            }
            held = shared
                .changed
                .wait(held)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Held {
    /// Bytes that may be read now; 0 at the end; nothing when one must wait.
    fn take(&mut self, into: &mut [u8]) -> Option<usize> {
        let limit = match self.late_from {
            Some(at) if !self.released => at,
            _ => self.tally.bytes,
        };
        let free = usize::try_from(limit - self.read).unwrap_or(usize::MAX);
        if free == 0 {
            return (self.released && self.read == self.tally.bytes).then_some(0);
        }
        let piece = self.pieces.front_mut()?;
        let count = into.len().min(piece.len()).min(free);
        piece.copy_to_slice(&mut into[..count]);
        if piece.is_empty() {
            self.pieces.pop_front();
        }
        self.read += count as u64;
        Some(count)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    fn crc(bytes: &[u8]) -> u32 {
        crc32fast::hash(bytes)
    }

    #[test]
    fn early_bytes_flow_and_late_ones_wait() {
        let inbox = Inbox::default();
        inbox.push(0, Bytes::from_static(b"early")).unwrap();
        inbox.hold();
        inbox.push(5, Bytes::from_static(b"late")).unwrap();
        let mut reader = inbox.reader();
        let mut five = [0; 16];
        assert_eq!(reader.read(&mut five).unwrap(), 5);
        assert_eq!(lock(&inbox.0.state).take(&mut five), None, "held back");
        inbox.release(9, crc(b"earlylate"));
        let mut rest = String::new();
        reader.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "late");
    }

    #[test]
    fn what_was_not_sent_is_never_loaded() {
        let inbox = Inbox::default();
        inbox.hold();
        inbox.push(0, Bytes::from_static(b"state")).unwrap();
        inbox.release(5, crc(b"other"));
        let error = inbox.reader().read(&mut [0; 8]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
        inbox.push(7, Bytes::from_static(b"gap")).unwrap_err();
    }

    #[test]
    fn a_source_cannot_fill_our_memory() {
        let inbox = Inbox::default();
        lock(&inbox.0.state).tally.bytes = MAX_STATE_BYTES - 3;
        let push = |offset, bytes| inbox.push(offset, Bytes::from_static(bytes));
        push(MAX_STATE_BYTES - 3, b"abc").unwrap();
        push(MAX_STATE_BYTES, b"d").unwrap_err();
    }

    #[test]
    fn closing_wakes_a_writer_whose_link_stands_still() {
        use std::io::Write as _;

        let (outgoing, queue) = tokio::sync::mpsc::unbounded_channel();
        let (mut sink, watch) = Sink::new(outgoing);
        for _ in 0..MAX_WAITING {
            assert_eq!(sink.write(b"state").unwrap(), 5);
        }
        let waiting = std::thread::spawn(move || sink.write(b"more"));
        watch.close();
        let error = waiting.join().unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
        assert_eq!(watch.tally().bytes, 5 * MAX_WAITING as u64);
        drop(queue);
    }

    #[test]
    fn closing_wakes_the_reader() {
        let inbox = Inbox::default();
        let mut reader = inbox.reader();
        let waiting = std::thread::spawn(move || reader.read(&mut [0; 8]));
        inbox.close("over");
        assert_eq!(waiting.join().unwrap().unwrap_err().to_string(), "over");
    }
}
