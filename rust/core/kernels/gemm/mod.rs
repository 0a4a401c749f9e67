//! Packed matrix products whose epilogue selects: no product matrix is ever written.
