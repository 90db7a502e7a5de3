//! Page workers: a thread for each lane, which reads, encodes and sends, or receives, checks and
//! places.

pub(crate) mod receive;
pub(crate) mod send;

use ferry_stream::link::Closer;

/// The means to end every lane from outside its thread.
#[derive(Debug, Default)]
pub(crate) struct Closers(Vec<Box<dyn Closer>>);

impl Closers {
    pub(crate) fn add(&mut self, closer: Box<dyn Closer>) {
        self.0.push(closer);
    }

    /// Ends them. A lane that cannot be closed is ended already.
    pub(crate) fn close(&mut self) {
        for closer in self.0.drain(..) {
            drop(closer.close());
        }
    }
}
