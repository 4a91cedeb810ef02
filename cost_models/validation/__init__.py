"""Published measurements recomputed."""
