"""Sparse autoencoders on the token features of a frozen CLIP."""

__version__ = "0.1.0"
