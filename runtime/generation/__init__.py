"""Generation: slots that refill, a KV cache in blocks, a lean forward with static shapes, sampling."""
