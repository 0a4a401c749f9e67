//! Gram tiles of centred rows, for CKA.
