"""Two states of a checkpoint: what became of every tensor between them, and what that means."""
