//! Cosines between the rows of two dictionaries.
