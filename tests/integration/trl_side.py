"""TRL's half of test_against_trl.py: `python trl_side.py CASES ADAPTER OUT` trains every case.

It is a process of its own because a CPU can only interpret TRL's Triton kernels, which Triton
settles when it is imported: TRITON_INTERPRET=1 must be set before.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from safetensors.torch import save_file

from gft_lite.policy.registry import load_policy
from gft_lite.recipe.sections import PolicySettings


class Recorder(transformers.TrainerCallback):
    """Keeps the gradient of every optimiser step."""

    def __init__(self, policy):
        self._parameters = list(policy.parameters().values())
        self.gradients = []

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.gradients.append(torch.cat([p.grad.flatten() for p in self._parameters]))


def sft(policy, case, **common: Any):
    rows = [
        {
            "input_ids": [*group["prompt_ids"], *response],
            "labels": [*([-100] * len(group["prompt_ids"])), *response],
        }
        for group in case["groups"]
        for response in group["responses"]
    ]
    arguments = trl.SFTConfig(**case["options"])
    return trl.SFTTrainer(policy.model, arguments, train_dataset=Dataset.from_list(rows), **common)


def grpo(policy, case, **common: Any):
    groups = {group["prompt"]: group for group in case["groups"]}
    reward_of = {
        tuple(response): reward
        for group in case["groups"]
        for response, reward in zip(group["responses"], group["rewards"], strict=True)
    }

    def rollout(prompts, trainer):
        """The responses of each prompt in turn, which TRL asks for K times in a row."""
        left = {prompt: iter(group["responses"]) for prompt, group in groups.items()}
        responses = [next(left[prompt]) for prompt in prompts]
        return {
            "prompt_ids": [groups[prompt]["prompt_ids"] for prompt in prompts],
            "completion_ids": responses,
            "logprobs": [[0.0] * len(response) for response in responses],
        }

    def reward(completion_ids, **columns):
        return [reward_of[tuple(ids)] for ids in completion_ids]

    return trl.GRPOTrainer(
        policy.model, reward, trl.GRPOConfig(**case["options"]), rollout_func=rollout,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in groups]), **common,
    )  # fmt: skip


def sdft() -> dict[str, torch.Tensor]:
    """TRL's loss for sampled tokens, and its slope in the student's log-probs."""
    from trl.experimental.sdft.loss_utils import compute_sampled_token_self_distillation_loss

    generator = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(2, 2, 5, 11, generator=generator, dtype=torch.float64)
    ids = torch.randint(11, (2, 5), generator=generator)
    pick = [logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0] for logits in
            (student, teacher)]  # fmt: skip
    student.requires_grad_()
    loss = compute_sampled_token_self_distillation_loss(
        student, teacher, ids, distillation_alpha=1.0
    )
    loss.sum().backward()
    # d log p / d logit of the token is 1 - p.
    own = student.grad.gather(-1, ids[..., None])[..., 0] / (1 - pick[0].exp())
    return {"logprobs": pick[0], "teacher": pick[1], "loss": loss.detach(), "slope": own}


def main(cases: str, adapter: str, out: str) -> None:
    found = {}
    for case in json.loads(Path(cases).read_text()):
        policy = load_policy(PolicySettings(quantization="none", gradient_checkpointing=False))
        recorder = Recorder(policy)
        build = {"sft": sft, "grpo": grpo}[case["trainer"]]
        trainer = build(policy, case, processing_class=policy.tokenizer, callbacks=[recorder])
        # Only now: TRL takes the adapter that it is given as the reference.
        policy.load_adapter(Path(adapter))
        trainer.train()
        logs = [log.get("clip_ratio/region_mean", 0.0) for log in trainer.state.log_history]
        found[f"{case['name']}/gradients"] = torch.stack(recorder.gradients)
        found[f"{case['name']}/clipped"] = torch.tensor(logs[: len(recorder.gradients)])
    found |= {f"sdft/{name}": value.contiguous() for name, value in sdft().items()}
    save_file(found, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
