"""Weights of other libraries as ours, and ours as theirs. PyTorch is needed for `.pth` alone."""
