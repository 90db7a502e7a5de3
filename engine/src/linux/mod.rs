//! Linux as the engine needs it: the only unsafe code of the project.
