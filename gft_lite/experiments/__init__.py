"""Experiments of many runs: sweeps, their launchers, method comparison, the lab study.

`sweep_config` is the schema of a sweep, `sweep_runner` runs it with a launcher of `launchers`,
`sweep_results` writes and reads its results, `search` has points proposed by Optuna.
`compare_methods` and `lab_study` run methods on the lab task, `lab_bases` pretrains further bases
of it, `paper_findings` and `study_page` judge and print the study. The referee compares methods on
any data: `referee_methods` are the methods with their own fields and dials, `referee_plan` has the
recipe of each, `tuning` what is tried, `referee_costs` prints the plan, `referee_data` and
`referee_folder` check data and folder, `referee` runs all, and `referee_results` reads the runs.
`outcomes` is what it ends with, `verdict` judges that, `referee_tables`, `referee_plots`,
`referee_page` and `referee_files` print it.

May import `training`, `report` and everything below them.

Adding an experiment:
1. Write a module with a function that makes a `Sweep` and calls `sweep_runner.sweep`.
2. Give it a command in `cli/`.
A launcher is added in `launchers.py`.
"""

__all__ = [
    "compare_methods",
    "lab_bases",
    "lab_study",
    "launchers",
    "outcomes",
    "paper_findings",
    "referee",
    "referee_costs",
    "referee_data",
    "referee_files",
    "referee_folder",
    "referee_methods",
    "referee_page",
    "referee_plan",
    "referee_plots",
    "referee_results",
    "referee_tables",
    "search",
    "study_page",
    "sweep_config",
    "sweep_results",
    "sweep_runner",
    "tuning",
    "verdict",
]
