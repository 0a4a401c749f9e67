//! Top-K selection: the k largest positive scores, ties to the lower index.
