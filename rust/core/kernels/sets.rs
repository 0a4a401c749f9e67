//! Bitsets over nodes: intersection and union by popcount.
