"""One of the processes that compute an audit's step together: `torchrun -m ... FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from gft_lite.policy.base import without_dropout
from gft_lite.policy.registry import load_policy
from gft_lite.training.audit import WHOLE, flat_gradient
from gft_lite.training.audit_files import read_step, write_gradient
from gft_lite.training.audit_subject import PROGRESS
from gft_lite.training.learner import Learner
from gft_lite.utils.distributed import init_distributed


def main(folder: Path) -> None:
    """Compute the step in `folder` with the other processes; the main one writes its gradient."""
    distributed = init_distributed("cpu")
    recipe, rows, weights = read_step(folder)
    policy = load_policy(recipe.policy, recipe.seed)
    policy.model.train()
    with torch.no_grad():
        for name, parameter in policy.parameters().items():
            parameter.copy_(weights[name])
    learner = Learner(policy, recipe, distributed)
    learner.micro_batch_tokens = WHOLE
    with without_dropout(policy):
        learner.gradient(rows, PROGRESS)
    if distributed.is_main:
        write_gradient(folder, flat_gradient(learner))
    distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
