"""What finalize returns, put back into the user's own class."""
