//! Fraction of variance unexplained.
