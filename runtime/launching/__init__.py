"""Starting a run: checks before it, its ranks, launchers, its output, its restarts."""
