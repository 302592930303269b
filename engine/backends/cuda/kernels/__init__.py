"""Triton kernels; each also runs on CPU tensors in Triton's interpreter."""
