"""The benchmarks that `pytest perf` runs; each file says what it isolates and how long it takes on a GPU."""
