"""The benchmark: what `scripts/bench.py` runs, and its workers."""
