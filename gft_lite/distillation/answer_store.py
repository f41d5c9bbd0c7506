"""Append-only store of teacher responses, which makes a distillation resumable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gft_lite.distillation.teachers import TeacherRequest, TeacherResponse
from gft_lite.utils.jsonl import JsonlFile


class AnswerStore:
    """Teacher responses by request key, one JSON line each; thread-safe.

    Raises: UserError for a line that is not a response.
    """

    def __init__(self, path: Path) -> None:
        self._file = JsonlFile(
            path, _parse, "must be a stored teacher response", "Remove the line to sample it again."
        )
        self._responses = dict(self._file)

    def get(self, request: TeacherRequest) -> TeacherResponse | None:
        """Return the response stored by an earlier call of the command, if there is one."""
        return self._responses.get(request.key)

    def append(self, request: TeacherRequest, response: TeacherResponse) -> None:
        """Write a response to the disk at once, so that a crash loses none."""
        self._file.append([{"key": request.key, **asdict(response)}])


def _parse(entry: Mapping[str, Any]) -> tuple[str, TeacherResponse]:
    return str(entry["key"]), TeacherResponse.from_json(entry)
