"""Our embedded engine beside others on the same weights: `python -m benchmarks.engine`."""
