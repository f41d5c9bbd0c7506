"""Teacher demonstrations: teacher back ends, the store of their answers, `gft-lite distill`.

May import `evaluation` and everything below it.
"""

__all__: list[str] = []
