"""Kernels written by hand. Each equals a plain function of `ops`, which says what it computes and runs elsewhere."""
