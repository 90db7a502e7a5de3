//! What is said to people and scripts.
//!
//! A terminal or a pipe that is gone must not end a migration in its middle: `eprintln!` would panic
//! there. What cannot be written is not said, and the exit code still tells.

use std::fmt::Display;
use std::io::{self, Write as _, stderr, stdout};

/// Tells a line to a person, on standard error.
pub(crate) fn tell(line: impl Display) {
    _ = writeln!(stderr(), "{line}");
}

/// Prints a line on standard output, at once: on a pipe it would stay in a buffer.
pub(crate) fn print(line: impl Display) {
    _ = try_print(line);
}

/// The same, for whoever prints for nobody else than the reader, and ends with him.
pub(crate) fn try_print(line: impl Display) -> io::Result<()> {
    let mut out = stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()
}
