"""Whole networks built out of `mae_jax.nn`."""
