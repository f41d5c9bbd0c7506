"""Data sets to problems, text to tokens.

May import `recipe` and the foundation.
"""

__all__: list[str] = []
