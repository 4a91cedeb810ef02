"""`realplan doctor`: what this machine has, what it can run, and what would help."""
