"""From examples on disk to batches of numpy arrays: sources, transforms, loader.

Nothing here knows a model or imports jax by name: Grain's worker processes import these modules.
"""
