"""What computes a batch: one room a backend, and none imports another, nor a runner."""
