"""The exact-string reward: the text after the last marker must equal the gold answer."""

from __future__ import annotations

from gft_lite.rewards.base import Grade, RewardError, Rule


def make(marker: str = "####") -> Rule:
    """Build the rule: the stripped text after the last `marker` must equal the gold answer.

    Args:
        marker: Text before the answer; a response without it has no answer.

    Raises: RewardError if the marker is not a non-empty string.
    """
    if not isinstance(marker, str) or not marker:
        raise RewardError(
            f"reward 'exact': marker must be a non-empty string, got {marker!r}. Use e.g. '####'."
        )

    def grade(text: str, answer: str | None, answer_type: str | None = None) -> Grade:
        if answer is None:
            return Grade(0.0, "error")
        _, found, stated = text.rpartition(marker)
        if not found:
            return Grade(0.0, "no_answer")
        return Grade(float(stated.strip() == answer))

    return grade
