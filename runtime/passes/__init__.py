"""What a model does with samples: forward and backward passes, training steps."""
