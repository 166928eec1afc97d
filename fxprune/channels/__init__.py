"""Which channels can go, exactly, and how to take them out."""
