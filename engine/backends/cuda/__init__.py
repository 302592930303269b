"""Steps on a GPU: fused layers, attention over pages, CUDA graphs."""
