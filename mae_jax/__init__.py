"""Masked autoencoders in JAX/Flax: pre-train, look at, and reuse MAE and its family."""

__version__ = "0.1.0"
