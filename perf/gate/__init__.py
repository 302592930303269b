"""Saved runs in, verdicts out: reading, metrics, tolerances, statistics, designs of experiments.

It measures nothing itself and imports no torch: `compare` and `report` must not wait for it.
"""
