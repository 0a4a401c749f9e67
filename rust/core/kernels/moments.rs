//! Counts, sums, sums of squares and maxima per feature, from sparse codes.
