//! Feature statistics from sparse codes: firing counts, sums, maxima, top samples, by group.
