//! Linear CKA, debiased and biased, over all pairs of layers in one pass.
