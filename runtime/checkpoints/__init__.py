"""Checkpoints: a run's whole state written while it goes on, and taken up again under any legal plan."""
