"""Engines that are calibrated with the cost table of a profile."""
