"""What of this project computes in its own way what a plain function says: kernels, transports, chunks, codes.

A file a kind. Twins are written in float64 and not by what they are twins of.
"""
