//! The target's machine, fact by fact. The long runs are the simulated world's.
