"""The training loop, the groups of a step, and the learner that updates the policy.

May import `evaluation` and everything below it. Read in this order: `loop.py` (a step),
`groups.py` (its groups), `learner.py` (its updates), then `objective/losses.py`. `setup.py` puts
the parts together, `single_run.py` is a run from base evaluation to summary, `stages.py` a chain of
runs, `shared_parts.py` what consecutive runs use in turn, `presample.py` fills a folder of groups
for training without rollouts.

Adding a metric of a step:
1. A figure of the loss: return it in `LossOutput.metrics`; nothing else changes.
2. Any other: add it to the dict that `train_step` returns; name, unit and meaning go to the README.
"""

__all__ = [
    "groups",
    "learner",
    "loop",
    "presample",
    "run",
    "setup",
    "shared_parts",
    "single_run",
    "stages",
]
