"""What a batch is for: tasks join a model and a loss; evaluators measure and draw."""
