"""Measurements: `python -m benchmarks.NAME` prints a table and can write it as JSON."""
