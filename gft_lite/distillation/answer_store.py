"""TODO: gft_lite/distillation/answer_store.py"""

from __future__ import annotations

import json
import threading
from dataclasses import asdict
from pathlib import Path

from gft_lite.distillation.teachers import TeacherRequest, TeacherResponse
from gft_lite.utils.files import whole_lines


class AnswerStore:
    """Answers by key, a JSON line each, appended as they come; used by several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._known: dict[str, TeacherResponse] = {}
        for line in whole_lines(path):
            entry = json.loads(line)
            key = entry.pop("key")
            self._known[key] = TeacherResponse(**entry)

    def get(self, question: TeacherRequest) -> TeacherResponse | None:
        """The answer that was kept, if there is one."""
        return self._known.get(question.key)

    def keep(self, question: TeacherRequest, answer: TeacherResponse) -> None:
        """Append an answer; it survives whatever ends the process afterwards."""
        line = json.dumps({"key": question.key, **asdict(answer)}) + "\n"
        with self._lock, self.path.open("a", encoding="utf-8") as file:
            file.write(line)
