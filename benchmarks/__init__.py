"""Benchmarks: what a saga costs, beside the naive form in the same run. `python -m benchmarks --help`."""
