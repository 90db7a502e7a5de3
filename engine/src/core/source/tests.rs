//! The source's machine, fact by fact. The long runs are the simulated world's.
