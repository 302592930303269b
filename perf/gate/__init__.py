"""Saved runs in, verdicts out: reading, metrics, tolerances, statistics, A/B runs and the self-test.

It measures nothing itself and imports no torch: `compare` and `report` must not wait for it.
"""
