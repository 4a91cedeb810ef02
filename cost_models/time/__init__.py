"""Seconds of every call under every layout."""
