//! What other processes of this host can see of migrations, and do with them.

pub mod control;
