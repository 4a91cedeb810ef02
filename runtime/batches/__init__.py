"""Batches: data sets, tokens, rewards, and the tensors that calls hand to one another."""
