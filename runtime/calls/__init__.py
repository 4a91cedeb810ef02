"""What a rank computes for each kind of call, from the tensors that reach it to those that it hands on."""
