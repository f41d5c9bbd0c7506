"""Benchmarks, each with the ratio to a peer in the same run; `results/` has the recorded figures.

Adding a benchmark: a module with `main()` that measures, prints and calls `record`; a line in the
`bench` target of the Makefile; a test with tiny sizes in `tests/integration/test_benchmarks.py`.
"""

from gft_lite.utils.library_output import hide_library_messages

# Here, since a process that is started for a job imports this before any library.
hide_library_messages()
