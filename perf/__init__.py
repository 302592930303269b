"""The performance suite: benchmarks (test_*.py), the gate, A/B runs and reports; `python -m perf --help` has
commands.

It measures the engine from outside, through its public API alone, and serves projects that use another.
"""
