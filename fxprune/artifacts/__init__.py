"""What is kept of a module: checkpoints, and the way back into the user's own class."""
