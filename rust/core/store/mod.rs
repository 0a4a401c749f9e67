//! The store: bytes on disk.
