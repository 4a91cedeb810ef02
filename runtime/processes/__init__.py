"""The processes of a run: which rank each of them is, where they meet, how they end, and why they failed."""
