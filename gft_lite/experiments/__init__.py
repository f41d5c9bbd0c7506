"""Many runs: sweeps, launchers, the comparison of methods on the lab, the lab study.

May import `training`, `report` and everything below them.
"""

__all__: list[str] = []
