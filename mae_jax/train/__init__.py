"""The training step, its state, and the loop around it; knows no model, task or data set."""
