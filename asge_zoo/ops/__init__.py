"""Tensor operations that a spec chooses from: pooling, normalisation, goodness, projection."""
