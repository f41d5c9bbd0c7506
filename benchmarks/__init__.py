"""Benchmarks, each with the ratio to a peer in the same run; `results/` has the recorded figures.

Adding a benchmark: a module with `main()` that measures, prints and calls `record`; a line in the
`bench` target of the Makefile; a test with tiny sizes in `tests/integration/test_benchmarks.py`.
"""
