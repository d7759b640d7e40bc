"""Benchmarks: `python -m bench.bench_<family>`. They check before they time, and take rivals in turns."""
