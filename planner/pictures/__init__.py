"""Plans and timelines as pages, traces and comparisons."""
