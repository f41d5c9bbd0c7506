"""Distillation: have a teacher answer a recipe's problems, grade the answers, write a data set.

May import `evaluation` and everything below it.

Adding a teacher back end:
1. Implement `Teacher` of `teachers.py` in a file of its own: `name`, `start`, `prompt`, `generate`.
2. Return it from `find_teacher` in `pipeline.py` for the `--teacher` values that select it.
3. Test it in `tests/integration/test_distill.py`.
"""

__all__ = [
    "answer_store",
    "console",
    "data_set",
    "endpoint_teacher",
    "local_teacher",
    "pipeline",
    "progress",
    "teachers",
]
