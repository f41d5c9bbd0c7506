"""Experiments of many runs: sweeps, their launchers, method comparison, the lab study.

`sweep_config` is the schema of a sweep, `sweep_runner` runs it with a launcher of `launchers`,
`sweep_results` writes and reads its results, `search` has points proposed by Optuna. `compare_methods` and `lab_study` run methods on the
lab task; `paper_findings` and `study_page` judge and print the study. `outcomes` is what a
comparison of methods ends with, `verdict` judges it, `referee_tables`, `referee_plots`,
`referee_page` and `referee_files` print it.

May import `training`, `report` and everything below them.

Adding an experiment:
1. Write a module with a function that makes a `Sweep` and calls `sweep_runner.sweep`.
2. Give it a command in `cli/`.
A launcher is added in `launchers.py`.
"""

__all__ = [
    "compare_methods",
    "lab_study",
    "launchers",
    "outcomes",
    "paper_findings",
    "referee_files",
    "referee_page",
    "referee_plots",
    "referee_tables",
    "search",
    "study_page",
    "sweep_config",
    "sweep_results",
    "sweep_runner",
    "verdict",
]
