"""The suite's options and fixtures, for every test; `perf.plugin` imports no torch by itself."""

pytest_plugins = ["perf.plugin"]
