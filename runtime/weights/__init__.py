"""Weights: read from and written to Hugging Face folders, held in copies, reallocated between layouts."""
