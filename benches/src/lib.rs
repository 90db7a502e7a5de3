//! Ferry against its peers.
