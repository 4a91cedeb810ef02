"""Measured costs: tables of profiles and kernels, and engines calibrated with them."""
