"""The grading of a run's groups by all of its processes, and what a judge took."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gft_lite.rewards.judge_client import FILE
from gft_lite.rewards.scorer import Scorer
from gft_lite.runs.folder import RunFolder
from gft_lite.types import Group
from gft_lite.utils.distributed import Distributed


class Grading:
    """Gives groups their rewards; called by all processes with the same groups."""

    def __init__(self, scorer: Scorer, folder: RunFolder, distributed: Distributed) -> None:
        self._scorer, self._distributed = scorer, distributed
        name = FILE if distributed.is_main else f"judge-{distributed.rank}.jsonl"
        self._judgements = folder.path / name
        if (folder.path / "recipe.yaml").exists():
            self.keep_judgements()

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        """The groups with rewards, each graded by one process."""
        return self._distributed.all_gather(self._scorer.score(self._distributed.shard(groups)))

    def keep_judgements(self) -> None:
        """Write what a judge replies to the run's folder, so that nothing is asked twice.

        The folder must have been created: a start that ends before leaves nothing in it.
        Raises: UserError for a damaged file.
        """
        if self._scorer.judge is not None:
            self._scorer.judge.keep(self._judgements)

    def judge_usage(self) -> dict[str, Any]:
        """`judge`: requests, failures, tokens and cost since the last call; empty without one."""
        return self._sum("take_usage")

    def judge_totals(self) -> dict[str, Any]:
        """The same of the whole run, with earlier starts."""
        return self._sum("totals")

    def _sum(self, name: str) -> dict[str, Any]:
        judge = self._scorer.judge
        if judge is None:
            return {}
        parts = self._distributed.all_gather([getattr(judge, name)()])
        return {"judge": {key: sum(part[key] for part in parts) for key in parts[0]}}
