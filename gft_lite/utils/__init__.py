"""Helpers that know nothing of training: errors, files, signals, memory, statistics, processes.


May import nothing else of the package.
"""

__all__: list[str] = []
