//! Lines out of bytes, each at most so long.

use crate::error::Error;

/// Splits a stream of bytes at newlines. Holds at most one incomplete line, plus what was added
/// since the last complete one was taken.
#[derive(Debug)]
pub(super) struct Lines {
    buffer: Vec<u8>,
    /// Where the first line that was not taken begins.
    start: usize,
    /// Up to where there is known to be no newline, so that a long line in small pieces is not
    /// searched again with every piece.
    scanned: usize,
    limit: usize,
}

impl Lines {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            buffer: Vec::new(),
            start: 0,
            scanned: 0,
            limit,
        }
    }

    pub(super) fn extend(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.start);
        self.scanned -= self.start;
        self.start = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// The next complete line without its end, or nothing when there is none yet.
    pub(super) fn next(&mut self) -> Result<Option<&[u8]>, Error> {
        let newline = self.buffer[self.scanned..]
            .iter()
            .position(|&byte| byte == b'\n');
        let end = newline.map_or(self.buffer.len(), |at| self.scanned + at);
        if end - self.start > self.limit {
            return Err(Error::LineTooLong { limit: self.limit });
        }
        if newline.is_none() {
            self.scanned = end;
            return Ok(None);
        }
        let line = &self.buffer[self.start..end];
        self.start = end + 1;
        self.scanned = self.start;
        Ok(Some(line.trim_ascii()))
    }

    /// What has come of the line that is not complete.
    pub(super) fn rest(&self) -> &[u8] {
        &self.buffer[self.start..]
    }
}
