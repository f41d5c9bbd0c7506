"""One of the processes that compute an audit's step together: `torchrun -m ... FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from gft_lite.policy.base import without_dropout
from gft_lite.policy.registry import load_policy
from gft_lite.recipe.schema import Recipe
from gft_lite.training.audit import WHOLE, flat_gradient
from gft_lite.training.audit_subject import PROGRESS
from gft_lite.training.learner import Learner
from gft_lite.utils.distributed import init_distributed


def main(folder: Path) -> None:
    """Compute the step in `folder` with the other processes; the main one writes its gradient."""
    distributed = init_distributed("cpu")
    # The file is that of the process that started this one.
    tree, rows, weights = torch.load(folder / "step.pt", weights_only=False)
    recipe = Recipe.from_tree(tree)
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
        torch.save(flat_gradient(learner), folder / "gradient.pt")
    distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
