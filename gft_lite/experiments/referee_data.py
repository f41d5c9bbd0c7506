"""The data of a referee: no problem of the tuning set may be trained on or compared on."""

from __future__ import annotations

from gft_lite.experiments.referee_plan import RefereePlan


def check_data(plan: RefereePlan) -> None:
    """Raises: UserError if the tuning set shares problems with training data or other sets."""
