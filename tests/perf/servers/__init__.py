"""Tests of perf/servers."""
