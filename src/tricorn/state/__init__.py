"""Training state: the flat tensors it lives in, and the shards it is saved in."""
