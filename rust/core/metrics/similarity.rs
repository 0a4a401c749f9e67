//! Decoder cosines and best matches between dictionaries.
