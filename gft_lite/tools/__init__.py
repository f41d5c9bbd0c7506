"""Tools around a run: doctor, chat, merge.

May import `training` and everything below it.
"""

__all__: list[str] = []
