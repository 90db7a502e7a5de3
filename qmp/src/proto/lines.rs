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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMIT: usize = 12;

    /// What `bytes` split into, seen whole and with no care for time or memory.
    fn oracle(bytes: &[u8]) -> (Vec<Vec<u8>>, bool) {
        let mut pieces: Vec<_> = bytes.split(|&byte| byte == b'\n').collect();
        let too_long = pieces.iter().position(|piece| piece.len() > LIMIT);
        let complete = too_long.unwrap_or(pieces.len() - 1);
        pieces.truncate(complete);
        let lines = pieces.iter().map(|piece| piece.trim_ascii().to_vec());
        (lines.collect(), too_long.is_some())
    }

    proptest! {
        #[test]
        fn any_split_gives_the_same_lines(
            bytes in prop::collection::vec(prop::sample::select(b"ab \r\n".to_vec()), 0..200),
            sizes in prop::collection::vec(1..20_usize, 1..20),
        ) {
            let mut lines = Lines::new(LIMIT);
            let mut taken = Vec::new();
            let mut rest = &bytes[..];
            let mut sizes = sizes.iter().cycle();
            let too_long = 'over: loop {
                loop {
                    match lines.next() {
                        Ok(Some(line)) => taken.push(line.to_vec()),
                        Ok(None) => break,
                        Err(_) => break 'over true,
                    }
                }
                prop_assert!(lines.rest().len() <= LIMIT);
                if rest.is_empty() {
                    break false;
                }
                let (now, later) = rest.split_at(rest.len().min(*sizes.next().unwrap()));
                lines.extend(now);
                rest = later;
            };
            prop_assert_eq!((taken, too_long), oracle(&bytes));
        }
    }
}
