"""Models built like Llama on a CPU: what their steps compute, compiled once a machine, and kept in the cache
folder."""
