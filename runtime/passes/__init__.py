"""What a model does with samples: forward and backward passes, generation, training steps."""
