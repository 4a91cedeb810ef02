"""Starting a run, and why one failed: checks before it, processes, launchers, causes."""
